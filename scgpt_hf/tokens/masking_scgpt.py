"""Masking: which genes are hidden from the model, and what it reads in their place.

The model is trained to predict the values of masked genes. Their true values become `labels`; all other labels are
`IGNORE`. The label alone says which genes are masked, so no code compares `values` with `mask_value`.

Example, one cell of four genes, half of them masked:

    values  before  [0, 3, 1, 7, 5]         (the first is `<cls>`)
    values  after   [0, 3, −1, 7, −1]       (mask_value = −1)
    labels          [−100, −100, 1, −100, 5]
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .packing_scgpt import IGNORE, Tokens
from .randomness_scgpt import MASK_RATIO, MASKING, Int64Array, cell_keys, random_words, to_uniform
from .sampling_scgpt import COMPILED, mask_cells


def sample_mask_ratios(
    cell_ids: Int64Array, ratios: Sequence[float], *, seed: int, epoch: int
) -> npt.NDArray[np.float64]:
    """Sample one of `ratios` for each cell, uniformly. Shape (cells,).

    Raises:
        ValueError: `ratios` is empty or contains a number outside [0, 1].
    """
    choices = np.asarray(ratios, np.float64)
    if choices.ndim != 1 or not choices.size or not ((choices >= 0) & (choices <= 1)).all():
        raise ValueError(f"expected at least one mask ratio, each in [0, 1]; found {ratios!r}; try (0.25, 0.5, 0.75)")
    words = cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=MASK_RATIO)
    return choices[(to_uniform(words) * len(choices)).astype(np.int64)]


def mask_tokens(
    tokens: Tokens, ratios: npt.NDArray[np.float64], *, seed: int, epoch: int, mask_value: float, n_first: int = 1
) -> Tokens:
    """Mask exactly ⌊ratio × genes⌋ genes of each cell and return the tokens with their labels.

    Every subset of that size is equally likely. A cell with a single gene has none masked unless its ratio is 1.

    Args:
        tokens: tokens of all cells.
        ratios: share of genes to mask in each cell, in [0, 1]. Shape (cells,).
        seed: seed of the masks.
        epoch: epoch of the masks; each epoch masks other genes.
        mask_value: value that the model reads at a masked gene.
        n_first: number of tokens at the start of each cell that are never masked. 1 protects `<cls>`; with 0 it can be
            masked like a gene, as in the fine-tuning code of scGPT.

    Returns:
        New tokens with `values` masked and `labels` set; the input is not changed.

    Source: bowang-lab/scGPT:scgpt/tokenizer/gene_tokenizer.py:random_mask_value for the number of masked genes. Which
        genes are masked follows from our counter-based random numbers.
    """
    starts, stops = tokens.indptr[:-1] + n_first, tokens.indptr[1:]
    n_masked = np.floor(ratios * (stops - starts)).astype(np.int64)
    keys = cell_keys(tokens.cell_ids, seed=seed, epoch=epoch, purpose=MASKING)
    if COMPILED:
        values, labels = np.empty_like(tokens.values), np.empty_like(tokens.values)
        cells = starts, stops, keys, n_masked
        mask_cells(tokens.input_ids, tokens.values, *cells, float(mask_value), IGNORE, values, labels)
        return replace(tokens, values=values, labels=labels)
    masked = np.zeros(len(tokens.input_ids), np.bool_)
    for cell in np.flatnonzero(n_masked):  # a slow loop over cells, only for machines without numba
        own = slice(starts[cell], stops[cell])
        words = random_words(keys[cell : cell + 1], tokens.input_ids[own])
        masked[own] = words <= np.partition(words, n_masked[cell] - 1)[n_masked[cell] - 1]
    values = np.where(masked, np.float32(mask_value), tokens.values)
    return replace(tokens, values=values, labels=np.where(masked, tokens.values, np.float32(IGNORE)))
