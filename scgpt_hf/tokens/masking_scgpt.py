"""Which genes are hidden from the model, and what it sees in their place.

The hidden value travels as a label; nothing later compares `values` with a sentinel.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .packing_scgpt import IGNORE, Tokens
from .randomness_scgpt import MASK_RATIO, MASKING, Int64Array, cell_keys, gene_words, uniform
from .sampling_scgpt import COMPILED, hide_block


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


def mask_tokens(
    tokens: Tokens, ratios: npt.NDArray[np.float64], *, seed: int, epoch: int, mask_value: float, n_first: int = 1
) -> Tokens:
    """Return the tokens with exactly ⌊ratio × genes⌋ of each cell hidden, uniformly, and labels of what was there.

    A cell with a single gene has none hidden unless its ratio is 1.

    Args:
        tokens: cells end to end.
        ratios: share to hide of each cell, in [0, 1]. Shape (cells,).
        seed: changes the choice.
        epoch: the same.
        mask_value: what the model sees at hidden genes.
        n_first: tokens at the start of each cell that are never hidden: `<cls>`. 0 lets it be hidden like a gene, which
            is what the fine-tuning code of scGPT does.

    Source: bowang-lab/scGPT:scgpt/tokenizer/gene_tokenizer.py:random_mask_value (the share); the choice by keys is
        ours.
    """
    starts, stops = tokens.indptr[:-1] + n_first, tokens.indptr[1:]
    n_hidden = np.floor(ratios * (stops - starts)).astype(np.int64)
    keys = cell_keys(tokens.cell_ids, seed=seed, epoch=epoch, purpose=MASKING)
    if COMPILED:
        values, labels = np.empty_like(tokens.values), np.empty_like(tokens.values)
        how = starts, stops, keys, n_hidden, float(mask_value), IGNORE
        hide_block(tokens.input_ids, tokens.values, *how, values, labels)
        return replace(tokens, values=values, labels=labels)
    hidden = np.zeros(len(tokens.input_ids), np.bool_)
    for cell in np.flatnonzero(n_hidden):  # plain numpy is for machines without numba
        part = slice(starts[cell], stops[cell])
        words = gene_words(keys[cell : cell + 1], tokens.input_ids[part])
        hidden[part] = words <= np.partition(words, n_hidden[cell] - 1)[n_hidden[cell] - 1]
    values = np.where(hidden, np.float32(mask_value), tokens.values)
    return replace(tokens, values=values, labels=np.where(hidden, tokens.values, np.float32(IGNORE)))
