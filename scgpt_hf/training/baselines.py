"""Errors of simple predictors on the positions that the model is validated on.

Quantile bins are nearly uniform on 1 … n_bins - 1, so a mean squared error alone is hard to judge. Three predictors
give it a scale: a constant, the mean of each gene, and a predictor that knows the rank of every count in its cell and
misses only the random choice among the bins of tied counts.
"""

import math
from collections.abc import Callable, Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch

from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.data_module import DataModule

Float64Array = npt.NDArray[np.float64]

# Training cells that the gene means are computed on. This number keeps the error of the means below 0.1 bin, except for
# the rarest genes.
BASELINE_CELLS = 100_000


@dataclass(frozen=True)
class Baselines:
    """Mean squared errors of three predictors, in squared bins, over the masked positions of the validation cells.

    Attributes:
        constant_mse: error of the mean bin of the training cells.
        gene_mean_mse: error of each gene's mean bin over the training cells that express it. A gene that no training
            cell expresses gets the constant.
        tie_floor_mse: error of the middle of the bins that a count can fall into. No model can do better except by
            chance.
    """

    constant_mse: float
    gene_mean_mse: float
    tie_floor_mse: float


def measure_baselines(data_module: DataModule, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> Baselines:
    """Measure the baselines on the validation masks of a run, over all processes.

    Args:
        data_module: batches of the run.
        sum_over_ranks: adds up a float64 tensor over all processes.

    Raises:
        ValueError: no position of the validation cells is masked.
    """
    processor = data_module.processor
    with closing(prefetch(data_module.unmasked())) as batches:
        first = islice(batches, math.ceil(BASELINE_CELLS / data_module.first_plan.batch_size))
        bin_sums = sum_bins(first, processor.vocab_size)
    bin_sums[:, processor.tokenizer.all_special_ids] = 0
    low = high = processor.ties
    if processor.ties == "random":  # other rules are not random, and their floor is 0
        low, high = "lower", "upper"
    bin_sums = sum_over_ranks(torch.from_numpy(bin_sums)).numpy()
    errors = sum_errors(data_module.validation(), data_module.validation(low), data_module.validation(high), bin_sums)
    return baselines_from(sum_over_ranks(torch.from_numpy(errors)).numpy())


def sum_bins(batches: Iterable[Batch], vocab_size: int) -> Float64Array:
    """Count the tokens of each vocabulary id and add up their bins.

    Args:
        batches: packed or padded, without masks.
        vocab_size: number of vocabulary ids.

    Returns:
        Row 0 holds the number of tokens, row 1 the sum of their bins; special tokens included. Shape (2, vocab_size).
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
    """Add up the squared errors of the three predictors, and count the masked positions.

    Args:
        batches: validation batches with labels, ties broken at random.
        lowest: the same batches, with every tied count in the lowest of its bins.
        highest: the same batches, with every tied count in the highest of its bins.
        bin_sums: result of `sum_bins` for the training cells, with 0 for special tokens. Shape (2, vocab_size).

    Returns:
        Squared errors of constant, gene mean and middle of the bins, then the number of positions. Shape (4,).
    """
    constant = bin_sums[1].sum() / max(bin_sums[0].sum(), 1)
    gene_mean = np.where(bin_sums[0] > 0, bin_sums[1] / np.maximum(bin_sums[0], 1), constant)
    sums = np.zeros(4)
    for batch, low, high in zip(batches, lowest, highest, strict=True):
        labels, middles = _flat(batch, "labels"), (_flat(low, "labels") + _flat(high, "labels")) / 2
        masked = labels != IGNORE
        ids = _flat(batch, "label_ids" if "label_ids" in batch else "input_ids")  # masked genes may be no tokens
        bins, genes = labels[masked].astype(np.float64), ids[masked]
        for row, predicted in enumerate((constant, gene_mean[genes], middles[masked])):
            sums[row] += np.square(bins - predicted).sum()
        sums[3] += len(bins)
    return sums


def baselines_from(sums: Float64Array) -> Baselines:
    """Return the baselines for the sums of all processes, shape (4,).

    Raises:
        ValueError: no position is masked.
    """
    if not sums[3]:
        raise ValueError(
            "validation masks no position: its cells express too few genes for the mask ratios; hold out more cells"
        )
    return Baselines(*(float(total / sums[3]) for total in sums[:3]))


def _flat(batch: Batch, key: str) -> npt.NDArray[np.float32]:
    values = batch[key]
    assert isinstance(values, torch.Tensor)
    return values.numpy().ravel()
