"""Map predicted values back to counts, with the counts of the same cell: the inverse of `tokens/binning_scgpt.py`.

A bin is a rank within a cell, so a bin alone does not determine a count. But a cell that has genes at 1, 2 and 7 counts
shows which bins these counts fill; values between them are interpolated.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from scgpt_hf.cells.block import Float64Array
from scgpt_hf.tokens.binning_scgpt import bin_ranges


def bins_to_counts(bins: npt.NDArray[np.floating[Any]], counts: npt.NDArray[Any], n_bins: int) -> Float64Array:
    """Map predicted bins to raw counts, by interpolating between the counts observed in the same cell.

    Each distinct count of the cell fills a range of bins. A model that was trained on random ties predicts the middle
    of that range, so the middle is mapped to the count. Counts are interpolated between middles. Counts that share a
    bin are averaged over their genes. Below the first middle and above the last, where the cell has no data, the result
    is the smallest and the largest count.

    Args:
        bins: predicted bins, any real numbers. Shape (predictions,).
        counts: counts of the cell's expressed genes, > 0, at least one. Shape (genes,).
        n_bins: number of bins with the zero bin.

    Returns:
        Counts in [counts.min(), counts.max()], non-decreasing in `bins`. Shape (predictions,).

    Example:
        >>> bins_to_counts(np.array([1, 20, 40, 50]), counts=np.array([1, 1, 2, 7]), n_bins=51).round(2)
        array([1.  , 1.46, 4.06, 7.  ])
    """
    lowest, highest = bin_ranges(counts, n_bins)
    middles, middle_of_count = np.unique((lowest + highest) / 2, return_inverse=True)
    mean_counts = np.bincount(middle_of_count, weights=counts) / np.bincount(middle_of_count)
    result: Float64Array = np.interp(bins, middles, mean_counts)
    return result


def log1p_to_counts(values: npt.NDArray[np.floating[Any]], total: float, target_sum: float) -> Float64Array:
    """Map predicted log(1 + count · target_sum / total) of one cell to counts; values below 0 become 0 counts.

    Args:
        values: predicted values, any real numbers. Shape (predictions,).
        total: sum of the cell's counts over all genes of the data.
        target_sum: counts per cell to which the model's input is normalized.
    """
    counts: Float64Array = np.expm1(np.maximum(values, 0.0)) * (total / target_sum)
    return counts
