"""Stratified samples of labelled cells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.scoring.sampling import KEPT_PER_LABEL, sample_cells, sample_chunks


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


@settings(deadline=None, max_examples=30)
@given(st.sets(st.integers(0, 3000), min_size=1), st.integers(1, 200), st.integers(0, 9))
def test_a_sample_of_chunks_has_the_requested_cells_from_few_chunks(ids: set[int], n_cells: int, seed: int) -> None:
    cell_ids = np.array(sorted(ids))
    chosen = sample_chunks(cell_ids, n_cells, seed, chunk_size=10)
    assert len(chosen) == min(n_cells, len(cell_ids))
    assert set(chosen.tolist()) <= ids
    assert (np.diff(chosen) > 0).all()
    np.testing.assert_array_equal(chosen, sample_chunks(cell_ids, n_cells, seed, chunk_size=10))


def test_a_sample_of_chunks_reads_no_more_chunks_than_it_needs() -> None:
    chosen = sample_chunks(np.arange(100_000), 5_000, 0, chunk_size=100)
    assert len(set((chosen // 100).tolist())) == 50
    assert len(set((sample_chunks(np.arange(100_000), 500, 0, chunk_size=100) // 100).tolist())) == 32
    assert not np.array_equal(chosen, sample_chunks(np.arange(100_000), 5_000, 1, chunk_size=100))
