"""Random masked batches of a given mean length, to time training steps without reading data."""

from typing import Any

import numpy as np

from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens

N_BINS, MASK_RATIOS = 51, (0.25, 0.5, 0.75)
SPREAD = 0.5  # log-normal spread of the lengths; blood cells with 1,200 variable genes have 0.5 to 0.6
ZIPF = 0.8  # the gene of rank r has probability r^-0.8, so that some embedding rows are used often, as in real data


def sample_lengths(rng: np.random.Generator, n_cells: int, mean_tokens: float, max_tokens: int) -> np.ndarray:
    """Sample log-normal numbers of tokens per cell, clipped to [3, max_tokens], with the given mean.

    Args:
        rng: random numbers.
        n_cells: number of cells.
        mean_tokens: mean number of tokens, `<cls>` included.
        max_tokens: highest number of tokens.

    Returns:
        int64, shape (cells,).

    Raises:
        ValueError: the mean is not possible with this `max_tokens`.
    """
    if not 3 <= mean_tokens <= 0.95 * max_tokens:
        raise ValueError(f"expected a mean between 3 and {0.95 * max_tokens:.0f} tokens, found {mean_tokens}")
    lengths = rng.lognormal(0.0, SPREAD, n_cells)
    scale = mean_tokens
    for _ in range(50):
        scale *= mean_tokens / np.clip(lengths * scale, 3, max_tokens).mean()
    return np.clip(lengths * scale, 3, max_tokens).astype(np.int64)


def sample_tokens(
    rng: np.random.Generator, n_cells: int, mean_tokens: float, n_genes: int, max_tokens: int = 1201
) -> Tokens:
    """Sample masked cells over a vocabulary of `n_genes` genes, followed by `<pad>` and `<cls>`.

    A gene may occur twice in a cell, which does not affect the speed.
    """
    indptr = np.concatenate([[0], np.cumsum(sample_lengths(rng, n_cells, mean_tokens, max_tokens))])
    shares = np.cumsum(np.arange(1, n_genes + 1) ** -ZIPF)
    ids = np.searchsorted(shares, rng.random(indptr[-1]) * shares[-1]).astype(np.int64)
    ids[indptr[:-1]] = n_genes + 1
    bins = rng.integers(1, N_BINS, indptr[-1]).astype(np.float32)
    bins[indptr[:-1]] = 0
    ratio = np.repeat(rng.choice(MASK_RATIOS, n_cells), np.diff(indptr))
    masked = rng.random(indptr[-1]) < ratio
    masked[indptr[:-1]] = False
    values = np.where(masked, np.float32(-1), bins)
    return Tokens(ids, values, np.where(masked, bins, np.float32(IGNORE)), indptr, np.arange(n_cells))


def pinned(batch: dict[str, Any]) -> dict[str, Any]:
    """Return the batch in page-locked memory, where the trainer also puts it before the copy to the GPU."""
    return {key: value.pin_memory() if hasattr(value, "pin_memory") else value for key, value in batch.items()}
