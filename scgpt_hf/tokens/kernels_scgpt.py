"""The rules of `binning_scgpt`, `tokenizing_scgpt` and `masking_scgpt`, compiled over whole blocks of cells.

Each kernel releases the GIL, uses one thread, and gives the same bits as the plain numpy beside the rule; tests hold
them together. Without numba, `COMPILED` is False and numpy does the work.
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

TIE_CODES = {"random": 0, "midpoint": 1, "upper": 2, "lower": 3}
_LARGEST_TABULATED = 4095  # counts up to here are binned by a table per count; larger or fractional values by sorting
_BUCKET_SHIFT, _N_BUCKETS = np.uint64(54), 1024  # the upper ten bits of a word
_ONE, _UNUSED_BITS, _STEP = np.uint64(1), np.uint64(11), 2.0**-53
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)  # times a power of two, its upper six bits tell which
_BIT_OF = np.zeros(64, np.int64)
for _bit in range(64):
    _BIT_OF[((0x03F79D71B4CB0A89 << _bit) & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit
_F = TypeVar("_F", bound=Callable[..., Any])
Array = Any  # inside this file: a numpy array whose dtype numba specialises on


def _compiled(function: _F) -> _F:
    """Return the function compiled at its first call; kept on disk if there is a place to write to."""
    if not COMPILED:
        return function
    try:
        kernel: Any = njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no writable cache folder
        kernel = njit(nogil=True)(function)
    return cast(_F, kernel)


_scramble = _compiled(scramble)


@_compiled
def _gene_word(key: Any, gene: Any) -> Any:
    return _scramble(key + GOLDEN * (np.uint64(gene) + _ONE))


@_compiled
def _settle(lowest: int, highest: int, key: Any, gene: Any, ties: int) -> int:
    """Return one bin of lowest..highest; `ties` as in TIE_CODES."""
    if ties == 2 or lowest == highest:
        return highest
    if ties == 0:
        draw = np.float64(_gene_word(key, gene) >> _UNUSED_BITS) * _STEP
        return lowest + int(draw * (highest - lowest + 1))
    return (lowest + highest) // 2 if ties == 1 else lowest


@_compiled
def _edge(lower: Any, upper: Any, weight: float) -> Any:
    gap = upper - lower
    return upper - gap * (1.0 - weight) if weight >= 0.5 else lower + gap * weight


@_compiled
def _tabulate(histogram: Array, largest: int, n: int, levels: Array, lowest: Array, highest: Array) -> None:
    """Fill the bin range of each count 1..largest from its frequency in a cell of n genes; no sorting is needed."""
    edges = np.empty(len(levels))
    lower, upper, n_lower, n_upper = 0, 0, 0, 0  # n_lower: genes with a count ≤ lower
    for k in range(len(levels)):
        position = (n - 1) * levels[k]
        below = int(np.floor(position))
        while n_lower <= below:
            lower += 1
            n_lower += histogram[lower]
        if upper < lower:
            upper, n_upper = lower, n_lower
        while n_upper <= min(below + 1, n - 1):
            upper += 1
            n_upper += histogram[upper]
        edges[k] = _edge(float(lower), float(upper), position - below)
    n_less = 0
    for count in range(1, largest + 1):
        if histogram[count]:
            while n_less < len(edges) and edges[n_less] < count:
                n_less += 1
            n_less_equal = n_less
            while n_less_equal < len(edges) and edges[n_less_equal] <= count:
                n_less_equal += 1
            lowest[count], highest[count] = min(n_less + 1, n_less_equal), n_less_equal


@_compiled
def _bin_by_sorting(values: Array, genes: Array, key: Any, levels: Array, ties: int, bins: Array) -> None:
    n = len(values)
    ordered = np.sort(values)
    edges = np.empty(len(levels))
    for k in range(len(levels)):
        position = (n - 1) * levels[k]
        below = int(np.floor(position))
        edges[k] = _edge(ordered[below], ordered[min(below + 1, n - 1)], position - below)
    for i in range(n):
        highest = np.searchsorted(edges, values[i], side="right")
        lowest = min(np.searchsorted(edges, values[i], side="left") + 1, highest)
        bins[i] = _settle(lowest, highest, key, genes[i], ties)


@_compiled
def _bin_cell(values: Array, genes: Array, key: Any, levels: Array, ties: int, tables: Array, bins: Array) -> None:
    """Fill the bins of one cell. `tables`: zeros, int64 (3, _LARGEST_TABULATED + 1); left as zeros in the first row."""
    largest = 0
    for value in values:
        count = int(value) if value <= _LARGEST_TABULATED else -1
        if count != value:
            _bin_by_sorting(values, genes, key, levels, ties, bins)
            return
        largest = max(largest, count)
    histogram, lowest, highest = tables[0], tables[1], tables[2]
    for value in values:
        histogram[int(value)] += 1
    _tabulate(histogram, largest, len(values), levels, lowest, highest)
    for i in range(len(values)):
        count = int(values[i])
        bins[i] = _settle(lowest[count], highest[count], key, genes[i], ties)
    histogram[: largest + 1] = 0


@_compiled
def _smallest(words: Array, k: int) -> Any:
    """Return the k-th smallest word, k ≥ 1. Words are uniform, so a bucket of 1/1024 of their range holds very few."""
    sizes = np.zeros(_N_BUCKETS, np.int64)
    for word in words:
        sizes[word >> _BUCKET_SHIFT] += 1
    bucket, n_before = 0, 0
    while n_before + sizes[bucket] < k:
        n_before += sizes[bucket]
        bucket += 1
    inside = np.empty(sizes[bucket], np.uint64)
    n = 0
    for word in words:
        if word >> _BUCKET_SHIFT == np.uint64(bucket):
            inside[n] = word
            n += 1
    return np.sort(inside)[k - n_before - 1]


@_compiled
def bin_block(values: Array, indptr: Array, genes: Array, keys: Array, levels: Array, ties: int, bins: Array) -> None:
    """Fill `bins` as `bin_counts` says."""
    tables = np.zeros((3, _LARGEST_TABULATED + 1), np.int64)
    for cell in range(len(indptr) - 1):
        part = slice(indptr[cell], indptr[cell + 1])
        if part.stop > part.start:
            _bin_cell(values[part], genes[part], keys[cell], levels, ties, tables, bins[part])


@_compiled
def choose_block(genes: Array, starts: Array, stops: Array, keys: Array, n_chosen: Array, chosen: Array) -> None:
    """Set `chosen` at the `n_chosen` tokens of each cell's starts..stops whose words are lowest; leave the rest."""
    widest = 1
    for cell in range(len(n_chosen)):
        widest = max(widest, stops[cell] - starts[cell])
    words = np.empty(widest, np.uint64)
    for cell in range(len(n_chosen)):
        start, n = starts[cell], stops[cell] - starts[cell]
        if n_chosen[cell] == 0:
            continue
        for i in range(n):
            words[i] = _gene_word(keys[cell], genes[start + i])
        threshold = _smallest(words[:n], n_chosen[cell])
        for i in range(n):
            chosen[start + i] = words[i] <= threshold


@_compiled
def _gather_cell(
    columns: Array, counts: Array, gene_ids: Array, present: Array, by_gene: Array, genes: Array, values: Array
) -> int:
    """Fill the known expressed genes of a cell by ascending id, and return how many; `present` is left all zero."""
    n, last, ascending = 0, -1, True
    for i in range(len(columns)):
        gene = gene_ids[columns[i]]
        if gene >= 0 and counts[i] > 0:
            genes[n], values[n] = gene, counts[i]
            ascending &= gene > last
            last = gene
            n += 1
    if ascending:
        return n
    for i in range(n):  # sort by marking ids in the bitmap and reading it back in order
        by_gene[genes[i]] = values[i]
        present[genes[i] >> 6] |= _ONE << np.uint64(genes[i] & 63)
    n = 0
    for word in range(len(present)):
        bits = present[word]
        present[word] = np.uint64(0)
        while bits:
            lowest = bits & (~bits + _ONE)
            gene = (word << 6) + _BIT_OF[(lowest * _DE_BRUIJN) >> np.uint64(58)]
            genes[n], values[n] = gene, by_gene[gene]
            n += 1
            bits ^= lowest
    return n


@_compiled
def count_block(indptr: Array, columns: Array, counts: Array, gene_ids: Array, n_known: Array) -> bool:
    """Fill the number of known expressed genes of each cell; return whether columns ascend in each, without repeats."""
    canonical = True
    for cell in range(len(n_known)):
        n, last = 0, -1
        for i in range(indptr[cell], indptr[cell + 1]):
            column = columns[i]
            canonical &= column > last
            last = column
            n += gene_ids[column] >= 0 and counts[i] > 0
        n_known[cell] = n
    return canonical


@_compiled
def tokenize_block(
    indptr: Array, columns: Array, counts: Array, gene_ids: Array, zero_genes: Array, n_vocab: int, levels: Array, ties:
        int,
    tie_keys: Array, sampling_keys: Array, token_indptr: Array, input_ids: Array, token_values: Array,
) -> None:  # fmt: skip
    """Fill the tokens of a block but the first of each cell, which is `<cls>`; the rule is in `tokenizing_scgpt`."""
    widest = len(zero_genes)
    for cell in range(len(indptr) - 1):
        widest = max(widest, indptr[cell + 1] - indptr[cell])
    present, by_gene = np.zeros((n_vocab >> 6) + 1, np.uint64), np.empty(n_vocab, counts.dtype)
    genes, values = np.empty(widest, np.int32), np.empty(widest, counts.dtype)
    bins, words = np.empty(widest, np.float32), np.empty(widest, np.uint64)
    tables = np.zeros((3, _LARGEST_TABULATED + 1), np.int64)
    for cell in range(len(indptr) - 1):
        start, limit = token_indptr[cell] + 1, token_indptr[cell + 1] - token_indptr[cell] - 1
        if limit <= 0:
            continue
        stored = slice(indptr[cell], indptr[cell + 1])
        n = _gather_cell(columns[stored], counts[stored], gene_ids, present, by_gene, genes, values)
        if len(levels):
            _bin_cell(values[:n], genes[:n], tie_keys[cell], levels, ties, tables, bins[:n])
        else:
            bins[:n] = values[:n]
        if len(zero_genes):
            k = n - 1
            for i in range(len(zero_genes) - 1, -1, -1):  # from the end, so nothing is overwritten before it is read
                expressed = k >= 0 and genes[k] == zero_genes[i]
                bins[i] = bins[k] if expressed else np.float32(0)
                k -= expressed
            n = len(zero_genes)
            genes[:n] = zero_genes
        threshold = ~np.uint64(0)
        if n > limit:
            for i in range(n):
                words[i] = _gene_word(sampling_keys[cell], genes[i])
            threshold = _smallest(words[:n], limit)
        for i in range(n):
            if n <= limit or words[i] <= threshold:
                input_ids[start], token_values[start] = genes[i], bins[i]
                start += 1
