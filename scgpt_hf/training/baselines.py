"""What a validation MSE means: the scores of simple predictors on the very positions the model is scored on.

Quantile bins are nearly uniform on 1 … n_bins - 1, so a raw MSE says little. Three predictors frame it: a constant, a
per-gene mean, and one that knows each cell's true ranks and misses only the noise with which ties were broken.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.tokens.packing_scgpt import IGNORE

Float64Array = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Baselines:
    """Mean squared errors in squared bins, over the masked positions of the validation cells.

    Attributes:
        constant_mse: of the mean bin of the training cells.
        gene_mean_mse: of each gene's mean bin over the training cells that express it; unseen genes get the constant.
        tie_floor_mse: of the middle of the bins a count may fall in: what is left to a predictor that knows every rank.
    """

    constant_mse: float
    gene_mean_mse: float
    tie_floor_mse: float


def sum_bins(batches: Iterable[Batch], vocab_size: int) -> Float64Array:
    """Return how often each gene was expressed and the sum of its bins, over unmasked batches.

    Args:
        batches: packed or padded, without masks.
        vocab_size: ids that `input_ids` may hold.

    Returns:
        Counts of tokens and sums of bins, shape (2, vocab_size), specials included.
    """
    sums = np.zeros((2, vocab_size))
    for batch in batches:
        ids, values = _flat(batch, "input_ids"), _flat(batch, "values")
        sums[0] += np.bincount(ids, minlength=vocab_size)
        sums[1] += np.bincount(ids, weights=values, minlength=vocab_size)
    return sums


def sum_errors(
    batches: Iterable[Batch], lowest: Iterable[Batch], highest: Iterable[Batch], bin_sums: Float64Array
) -> Float64Array:
    """Return the sums under `Baselines`: squared errors of the three predictors, and the number of masked positions.

    Args:
        batches: validation batches with labels, ties broken at random.
        lowest: the same batches with every tie in the lowest of its bins.
        highest: the same batches with every tie in the highest of its bins.
        bin_sums: of the training cells, as `sum_bins` returns; the specials' columns set to 0. Shape (2, vocab_size).

    Returns:
        Squared errors of constant, gene mean and middle, and positions. Shape (4,).
    """
    constant = bin_sums[1].sum() / max(bin_sums[0].sum(), 1)
    gene_mean = np.where(bin_sums[0] > 0, bin_sums[1] / np.maximum(bin_sums[0], 1), constant)
    sums = np.zeros(4)
    for batch, low, high in zip(batches, lowest, highest, strict=True):
        labels, middles = _flat(batch, "labels"), (_flat(low, "labels") + _flat(high, "labels")) / 2
        masked = labels != IGNORE
        bins, genes = labels[masked].astype(np.float64), _flat(batch, "input_ids")[masked]
        for row, guess in enumerate((constant, gene_mean[genes], middles[masked])):
            sums[row] += np.square(bins - guess).sum()
        sums[3] += len(bins)
    return sums


def baselines_from(sums: Float64Array) -> Baselines:
    """Return the baselines of the sums of all ranks, shape (4,).

    Raises:
        ValueError: no position was masked.
    """
    if not sums[3]:
        raise ValueError(
            "validation masked no position: its cells express too few genes for the mask ratios; hold out more cells"
        )
    return Baselines(*(float(total / sums[3]) for total in sums[:3]))


def _flat(batch: Batch, key: str) -> npt.NDArray[np.float32]:
    values = batch[key]
    assert isinstance(values, torch.Tensor)
    return values.numpy().ravel()
