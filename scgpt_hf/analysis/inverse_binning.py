"""Predicted values back to counts, by what each cell itself shows: the inverse of `tokens/binning_scgpt.py`.

A bin is a rank within a cell, so no count belongs to it by itself. But a cell that shows genes at 1, 2 and 7 counts
says which bins these counts fill in it; what lies between them is interpolated.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from scgpt_hf.tokens.binning_scgpt import bin_ranges

Float64Array = npt.NDArray[np.float64]


def counts_of_bins(bins: npt.NDArray[np.floating[Any]], counts: npt.NDArray[Any], n_bins: int) -> Float64Array:
    """Return the counts that stand for predicted bins in one cell.

    Each count that the cell shows fills a range of bins, whose middle stands for it: that is what a model trained on
    random ties predicts. Between middles, counts are interpolated; counts that share a bin stand for it by their mean,
    over the genes that have them. Below the first middle and above the last, where the cell shows nothing, the smallest
    and the largest count are returned.

    Args:
        bins: predicted, any real number. Shape (genes asked,).
        counts: of the cell's expressed genes, > 0, at least one. Shape (genes,).
        n_bins: number of bins with the zero bin.

    Returns:
        Counts, in [counts.min(), counts.max()], not decreasing in `bins`. Shape (genes asked,).
    """
    lowest, highest = bin_ranges(counts, n_bins)
    middles, place = np.unique((lowest + highest) / 2, return_inverse=True)
    stands_for = np.bincount(place, weights=counts) / np.bincount(place)
    result: Float64Array = np.interp(bins, middles, stands_for)
    return result


def counts_of_log1p(values: npt.NDArray[np.floating[Any]], total: float, target_sum: float) -> Float64Array:
    """Return the counts behind predicted log(1 + count · target_sum / total) of one cell; values below 0 are 0 counts.

    Args:
        values: predicted, any real number. Shape (genes asked,).
        total: counts of the cell, over all genes of the data.
        target_sum: counts per cell to which the model's input is normalised.
    """
    counts: Float64Array = np.expm1(np.maximum(values, 0.0)) * (total / target_sum)
    return counts
