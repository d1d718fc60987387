"""Quantile bins: the rank class of each expressed gene within its own cell.

This file holds the rule, one cell at a time in plain numpy; `kernels_scgpt` computes the same numbers, to the bit, for
whole blocks. Which genes are binned is decided in `tokenizing_scgpt`.
"""

from itertools import pairwise
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .kernels_scgpt import TIE_CODES, bin_block
from .randomness_scgpt import Int64Array, UInt64Array, gene_words
from .sampling_scgpt import COMPILED

Ties = Literal["random", "midpoint", "upper", "lower"]
Values = npt.NDArray[Any]  # uint16, float32 or float64, kept as it comes

_HALF = np.uint64(32)  # half the bits of a word: the upper half times n, halved again, is uniform on 0..n − 1


def quantile_levels(n_bins: int) -> npt.NDArray[np.float64]:
    """Return the `n_bins` − 1 equally spaced levels in [0, 1] at which the edges lie."""
    return np.linspace(0.0, 1.0, n_bins - 1)


def quantile_edges(values: Values, n_bins: int) -> npt.NDArray[np.float64]:
    """Return the bin edges of one cell: quantiles of its expressed values, linearly interpolated.

    Args:
        values: expressed values of one cell, > 0, in any order. Shape (genes,), genes ≥ 1.
        n_bins: number of bins with the zero bin.

    Returns:
        Ascending edges, shape (n_bins − 1,); the first is the smallest value, the last the largest.

    Source: `numpy.quantile(method="linear")`, written out so that the digits do not depend on numpy's version.
    """
    ordered = np.sort(values)
    position = (len(values) - 1) * quantile_levels(n_bins)
    below = np.floor(position).astype(np.int64)
    weight = position - below
    lower, upper = ordered[below], ordered[np.minimum(below + 1, len(values) - 1)]
    gap = upper - lower
    edges: npt.NDArray[np.float64] = np.where(weight >= 0.5, upper - gap * (1.0 - weight), lower + gap * weight)
    return edges


def bin_ranges(values: Values, n_bins: int) -> tuple[Int64Array, Int64Array]:
    """Return the lowest and highest bin that each value of one cell may fall in; they differ only where edges coincide.

    Source: both sides of `np.digitize`, as in bowang-lab/scGPT:scgpt/preprocess.py:239.
    """
    edges = quantile_edges(values, n_bins)
    highest = np.searchsorted(edges, values, side="right")
    return np.minimum(np.searchsorted(edges, values, side="left") + 1, highest), highest


def bin_cell(values: Values, genes: npt.NDArray[np.integer], key: UInt64Array, n_bins: int, ties: Ties) -> Values:
    """Return the bins of one cell; arguments as in `bin_counts`, `key` of shape (1,)."""
    lowest, highest = bin_ranges(values, n_bins)
    if ties == "random":
        choices = (highest - lowest + 1).astype(np.uint64)
        bins = lowest + (((gene_words(key, genes) >> _HALF) * choices) >> _HALF).astype(np.int64)
    else:
        bins = {"midpoint": (lowest + highest) // 2, "upper": highest, "lower": lowest}[ties]
    return bins.astype(np.float32)


def bin_counts(
    values: Values, indptr: Int64Array, *, genes: Int64Array, keys: UInt64Array, n_bins: int, ties: Ties
) -> npt.NDArray[np.float32]:
    """Return each expressed gene's quantile bin within its own cell.

    Bins are relative: bin 5 of one cell and bin 5 of another share a rank, not a count. A monotone transform of a
    cell's values leaves them as they are. Where k + 1 edges coincide with a value (most counts are 1), the value may
    fall in any of k + 1 bins: `random` draws one uniformly, `midpoint` takes the middle (rounded down, since bins are
    whole), `upper` and `lower` the ends.

    Args:
        values: expressed values of all cells, end to end, > 0. Shape (tokens,).
        indptr: where each cell begins and ends. Shape (cells + 1,).
        genes: vocabulary ids, which key the draw. Shape (tokens,).
        keys: `cell_keys(..., purpose=TIES)`. Shape (cells,).
        n_bins: number of bins with the zero bin, so results lie in [1, n_bins − 1].
        ties: how to choose among coinciding edges.

    Returns:
        float32 bins, shape (tokens,), order kept.

    Raises:
        ValueError: a value is not a number > 0, or `n_bins` < 2, or `ties` is unknown.

    Source: Cui et al. 2024, Nature Methods 21:1470 (value binning); `upper` is scGPT's one-sided variant.
    """
    if ties not in TIE_CODES:
        raise ValueError(f"unknown ties {ties!r}; choose one of {', '.join(TIE_CODES)}")
    if n_bins < 2:
        raise ValueError(f"found n_bins={n_bins}; at least 2 are needed, one for zero and one for expressed genes")
    if values.size and not values.min() > 0:
        raise ValueError(f"expressed values must be > 0, found {values.min()}; drop unexpressed genes before binning")
    bins = np.empty(len(values), np.float32)
    if COMPILED:
        bin_block(values, indptr, genes.astype(np.int32), keys, quantile_levels(n_bins), TIE_CODES[ties], bins)
        return bins
    for cell, (start, stop) in enumerate(pairwise(indptr)):  # plain numpy is for machines without numba
        if stop > start:
            bins[start:stop] = bin_cell(values[start:stop], genes[start:stop], keys[cell : cell + 1], n_bins, ties)
    return bins
