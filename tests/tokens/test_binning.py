"""Quantile bins equal numpy's quantile and digitize, with and without numba."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.tokens import tokenizing_scgpt
from scgpt_hf.tokens.binning_scgpt import Ties, bin_cell, bin_ranges, quantile_edges
from scgpt_hf.tokens.randomness_scgpt import TIES, cell_keys
from tests.support.binning import bin_cells

COUNTS = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 6000)), min_size=1, max_size=60)
REALS = st.lists(st.floats(2**-10, 1e4, width=32), min_size=1, max_size=60)
CELLS = st.lists(st.one_of(COUNTS, REALS, st.just([])), max_size=6)
Binning = Callable[..., Any]


@pytest.fixture(params=["compiled", "numpy"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Binning:
    monkeypatch.setattr(tokenizing_scgpt, "COMPILED", request.param == "compiled")
    return bin_cells


def _matrix(cells: list[list[float]], dtype: type = np.float32) -> csr_matrix:
    """Return cells whose i-th value is the count of gene i, as a matrix of cells x genes."""
    values = np.array([value for cell in cells for value in cell], dtype)
    genes = np.concatenate([np.arange(len(cell)) for cell in cells] or [np.empty(0, np.int64)])
    shape = (len(cells), max([1, *map(len, cells)]))
    return csr_matrix((values, genes.astype(np.int64), np.cumsum([0, *map(len, cells)])), shape)


@settings(deadline=None)
@given(values=st.one_of(COUNTS, REALS), n_bins=st.integers(2, 60))
def test_edges_equal_numpy_quantile_to_the_digit(values: list[float], n_bins: int) -> None:
    for dtype in (np.float32, np.float64):
        array = np.array(values, dtype)
        np.testing.assert_array_equal(quantile_edges(array, n_bins), np.quantile(array, np.linspace(0, 1, n_bins - 1)))


@settings(deadline=None, max_examples=50)
@given(values=st.one_of(COUNTS, REALS), n_bins=st.integers(2, 60))
def test_ranges_are_between_both_sides_of_digitize(values: list[float], n_bins: int) -> None:
    array = np.array(values)
    edges = np.quantile(array, np.linspace(0, 1, n_bins - 1))
    left, right = np.digitize(array, edges), np.digitize(array, edges, right=True)
    lowest, highest = bin_ranges(array, n_bins)
    for k in range(len(array)):
        possible = {
            int(np.ceil(draw * (right[k] - left[k]) + left[k])) for draw in np.linspace(0, 1, 200, endpoint=False)
        }
        assert (lowest[k], highest[k]) == (min(possible), max(possible))
        assert 1 <= lowest[k] <= highest[k] <= n_bins - 1


@settings(deadline=None, max_examples=60)
@given(cells=CELLS, n_bins=st.sampled_from([2, 3, 11, 51]), ties=st.sampled_from(get_args(Ties)))
def test_kernel_and_numpy_agree_to_the_bit(cells: list[list[float]], n_bins: int, ties: Ties) -> None:
    counts = _matrix(cells)
    compiled = bin_cells(counts, n_bins=n_bins, ties=ties)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing_scgpt, "COMPILED", False)
        plain = bin_cells(counts, n_bins=n_bins, ties=ties)
    keys = cell_keys(np.arange(len(cells)), seed=0, epoch=0, purpose=TIES)
    expected = [
        bin_cell(counts.data[start:stop], counts.indices[start:stop], keys[cell : cell + 1], n_bins, ties)
        for cell, (start, stop) in enumerate(pairwise(counts.indptr))
        if start < stop
    ]
    assert compiled.dtype == plain.dtype == np.float32
    np.testing.assert_array_equal(compiled.data, plain.data)
    np.testing.assert_array_equal(compiled.data, np.concatenate([np.empty(0, np.float32), *expected]))


def test_every_choice_of_ties_stays_in_the_range(engine: Binning) -> None:
    counts = _matrix([[1, 1, 1, 2, 2, 5, 9], [7.5], [3, 3, 3, 3]])
    bins = {ties: engine(counts, n_bins=51, ties=ties).data for ties in get_args(Ties)}
    for start, stop in pairwise(counts.indptr):
        lowest, highest = bin_ranges(counts.data[start:stop], 51)
        np.testing.assert_array_equal(bins["lower"][start:stop], lowest)
        np.testing.assert_array_equal(bins["upper"][start:stop], highest)
        np.testing.assert_array_equal(bins["midpoint"][start:stop], (lowest + highest) // 2)
        assert (lowest <= bins["random"][start:stop]).all()
        assert (bins["random"][start:stop] <= highest).all()


def test_random_ties_are_uniform_over_the_coinciding_edges(engine: Binning) -> None:
    n_cells = 3000
    counts = _matrix([[2, 2, 2, 2]] * n_cells)  # all edges coincide: bins 1 to 10 are possible
    observed = np.bincount(engine(counts, n_bins=11, ties="random").data.astype(int), minlength=11)[1:]
    assert observed.sum() == 4 * n_cells
    assert ((observed - 1200.0) ** 2 / 1200).sum() < 27.9  # chi square, 9 degrees of freedom, 99.9 %


def test_the_bins_of_a_cell_do_not_depend_on_other_cells(engine: Binning) -> None:
    counts = _matrix([[1, 1, 3, 2, 2], [4, 1, 1, 1], [6000, 1, 1, 2], [0.5, 0.5, 1.5]])
    together = engine(counts, n_bins=51, ties="random")
    for cell in range(counts.shape[0]):
        single = engine(counts[cell], n_bins=51, ties="random", cell_ids=np.array([cell]))
        np.testing.assert_array_equal(single.data, together[cell].data)


@settings(deadline=None)
@given(values=st.lists(st.integers(1, 40), min_size=1, max_size=80), total=st.integers(100, 10_000))
def test_normalizing_and_log1p_do_not_change_bins(values: list[int], total: int) -> None:
    counts = np.array(values, np.float64)
    assume(len(values) % 7 != 1)  # otherwise rounding decides whether an edge equals a value (49 = 7 · 7 steps)
    raw, normalized = (bin_ranges(array, 51) for array in (counts, np.log1p(counts * 1e4 / total)))
    np.testing.assert_array_equal(raw, normalized)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_and_whole_floats_beyond_the_table_agree(engine: Binning, dtype: type) -> None:
    small = engine(_matrix([[1, 2, 2, 3, 4095]], dtype), n_bins=51, ties="random")
    large = engine(_matrix([[1, 2, 2, 3, 4096]], dtype), n_bins=51, ties="random")  # the sorting path
    np.testing.assert_array_equal(small.data, large.data)


def test_empty_input_has_no_bins(engine: Binning) -> None:
    assert engine(_matrix([]), n_bins=51, ties="random").nnz == 0
    assert engine(_matrix([[], []]), n_bins=51, ties="random").nnz == 0
