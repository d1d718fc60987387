"""Quantile binning: replace the count of each expressed gene by its rank class within the cell.

The depth of sequencing differs between cells, so raw counts are not comparable. scGPT therefore divides the expressed
genes of each cell into `n_bins` − 1 classes of equal size: bin 1 holds the lowest counts of the cell, the last bin the
highest. Bin 0 means "not expressed".

Example with `n_bins=5`, that is, four classes. The edges are the quantiles 0, 1/3, 2/3 and 1 of the cell's counts:

    counts   1  2  3  4  5  6  7          edges 1, 3, 5, 7
    bins     1  1  2  2  3  3  4          the number of edges that are not above the count

*Ties* are the difficult part. Most counts of a cell are 1, so many edges coincide:

    counts   1  1  1  1  1  2  9          edges 1, 1, 1, 9

A count of 1 equals three edges, so it belongs to any of the bins 1 to 3. `ties` decides: `random` draws one of them for
each gene, which is what scGPT does; `midpoint` takes the middle one; `lower` and `upper` take the ends.

This module states the rule in plain numpy, one cell at a time. `kernels_scgpt` computes the same numbers, bit for bit,
for many cells. `tokenizing_scgpt` decides which genes are binned.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from .randomness_scgpt import Int64Array, UInt64Array, random_words

Ties = Literal["random", "midpoint", "upper", "lower"]
Values = npt.NDArray[Any]  # uint16, float32 or float64; never converted, to save a copy

_HALF = np.uint64(32)


def quantile_levels(n_bins: int) -> npt.NDArray[np.float64]:
    """Return the `n_bins` − 1 equally spaced levels in [0, 1] of the bin edges."""
    return np.linspace(0.0, 1.0, n_bins - 1)


def quantile_edges(values: Values, n_bins: int) -> npt.NDArray[np.float64]:
    """Compute the bin edges of one cell: quantiles of its expressed values, linearly interpolated.

    Args:
        values: expressed values of one cell, > 0, in any order. Shape (genes,), genes ≥ 1.
        n_bins: number of bins, including the zero bin.

    Returns:
        Ascending edges, shape (n_bins − 1,). The first is the smallest value, the last the largest.

    Source: `numpy.quantile(method="linear")`, written out so that no digit depends on the version of numpy.
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
    """Compute the lowest and the highest bin of each value of one cell; they differ only where edges coincide.

    Source: both sides of `np.digitize`, as in bowang-lab/scGPT:scgpt/preprocess.py:239.
    """
    edges = quantile_edges(values, n_bins)
    highest = np.searchsorted(edges, values, side="right")
    return np.minimum(np.searchsorted(edges, values, side="left") + 1, highest), highest


def bin_cell(values: Values, genes: npt.NDArray[np.integer], key: UInt64Array, n_bins: int, ties: Ties) -> Values:
    """Replace each expressed value of one cell by its quantile bin.

    Bins are relative: bin 5 of two cells is the same rank, not the same count. A monotone transform of a cell's values,
    such as normalizing and taking the logarithm, does not change its bins.

    Args:
        values: expressed values of one cell, > 0. Shape (genes,), genes ≥ 1.
        genes: vocabulary ids. They select the random numbers of the ties. Shape (genes,).
        key: `cell_keys(..., purpose=TIES)` of the cell. Shape (1,).
        n_bins: number of bins, including the zero bin, so results lie in [1, n_bins − 1].
        ties: how to choose a bin where edges coincide. `midpoint` rounds down, because bins are integers.

    Returns:
        float32 bins in the order of `values`. Shape (genes,).

    Source: Cui et al. 2024, Nature Methods 21:1470 (value binning); `upper` is scGPT's one-sided variant.
    """
    lowest, highest = bin_ranges(values, n_bins)
    if ties == "random":
        n_choices = (highest - lowest + 1).astype(np.uint64)
        # 32 random bits times n, divided by 2³², are uniform on 0 .. n − 1, without a division.
        bins = lowest + (((random_words(key, genes) >> _HALF) * n_choices) >> _HALF).astype(np.int64)
    else:
        bins = {"midpoint": (lowest + highest) // 2, "upper": highest, "lower": lowest}[ties]
    return bins.astype(np.float32)
