"""The rules of `binning_scgpt` and `tokenizing_scgpt`, compiled over whole blocks of cells.

Each kernel releases the GIL, uses one thread, and gives the same bits as the plain numpy beside the rule; tests hold
them together.
"""

from typing import Any

import numpy as np

from .drawing_scgpt import ONE, Array, compiled, gene_word, keep_lowest

TIE_CODES = {"random": 0, "midpoint": 1, "upper": 2, "lower": 3}
_LARGEST_TABULATED = 4095  # counts up to here are binned by a table per count; larger or fractional values by sorting
_HALF_WORD = np.uint64(32)
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)  # times a power of two, its upper six bits tell which
_BIT_OF = np.zeros(64, np.int64)
for _bit in range(64):
    _BIT_OF[((0x03F79D71B4CB0A89 << _bit) & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit


@compiled
def _edge(lower: Any, upper: Any, weight: float) -> Any:
    gap = upper - lower
    return upper - gap * (1.0 - weight) if weight >= 0.5 else lower + gap * weight


@compiled
def _count_values(values: Array, histogram: Array) -> int:
    """Add how often each value occurs and return the largest, or add nothing and return −1 if one is not tabulated."""
    largest = 0
    for i in range(len(values)):
        count = int(values[i]) if values[i] <= _LARGEST_TABULATED else -1
        if count != values[i]:
            for j in range(i):
                histogram[int(values[j])] -= 1
            return -1
        histogram[count] += 1
        largest = max(largest, count)
    return largest


@compiled
def _edges_by_counting(n: int, histogram: Array, levels: Array, edges: Array) -> None:
    """Fill the quantiles of n whole values from how often each occurs."""
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


@compiled
def _edges_by_sorting(values: Array, levels: Array, edges: Array) -> None:
    ordered = np.sort(values)
    for k in range(len(levels)):
        position = (len(values) - 1) * levels[k]
        below = int(np.floor(position))
        edges[k] = _edge(ordered[below], ordered[min(below + 1, len(values) - 1)], position - below)


@compiled
def _find_edges(values: Array, levels: Array, edges: Array, tables: Array) -> int:
    """Fill the edges of a cell; for small whole values also the bins of each: lowest in tables[1], number in tables[2].

    Returns the largest value of the tables, or −1 if they were not filled. `tables`: int64 (3, _LARGEST_TABULATED + 1),
    first row zeros before and after.
    """
    largest = _count_values(values, tables[0])
    if largest < 0:
        _edges_by_sorting(values, levels, edges)
        return -1
    _edges_by_counting(len(values), tables[0], levels, edges)
    n_less = n_less_equal = 0
    for count in range(largest + 1):
        while n_less < len(edges) and edges[n_less] < count:
            n_less += 1
        n_less_equal = max(n_less, n_less_equal)
        while n_less_equal < len(edges) and edges[n_less_equal] <= count:
            n_less_equal += 1
        lowest = min(n_less + 1, n_less_equal)
        tables[0, count], tables[1, count], tables[2, count] = 0, lowest, n_less_equal - lowest + 1
    return largest


@compiled
def _assign_bins(
    values: Array, genes: Array, key: Any, ties: int, edges: Array, tables: Array, largest: int, bins: Array
) -> None:
    """Fill the bin of each value, 0 for 0; `edges`, `tables` and `largest` as `_find_edges` left them."""
    for i in range(len(values)):
        if largest >= 0:
            lowest, n_choices = tables[1, int(values[i])], tables[2, int(values[i])]
        else:
            n_less, n_more = 0, len(edges)  # by bisection: edges below the value; then those equal to it
            while n_less < n_more:
                middle = (n_less + n_more) // 2
                if edges[middle] < values[i]:
                    n_less = middle + 1
                else:
                    n_more = middle
            highest = n_less
            while highest < len(edges) and edges[highest] <= values[i]:
                highest += 1
            lowest = min(n_less + 1, highest)
            n_choices = highest - lowest + 1
        if ties == 0:
            step = int(((gene_word(key, genes[i]) >> _HALF_WORD) * np.uint64(n_choices)) >> _HALF_WORD)
        elif ties == 1:
            step = (n_choices - 1) // 2
        else:
            step = n_choices - 1 if ties == 2 else 0
        bins[i] = lowest + step


@compiled
def bin_block(values: Array, indptr: Array, genes: Array, keys: Array, levels: Array, ties: int, bins: Array) -> None:
    """Fill `bins` as `bin_counts` says."""
    tables, edges = np.zeros((3, _LARGEST_TABULATED + 1), np.int64), np.empty(len(levels))
    for cell in range(len(indptr) - 1):
        part = slice(indptr[cell], indptr[cell + 1])
        if part.stop > part.start:
            largest = _find_edges(values[part], levels, edges, tables)
            _assign_bins(values[part], genes[part], keys[cell], ties, edges, tables, largest, bins[part])


@compiled
def _gather_cell(
    columns: Array, counts: Array, gene_ids: Array, present: Array, by_gene: Array, genes: Array, values: Array
) -> int:
    """Fill the known expressed genes of a cell by ascending id, and return how many; `present` is left all zero.

    Returns −1 if the columns do not ascend, or repeat.
    """
    n, last, last_column, ascending = 0, -1, -1, True
    for i in range(len(columns)):
        if columns[i] <= last_column:
            return -1
        last_column = columns[i]
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
        present[genes[i] >> 6] |= ONE << np.uint64(genes[i] & 63)
    n = 0
    for word in range(len(present)):
        bits = present[word]
        present[word] = np.uint64(0)
        while bits:
            lowest = bits & (~bits + ONE)
            gene = (word << 6) + _BIT_OF[(lowest * _DE_BRUIJN) >> np.uint64(58)]
            genes[n], values[n] = gene, by_gene[gene]
            n += 1
            bits ^= lowest
    return n


@compiled
def _spread_zeros(zero_genes: Array, genes: Array, values: Array, n: int) -> int:
    """Widen a cell's n genes to all of `zero_genes`, with value 0 where new; from the end, so that no value is lost."""
    k = n - 1
    for i in range(len(zero_genes) - 1, -1, -1):
        if k >= 0 and genes[k] == zero_genes[i]:
            values[i] = values[k]
            k -= 1
        else:
            values[i] = 0
        genes[i] = zero_genes[i]
    return len(zero_genes)


@compiled
def tokenize_block(
    indptr: Array, columns: Array, counts: Array, gene_ids: Array, zero_genes: Array, n_vocab: int, levels: Array,
    ties: int, limit: int, tie_keys: Array, sampling_keys: Array, n_tokens: Array, input_ids: Array, token_values:
        Array,
) -> int:  # fmt: skip
    """Fill the tokens of a block, leaving room for `<cls>` before each cell; the rule is in `tokenizing_scgpt`.

    Returns the first cell whose columns do not ascend, or −1.
    """
    widest = len(zero_genes)
    for cell in range(len(indptr) - 1):
        widest = max(widest, indptr[cell + 1] - indptr[cell])
    present, by_gene = np.zeros((n_vocab >> 6) + 1, np.uint64), np.empty(n_vocab, counts.dtype)
    genes, values, words = np.empty(widest, np.int32), np.empty(widest, counts.dtype), np.empty(widest, np.uint64)
    tables, edges = np.zeros((3, _LARGEST_TABULATED + 1), np.int64), np.empty(len(levels))
    start = 0
    for cell in range(len(indptr) - 1):
        stored = slice(indptr[cell], indptr[cell + 1])
        n = _gather_cell(columns[stored], counts[stored], gene_ids, present, by_gene, genes, values)
        if n < 0:
            return cell
        n_tokens[cell] = 0
        if n == 0:
            continue
        largest = _find_edges(values[:n], levels, edges, tables) if len(levels) else 0
        if len(zero_genes):
            n = _spread_zeros(zero_genes, genes, values, n)
        n = keep_lowest(genes, values, n, limit, sampling_keys[cell], words)
        tokens = slice(start + 1, start + 1 + n)
        for i in range(n):  # slices are not assigned to, which numba takes seconds to compile
            input_ids[tokens.start + i], token_values[tokens.start + i] = genes[i], values[i]
        if len(levels):
            _assign_bins(values[:n], genes[:n], tie_keys[cell], ties, edges, tables, largest, token_values[tokens])
        n_tokens[cell] = n + 1
        start += n + 1
    return -1
