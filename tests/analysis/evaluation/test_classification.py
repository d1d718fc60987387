"""What predicted types are worth: F1 and confusions, each against its definition."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.analysis.evaluation.classification import count_confusions, f1_by_type

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


@pytest.mark.parametrize(("true", "predicted"), [([], []), (["a"], ["a", "b"])])
def test_types_without_a_prediction_each_raise(true: list[str], predicted: list[str]) -> None:
    for judge in (f1_by_type, count_confusions):
        with pytest.raises(ValueError, match="a true and a predicted type for each cell"):
            judge(true, predicted)
