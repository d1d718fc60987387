"""Masked token batches of a given mean length, for steps that are timed without any data behind them."""

from typing import Any

import numpy as np

from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens

N_BINS, MASK_RATIOS = 51, (0.25, 0.5, 0.75)
SPREAD = 0.5  # log-normal, of lengths; blood cells with 1,200 variable genes have 0.5 to 0.6
ZIPF = 0.8  # a gene of rank r is drawn in proportion to r^-0.8, so that some rows of the table are busy


def draw_lengths(rng: np.random.Generator, n_cells: int, mean_tokens: float, max_tokens: int) -> np.ndarray:
    """Return log-normal tokens per cell, `<cls>` included, cut at `max_tokens`, whose mean is as asked. int64 (cells,).

    Raises:
        ValueError: the mean cannot be had below `max_tokens`.
    """
    if not 3 <= mean_tokens <= 0.95 * max_tokens:
        raise ValueError(f"expected a mean between 3 and {0.95 * max_tokens:.0f} tokens, found {mean_tokens}")
    drawn = rng.lognormal(0.0, SPREAD, n_cells)
    scale = mean_tokens
    for _ in range(50):
        scale *= mean_tokens / np.clip(drawn * scale, 3, max_tokens).mean()
    return np.clip(drawn * scale, 3, max_tokens).astype(np.int64)


def draw_tokens(
    rng: np.random.Generator, n_cells: int, mean_tokens: float, n_genes: int, max_tokens: int = 1201
) -> Tokens:
    """Return masked cells over a vocabulary of `n_genes` genes, then `<pad>` and `<cls>`.

    A gene may occur twice in a cell, which no kernel minds.
    """
    indptr = np.concatenate([[0], np.cumsum(draw_lengths(rng, n_cells, mean_tokens, max_tokens))])
    shares = np.cumsum(np.arange(1, n_genes + 1) ** -ZIPF)
    ids = np.searchsorted(shares, rng.random(indptr[-1]) * shares[-1]).astype(np.int64)
    ids[indptr[:-1]] = n_genes + 1
    bins = rng.integers(1, N_BINS, indptr[-1]).astype(np.float32)
    bins[indptr[:-1]] = 0
    ratio = np.repeat(rng.choice(MASK_RATIOS, n_cells), np.diff(indptr))
    hidden = rng.random(indptr[-1]) < ratio
    hidden[indptr[:-1]] = False
    values = np.where(hidden, np.float32(-1), bins)
    return Tokens(ids, values, np.where(hidden, bins, np.float32(IGNORE)), indptr, np.arange(n_cells))


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch in page-locked memory, as the trainer's loader hands it over."""
    return {key: value.pin_memory() if hasattr(value, "pin_memory") else value for key, value in batch.items()}
