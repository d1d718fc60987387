"""Quantile bins equal numpy's quantile and digitize, with and without numba."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scgpt_hf.tokens import binning_scgpt
from scgpt_hf.tokens.binning_scgpt import Ties, bin_counts, bin_ranges, quantile_edges
from scgpt_hf.tokens.randomness_scgpt import TIES, cell_keys

COUNTS = st.lists(st.one_of(st.integers(1, 6), st.integers(1, 6000)), min_size=1, max_size=60)
REALS = st.lists(st.floats(2**-10, 1e4, width=32), min_size=1, max_size=60)
CELLS = st.lists(st.one_of(COUNTS, REALS, st.just([])), max_size=6)
Binning = Callable[..., Any]


@pytest.fixture(params=["compiled", "numpy"])
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Binning:
    monkeypatch.setattr(binning_scgpt, "COMPILED", request.param == "compiled")
    return bin_counts


def _arguments(cells: list[list[float]], dtype: type = np.float32) -> dict[str, Any]:
    indptr = np.cumsum([0, *map(len, cells)])
    values = np.array([value for cell in cells for value in cell], dtype)
    genes = np.concatenate([np.arange(len(cell)) for cell in cells] or [np.empty(0, np.int64)])
    keys = cell_keys(np.arange(len(cells)), seed=3, epoch=1, purpose=TIES)
    return {"values": values, "indptr": indptr, "genes": genes.astype(np.int64), "keys": keys}


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
    block = _arguments(cells)
    compiled = bin_counts(**block, n_bins=n_bins, ties=ties)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(binning_scgpt, "COMPILED", False)
        plain = bin_counts(**block, n_bins=n_bins, ties=ties)
    assert compiled.dtype == plain.dtype == np.float32
    np.testing.assert_array_equal(compiled, plain)


def test_every_choice_of_ties_stays_in_the_range(engine: Binning) -> None:
    block = _arguments([[1, 1, 1, 2, 2, 5, 9], [7.5], [3, 3, 3, 3]])
    bins = {ties: engine(**block, n_bins=51, ties=ties) for ties in get_args(Ties)}
    for start, stop in pairwise(block["indptr"]):
        lowest, highest = bin_ranges(block["values"][start:stop], 51)
        np.testing.assert_array_equal(bins["lower"][start:stop], lowest)
        np.testing.assert_array_equal(bins["upper"][start:stop], highest)
        np.testing.assert_array_equal(bins["midpoint"][start:stop], (lowest + highest) // 2)
        assert (lowest <= bins["random"][start:stop]).all()
        assert (bins["random"][start:stop] <= highest).all()


def test_random_ties_are_uniform_over_the_coinciding_edges(engine: Binning) -> None:
    n_cells = 3000
    block = _arguments([[2, 2, 2, 2]] * n_cells)  # all edges coincide: bins 1 to 10 are possible
    observed = np.bincount(engine(**block, n_bins=11, ties="random").astype(int), minlength=11)[1:]
    assert observed.sum() == 4 * n_cells
    assert ((observed - 1200.0) ** 2 / 1200).sum() < 27.9  # chi square, 9 degrees of freedom, 99.9 %


def test_the_bins_of_a_cell_do_not_depend_on_other_cells(engine: Binning) -> None:
    cells = [[1, 1, 3, 2, 2], [4, 1, 1, 1], [6000, 1, 1, 2], [0.5, 0.5, 1.5]]
    together = _arguments(cells)
    bins = engine(**together, n_bins=51, ties="random")
    for cell, (start, stop) in enumerate(pairwise(together["indptr"])):
        single = {name: together[name][start:stop] for name in ("values", "genes")}
        single |= {"indptr": np.array([0, stop - start]), "keys": together["keys"][cell : cell + 1]}
        np.testing.assert_array_equal(engine(**single, n_bins=51, ties="random"), bins[start:stop])


@settings(deadline=None)
@given(values=st.lists(st.integers(1, 40), min_size=1, max_size=80), total=st.integers(100, 10_000))
def test_normalising_and_log1p_do_not_change_bins(values: list[int], total: int) -> None:
    counts = np.array(values, np.float64)
    assume(len(values) % 7 != 1)  # otherwise rounding decides whether an edge equals a value (49 = 7 · 7 steps)
    raw, normalized = (bin_ranges(array, 51) for array in (counts, np.log1p(counts * 1e4 / total)))
    np.testing.assert_array_equal(raw, normalized)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_counts_and_whole_floats_beyond_the_table_agree(engine: Binning, dtype: type) -> None:
    small = engine(**_arguments([[1, 2, 2, 3, 4095]], dtype), n_bins=51, ties="random")
    large = engine(**_arguments([[1, 2, 2, 3, 4096]], dtype), n_bins=51, ties="random")  # the sorting path
    np.testing.assert_array_equal(small, large)


def test_empty_input_has_no_bins(engine: Binning) -> None:
    assert engine(**_arguments([]), n_bins=51, ties="random").shape == (0,)
    assert engine(**_arguments([[], []]), n_bins=51, ties="random").shape == (0,)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ties": "middle"}, "unknown ties 'middle'"),
        ({"n_bins": 1}, "n_bins=1"),
        ({"values": np.array([1, 0], np.float32)}, "must be > 0, found 0"),
        ({"values": np.array([1, np.nan], np.float32)}, "must be > 0, found nan"),
    ],
)
def test_bad_input_raises(change: dict[str, Any], message: str) -> None:
    arguments = _arguments([[1, 2]]) | {"n_bins": 51, "ties": "random"}
    with pytest.raises(ValueError, match=message):
        bin_counts(**arguments | change)
