"""Stratified samples of labelled cells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.scoring.sampling import KEPT_PER_LABEL, sample_cells


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=70, max_size=300), st.integers(0, 9)
)
def test_a_sample_has_the_requested_size_and_keeps_rare_labels(cells: list[tuple[str, str]], seed: int) -> None:
    labels, batches = map(np.array, zip(*cells, strict=True))
    chosen = sample_cells(labels, batches, 65, seed)
    assert len(chosen) == 65
    assert (np.diff(chosen) > 0).all()
    assert (chosen == sample_cells(labels, batches, 65, seed)).all()
    for label in set(labels):
        assert (labels[chosen] == label).sum() >= min(KEPT_PER_LABEL, (labels == label).sum())


def test_a_sample_too_small_for_twenty_cells_of_each_label_raises() -> None:
    with pytest.raises(ValueError, match="max_cells is 30, which is too few for 20 cells of each label"):
        sample_cells(np.repeat(["a", "b"], 40), np.repeat(["x"], 80), 30, 0)
