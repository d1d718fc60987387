"""Which genes are hidden from the model, and what it sees in their place.

The hidden value travels as a label; nothing later compares `values` with a sentinel.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .drawing_scgpt import COMPILED, choose_block, hide_block
from .packing_scgpt import IGNORE, Tokens
from .randomness_scgpt import MASK_RATIO, MASKING, Int64Array, cell_keys, gene_words, uniform


def draw_ratios(cell_ids: Int64Array, ratios: Sequence[float], *, seed: int, epoch: int) -> npt.NDArray[np.float64]:
    """Return one of `ratios` per cell, uniformly. Shape (cells,).

    Raises:
        ValueError: there is no ratio, or one is not in [0, 1].
    """
    choices = np.asarray(ratios, np.float64)
    if choices.ndim != 1 or not choices.size or not ((choices >= 0) & (choices <= 1)).all():
        raise ValueError(
            f"expected mask ratios in [0, 1], at least one, found {ratios!r}; for example (0.25, 0.5, 0.75)"
        )
    words = cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=MASK_RATIO)
    return choices[(uniform(words) * len(choices)).astype(np.int64)]


def choose_masked(
    tokens: Tokens, ratios: npt.NDArray[np.float64], *, seed: int, epoch: int, n_first: int = 1
) -> npt.NDArray[np.bool_]:
    """Return where to mask: exactly ⌊ratio × genes⌋ tokens of each cell, uniformly.

    Args:
        tokens: cells end to end.
        ratios: share to mask of each cell, in [0, 1]. Shape (cells,).
        seed: changes the choice.
        epoch: the same.
        n_first: tokens at the start of each cell that are never masked: `<cls>`. 0 lets it be masked like a gene, which
            is what the fine-tuning code of scGPT does.

    Returns:
        Shape (tokens,). A cell with a single gene has none masked unless its ratio is 1.

    Source: bowang-lab/scGPT:scgpt/tokenizer/gene_tokenizer.py:random_mask_value (the share); the choice by keys is
        ours.
    """
    starts, stops = tokens.indptr[:-1] + n_first, tokens.indptr[1:]
    n_masked = np.floor(ratios * (stops - starts)).astype(np.int64)
    keys = cell_keys(tokens.cell_ids, seed=seed, epoch=epoch, purpose=MASKING)
    masked = np.zeros(len(tokens.input_ids), np.bool_)
    if COMPILED:
        choose_block(tokens.input_ids, starts, stops, keys, n_masked, masked)
        return masked
    for cell in np.flatnonzero(n_masked):  # plain numpy is for machines without numba
        part = slice(starts[cell], stops[cell])
        words = gene_words(keys[cell : cell + 1], tokens.input_ids[part])
        masked[part] = words <= np.partition(words, n_masked[cell] - 1)[n_masked[cell] - 1]
    return masked


def mask_tokens(tokens: Tokens, masked: npt.NDArray[np.bool_], *, mask_value: float) -> Tokens:
    """Return the tokens with `mask_value` where masked, and labels that say what was there."""
    if COMPILED:
        values, labels = np.empty_like(tokens.values), np.empty_like(tokens.values)
        hide_block(masked, tokens.values, float(mask_value), IGNORE, values, labels)
    else:
        values = np.where(masked, np.float32(mask_value), tokens.values)
        labels = np.where(masked, tokens.values, np.float32(IGNORE))
    return replace(tokens, values=values, labels=labels)
