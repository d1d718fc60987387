"""What predicted types are worth: F1, confusions, calibration, each against its definition."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.analysis.classification import calibration_error, count_confusions, f1_by_type, reliability

types = st.sampled_from("abcd")
pairs = st.lists(st.tuples(types, types), min_size=1, max_size=60)


@settings(deadline=None, max_examples=30)
@given(pairs)
def test_f1_is_twice_the_hits_over_all_who_have_or_are_given_the_type(cells: list[tuple[str, str]]) -> None:
    true, predicted = zip(*cells, strict=True)
    scores = f1_by_type(true, predicted)
    assert set(scores) == set(true)
    for one, score in scores.items():
        hits = sum(pair == (one, one) for pair in cells)
        assert score == pytest.approx(2 * hits / (true.count(one) + predicted.count(one)))


@settings(deadline=None, max_examples=30)
@given(pairs)
def test_confusions_count_every_cell_once(cells: list[tuple[str, str]]) -> None:
    true, predicted = zip(*cells, strict=True)
    rows, columns, counts = count_confusions(true, predicted)
    assert columns[: len(rows)] == rows
    assert [true.count(one) for one in rows] == sorted((true.count(one) for one in rows), reverse=True)
    for row, one in enumerate(rows):
        for column, other in enumerate(columns):
            assert counts[row, column] == cells.count((one, other))


def test_calibration_error_of_a_case_counted_by_hand() -> None:
    confidence, correct = [0.95, 0.85, 0.85, 0.15], [True, True, False, False]
    bins = reliability(confidence, correct)
    assert bins.index.tolist() == [1, 8, 9]
    assert bins["accuracy"].tolist() == [0, 0.5, 1]
    assert bins["cells"].tolist() == [1, 2, 1]
    assert calibration_error(confidence, correct) == pytest.approx((0.15 + 2 * 0.35 + 0.05) / 4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50), st.integers(1, 12))
def test_each_confidence_is_in_the_bin_that_holds_it(cells: list[tuple[float, bool]], n_bins: int) -> None:
    confidence, correct = map(np.array, zip(*cells, strict=True))
    bins = reliability(confidence, correct, n_bins)
    assert bins["cells"].sum() == len(cells)
    assert (
        (bins["confidence"] >= bins.index / n_bins - 1e-9) & (bins["confidence"] <= (bins.index + 1) / n_bins + 1e-9)
    ).all()
    assert (bins["accuracy"] * bins["cells"]).sum() == pytest.approx(correct.sum())


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [([], [], "a confidence and a truth"), ([0.5], [True, False], "a confidence and a truth"), ([1.5], [True], "1.5")],
)
def test_confidences_that_are_none_raise(confidence: list[float], correct: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_error(confidence, correct)


@pytest.mark.parametrize(("true", "predicted"), [([], []), (["a"], ["a", "b"])])
def test_types_without_a_prediction_each_raise(true: list[str], predicted: list[str]) -> None:
    for judge in (f1_by_type, count_confusions):
        with pytest.raises(ValueError, match="a true and a predicted type for each cell"):
            judge(true, predicted)
