"""Compiled sampling: select the k genes of a cell with the lowest random words.

Both tasks that need a random subset use it: keeping at most `max_tokens` genes of a cell, and masking a share of them.
The words are those of `randomness_scgpt`, so the subset is uniform and the same in every batch.

This module also defines how kernels are compiled. Without numba `COMPILED` is False, and plain numpy code next to each
caller gives the same results, more slowly.
"""

import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any, TypeVar, cast

import numpy as np

from .randomness_scgpt import GOLDEN_GAMMA, mix_bits

try:
    from numba import config, njit

    COMPILED = True
except ImportError:
    COMPILED = False

Array = Any  # an array argument of a kernel; numba compiles one version for each dtype
ONE = np.uint64(1)
_LARGEST_WORD = np.uint64(2**64 - 1)
_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """Compile a function with numba at its first call; it then runs without the GIL.

    numba caches the machine code in `NUMBA_CACHE_DIR`, next to this file, or in the user's cache folder. If none of
    them is writable, it is cached in a private folder for temporary files, and without that not at all. numba renews
    the cache when the file of the function changes, but not when a kernel in another file does: after changing this
    file, delete `__pycache__`.

    Returns:
        The compiled function, or the function itself if numba is not installed.
    """
    if not COMPILED:
        return function
    try:
        return cast(_F, njit(nogil=True, cache=True)(function))
    except RuntimeError:  # numba found no writable folder for its cache
        config.CACHE_DIR = _temporary_cache() or config.CACHE_DIR  # type: ignore[attr-defined]
    try:
        return cast(_F, njit(nogil=True, cache=True)(function))
    except RuntimeError:
        return cast(_F, njit(nogil=True)(function))


@cache
def _temporary_cache() -> str | None:
    """Return a folder for temporary files to which no other user can write, or None; as in `cells/compiled.py`."""
    try:
        folder = Path(gettempdir(), f"scgpt_hf-numba-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    # numba unpickles the files of its cache, so a folder that another user made in advance must not be used.
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return str(folder) if private else None


_mix_bits = compiled(mix_bits)


@compiled
def random_word(key: Any, gene: Any) -> Any:
    """Compute what `random_words` returns for one gene."""
    return _mix_bits(key + GOLDEN_GAMMA * (np.uint64(gene) + ONE))


@compiled
def fill_random_words(key: Any, genes: Array, words: Array) -> None:
    """Fill `words` with the random word of each gene of one cell."""
    for i in range(len(genes)):
        words[i] = random_word(key, genes[i])


@compiled
def find_threshold(words: Array, k: int) -> Any:
    """Find a threshold such that exactly k words are less than or equal to it; 1 ≤ k ≤ len(words).

    The words are uniform, so the position of the k-th lowest can be guessed by interpolation. Each guess is checked by
    counting the words up to it, which the compiler vectorizes. Four guesses suffice on average, which is faster than
    sorting or partitioning. If words repeat, more than k words may lie at or below the threshold; the words of one cell
    never repeat.
    """
    low, high, n_low, n_high = np.uint64(0), _LARGEST_WORD, 0, len(words)  # n_low words ≤ low, n_high words ≤ high
    while n_high > k and high - low > ONE:
        share = (k - n_low + 0.5) / (n_high - n_low + 1.0)
        guess = min(low + np.uint64(max(float(high - low) * share, 1.0)), high - ONE)
        n = 0
        for i in range(len(words)):  # an index loop over `words`: the compiler then compares several words at once
            n += words[i] <= guess
        if n < k:
            low, n_low = guess, n
        else:
            high, n_high = guess, n
    return high


@compiled
def keep_lowest(genes: Array, values: Array, n: int, limit: int, key: Any, words: Array) -> int:
    """Keep the `limit` genes of a cell with the lowest random words, in their order, and return their number.

    Args:
        genes: vocabulary ids; the first n are used, and overwritten by those that are kept.
        values: value of each gene, treated alike.
        n: number of genes of the cell.
        limit: largest number of genes to keep.
        key: key of the cell.
        words: workspace for n words.
    """
    if n <= limit:
        return n
    fill_random_words(key, genes[:n], words)
    threshold = find_threshold(words[:n], limit)
    k = np.uint64(0)  # unsigned, so that numba does not test for negative indices
    for i in range(n):
        # Write without a branch: an entry that is not kept is overwritten by the next one, because k stays.
        genes[k], values[k] = genes[i], values[i]
        k += np.uint64(words[i] <= threshold)
    return limit


@compiled
def mask_cells(
    genes: Array, values: Array, starts: Array, stops: Array, keys: Array, n_masked: Array, mask_value: float,
    ignore: float, masked_values: Array, labels: Array,
) -> None:  # fmt: skip
    """Mask the `n_masked` tokens with the lowest random words of each cell.

    Args:
        genes: vocabulary ids of all tokens. Shape (tokens,).
        values: their values. Shape (tokens,).
        starts: offset of the first token of each cell that may be masked. Shape (cells,).
        stops: offset after the last token of each cell. Shape (cells,).
        keys: key of each cell. Shape (cells,).
        n_masked: number of tokens to mask in each cell. Shape (cells,).
        mask_value: value of a masked token.
        ignore: label of a token that is not masked.
        masked_values: output: `mask_value` where masked, `values` elsewhere. Shape (tokens,).
        labels: output: `values` where masked, `ignore` elsewhere. Shape (tokens,).
    """
    widest = 1
    for cell in range(len(n_masked)):
        widest = max(widest, stops[cell] - starts[cell])
    words = np.empty(widest, np.uint64)
    done = 0
    for cell in range(len(n_masked)):
        for i in range(done, starts[cell]):  # `<cls>`
            masked_values[i], labels[i] = values[i], ignore
        start, done = starts[cell], stops[cell]
        n, own = done - start, values[start:done]
        own_masked, own_labels = masked_values[start:done], labels[start:done]
        if n_masked[cell] == 0:
            for i in range(n):
                own_masked[i], own_labels[i] = own[i], ignore
            continue
        fill_random_words(keys[cell], genes[start:done], words)
        threshold = find_threshold(words[:n], n_masked[cell])
        for i in range(n):
            own_masked[i] = mask_value if words[i] <= threshold else own[i]
            own_labels[i] = own[i] if words[i] <= threshold else ignore
