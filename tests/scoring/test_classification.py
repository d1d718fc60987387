"""F1 scores and confusion counts, each against its definition."""

import doctest

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.scoring import classification
from scgpt_hf.scoring.classification import count_confusions, f1_by_type

types = st.sampled_from("abcd")
pairs = st.lists(st.tuples(types, types), min_size=1, max_size=60)


def test_the_examples_in_the_docstrings_are_right() -> None:
    assert doctest.testmod(classification).failed == 0


@settings(deadline=None, max_examples=30)
@given(pairs)
def test_f1_is_the_harmonic_mean_of_precision_and_recall(cells: list[tuple[str, str]]) -> None:
    true, predicted = zip(*cells, strict=True)
    scores = f1_by_type(true, predicted)
    assert set(scores) == set(true)
    for one, score in scores.items():
        right = sum(pair == (one, one) for pair in cells)
        precision, recall = right / max(predicted.count(one), 1), right / true.count(one)
        assert score == pytest.approx(2 * precision * recall / (precision + recall) if right else 0)


@settings(deadline=None, max_examples=30)
@given(pairs)
def test_every_cell_is_counted_once_among_the_confusions(cells: list[tuple[str, str]]) -> None:
    true, predicted = zip(*cells, strict=True)
    rows, columns, counts = count_confusions(true, predicted)
    assert columns[: len(rows)] == rows
    assert [true.count(one) for one in rows] == sorted((true.count(one) for one in rows), reverse=True)
    for row, one in enumerate(rows):
        for column, other in enumerate(columns):
            assert counts[row, column] == cells.count((one, other))


@pytest.mark.parametrize(("true", "predicted"), [([], []), (["a"], ["a", "b"])])
def test_different_numbers_of_true_and_predicted_types_raise(true: list[str], predicted: list[str]) -> None:
    for compare in (f1_by_type, count_confusions):
        with pytest.raises(ValueError, match="a true and a predicted type for each cell"):
            compare(true, predicted)
