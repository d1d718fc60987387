"""Compiled draws by counter-based numbers: which genes of a cell have the lowest, for sampling and for masking.

Also how anything here is compiled. Without numba, `COMPILED` is False and plain numpy beside each rule does the work.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numpy as np

from .randomness_scgpt import GOLDEN, scramble

try:
    from numba import njit

    COMPILED = True
except ImportError:
    COMPILED = False

Array = Any  # in kernels: a numpy array, on whose dtype numba specialises
ONE = np.uint64(1)
_LARGEST_WORD = np.uint64(2**64 - 1)
_F = TypeVar("_F", bound=Callable[..., Any])


def compiled(function: _F) -> _F:
    """Return the function compiled at its first call, without the GIL; kept on disk if there is a place to write to.

    What is kept is renewed when the function's own file changes, not when a kernel it calls does: after changing this
    file, remove `__pycache__`.
    """
    if not COMPILED:
        return function
    try:
        kernel: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no writable cache folder
        kernel = njit(nogil=True)(function)
    return cast(_F, kernel)


_scramble = compiled(scramble)


@compiled
def gene_word(key: Any, gene: Any) -> Any:
    """Return `gene_words` of one gene."""
    return _scramble(key + GOLDEN * (np.uint64(gene) + ONE))


@compiled
def draw_words(key: Any, genes: Array, words: Array) -> None:
    """Fill `words` with those of a cell's genes."""
    for i in range(len(genes)):
        words[i] = gene_word(key, genes[i])


@compiled
def _threshold(words: Array, k: int) -> Any:
    """Return a word that k of the words do not exceed, 1 ≤ k ≤ len(words).

    Words are uniform and not 0: where the k-th of them lies is guessed by interpolation and checked by counting, four
    times in the mean, which is faster than any sort. Where words repeat, more than k may not exceed it.
    """
    low, high, n_low, n_high = np.uint64(0), _LARGEST_WORD, 0, len(words)  # words ≤ low, words ≤ high
    while n_high > k and high - low > ONE:
        share = (k - n_low + 0.5) / (n_high - n_low + 1.0)
        guess = min(low + np.uint64(max(float(high - low) * share, 1.0)), high - ONE)
        n = 0
        for i in range(len(words)):  # by number: the compiler then counts several at once
            n += words[i] <= guess
        if n < k:
            low, n_low = guess, n
        else:
            high, n_high = guess, n
    return high


@compiled
def keep_lowest(genes: Array, values: Array, n: int, limit: int, key: Any, words: Array) -> int:
    """Keep the `limit` genes of a cell whose words are lowest, in order, and return how many there are."""
    if n <= limit:
        return n
    draw_words(key, genes[:n], words)
    threshold = _threshold(words[:n], limit)
    k = np.uint64(0)  # unsigned: no test for an index from the end
    for i in range(n):
        genes[k], values[k] = genes[i], values[i]
        k += np.uint64(words[i] <= threshold)
    return limit


@compiled
def hide_block(
    genes: Array, values: Array, starts: Array, stops: Array, keys: Array, n_hidden: Array, mask_value: float,
    ignore: float, seen: Array, labels: Array,
) -> None:  # fmt: skip
    """Hide the `n_hidden` tokens of each cell's starts..stops whose words are lowest.

    Fills `seen` with `mask_value` there and the values elsewhere, `labels` with the values there, `ignore` elsewhere.
    """
    widest = 1
    for cell in range(len(n_hidden)):
        widest = max(widest, stops[cell] - starts[cell])
    words = np.empty(widest, np.uint64)
    done = 0
    for cell in range(len(n_hidden)):
        for i in range(done, starts[cell]):
            seen[i], labels[i] = values[i], ignore
        start, done = starts[cell], stops[cell]
        n, here = done - start, values[start:done]
        seen_here, labels_here = seen[start:done], labels[start:done]
        if n_hidden[cell] == 0:
            for i in range(n):
                seen_here[i], labels_here[i] = here[i], ignore
            continue
        draw_words(keys[cell], genes[start:done], words)
        threshold = _threshold(words[:n], n_hidden[cell])
        for i in range(n):
            seen_here[i] = mask_value if words[i] <= threshold else here[i]
            labels_here[i] = here[i] if words[i] <= threshold else ignore
