"""Compiled kernels: the rules of `binning_scgpt` and `tokenizing_scgpt` for many cells in one call.

Each kernel runs on one thread without the GIL and gives the same bits as the numpy code of the rule; tests compare
them. Per cell, `tokenize_cells` works in this order:

1. `_gather_cell` selects the known expressed genes.
2. `_find_edges` computes the bin edges from all of them.
3. `_insert_zeros` adds genes that are not expressed, if requested.
4. `keep_lowest` samples the genes of a cell that has too many. Binning comes later, but with the edges of step 2.
5. `_sort_by_gene` orders the genes by vocabulary id.
6. `_assign_bins` computes the bins of the genes that are left.

Three idioms recur. Loops write first and then advance an index by a boolean (`k += condition`), because a branch that
the processor cannot predict costs more than the write. Indices are unsigned, because numba tests signed ones for
Python's negative indexing. Several short loops replace a long one where the compiler can then vectorize them.
"""

from typing import Any

import numpy as np

from .sampling_scgpt import ONE, Array, compiled, fill_random_words, keep_lowest

TIE_CODES = {"random": 0, "midpoint": 1, "upper": 2, "lower": 3}  # kernels take numbers, not strings

# Counts up to here are binned by a table with an entry per count; cells with larger or fractional values by sorting.
_LARGEST_TABULATED = 4095
_N_HISTOGRAMS = 8
_HALF_WORD = np.uint64(32)

# The position of the only set bit of a word: multiplied by a De Bruijn sequence, each of the 64 powers of two has
# different upper six bits. They index this table. numba offers no function that counts trailing zeros.
_DE_BRUIJN = np.uint64(0x03F79D71B4CB0A89)
_BIT_POSITION = np.zeros(64, np.int64)
for _bit in range(64):
    _BIT_POSITION[((0x03F79D71B4CB0A89 << _bit) & 0xFFFFFFFFFFFFFFFF) >> 58] = _bit


@compiled
def _interpolate(lower: Any, upper: Any, weight: float) -> Any:
    """Interpolate linearly, in the same order of operations as numpy, so that all digits agree."""
    gap = upper - lower
    return upper - gap * (1.0 - weight) if weight >= 0.5 else lower + gap * weight


@compiled
def _count_values(values: Array, counts: Array, tables: Any) -> int:
    """Count how often each value occurs in a cell.

    Raw counts are small integers, so a histogram replaces sorting. Most counts are 1, and repeated additions to one
    number must wait for each other. Eight histograms, used in turn, avoid this wait. They are zero before and after.

    Args:
        values: expressed values of the cell.
        counts: output: the values as int32.
        tables: the histograms; output: the distinct values, ascending; output: the number of values up to each.

    Returns:
        The number of distinct values, or −1 if a value is fractional or larger than the table.
    """
    histograms, distinct, n_up_to = tables
    n_untabulated, beyond = 0, values.dtype.type(_LARGEST_TABULATED + 1)
    largest: Any = np.int32(0)
    for i in range(len(values)):
        count: Any = np.int32(min(values[i], beyond))
        n_untabulated += count != values[i]
        largest = max(largest, count)
        counts[i] = count
    if n_untabulated or largest > _LARGEST_TABULATED:
        return -1
    for i in range(len(values)):
        histograms[np.uint32((counts[i] << 3) | (i & 7))] += 1
    n_distinct, n = np.uint64(0), np.int64(0)
    for count in range(largest + 1):
        n_equal = np.int64(0)
        for histogram in range(_N_HISTOGRAMS):
            n_equal += histograms[(count << 3) + histogram]
            histograms[(count << 3) + histogram] = 0
        n += n_equal
        distinct[n_distinct], n_up_to[n_distinct] = count, n  # overwritten by the next count if there are none
        n_distinct += np.uint64(n_equal > 0)
    return int(n_distinct)


@compiled
def _edges_by_counting(n: int, distinct: Array, n_up_to: Array, levels: Array, edges: Array) -> None:
    """Fill `edges` with the quantiles of n values, which `_count_values` has counted.

    The k-th lowest value is the first distinct value with more than k values up to it. The levels ascend, so two
    indices that only move forward find all quantiles.
    """
    lower = upper = 0
    for k in range(len(levels)):
        position = (n - 1) * levels[k]
        below = int(np.floor(position))
        while n_up_to[lower] <= below:
            lower += 1
        upper = max(upper, lower)
        while n_up_to[upper] <= min(below + 1, n - 1):
            upper += 1
        edges[k] = _interpolate(float(distinct[lower]), float(distinct[upper]), position - below)


@compiled
def _edges_by_sorting(values: Array, levels: Array, edges: Array) -> None:
    """Fill `edges` with the quantiles of any values, as `quantile_edges` does."""
    ordered = np.sort(values)
    for k in range(len(levels)):
        position = (len(values) - 1) * levels[k]
        below = int(np.floor(position))
        edges[k] = _interpolate(ordered[below], ordered[min(below + 1, len(values) - 1)], position - below)


@compiled
def _make_workspace(widest: int, n_levels: int) -> Any:
    """Allocate the arrays that binning reuses for all cells of up to `widest` genes.

    Returns:
        The edges; the tables of `_count_values`; the range of bins of each tabulated count; and, per gene, arrays for
        counts, random words and ranges of bins.
    """
    n_tabulated = _LARGEST_TABULATED + 1
    histograms = np.zeros(_N_HISTOGRAMS * n_tabulated, np.int32)
    tables = histograms, np.empty(n_tabulated, np.int32), np.empty(n_tabulated, np.int64)
    per_gene = np.empty(widest, np.int32), np.empty(widest, np.uint64), np.empty(widest, np.uint64)
    return np.empty(n_levels), tables, np.empty(n_tabulated, np.uint64), per_gene


@compiled
def _find_edges(values: Array, levels: Array, workspace: Any) -> bool:
    """Compute the bin edges of a cell in `workspace`, and the range of bins of each of its counts.

    Returns:
        Whether the counts are tabulated. If not, `_assign_bins` searches the edges for each value.
    """
    edges, tables, range_of_count, (counts, _, _) = workspace
    n_distinct = _count_values(values, counts, tables)
    if n_distinct < 0:
        _edges_by_sorting(values, levels, edges)
        return False
    _, distinct, n_up_to = tables
    _edges_by_counting(len(values), distinct, n_up_to, levels, edges)
    range_of_count[0] = _pack_range(0, 1)  # bin 0, for genes that are not expressed if they become tokens
    n_less = n_less_equal = 0
    for count in distinct[:n_distinct]:
        while n_less < len(edges) and edges[n_less] < count:
            n_less += 1
        n_less_equal = max(n_less, n_less_equal)
        while n_less_equal < len(edges) and edges[n_less_equal] <= count:
            n_less_equal += 1
        lowest = min(n_less + 1, n_less_equal)
        range_of_count[count] = _pack_range(lowest, n_less_equal - lowest + 1)
    return True


@compiled
def _pack_range(lowest: Any, n_choices: Any) -> Any:
    """Pack a range of `n_choices` bins starting at `lowest` into one word: number above, lowest bin below."""
    return (np.uint64(n_choices) << _HALF_WORD) | np.uint64(lowest)


@compiled
def _search_range(value: Any, edges: Array) -> Any:
    """Find the range of bins of a value by bisection, packed as by `_pack_range`."""
    n_less, n_more = 0, len(edges)  # the number of edges below the value lies between these
    while n_less < n_more:
        middle = (n_less + n_more) // 2
        if edges[middle] < value:
            n_less = middle + 1
        else:
            n_more = middle
    highest = n_less
    while highest < len(edges) and edges[highest] <= value:
        highest += 1
    lowest = min(n_less + 1, highest)
    return _pack_range(lowest, highest - lowest + 1)


@compiled
def _assign_bins(
    values: Array, genes: Array, key: Any, ties: int, tabulated: bool, workspace: Any, bins: Array
) -> None:
    """Fill `bins` with the bin of each value, 0 for 0, after `_find_edges` has prepared `workspace`."""
    edges, _, range_of_count, (_, words, ranges) = workspace
    if tabulated:
        for i in range(len(values)):
            ranges[i] = range_of_count[np.uint32(np.int32(values[i]))]
    else:
        for i in range(len(values)):
            ranges[i] = _search_range(values[i], edges)
    if ties == 0:  # random; the numbers are those of TIE_CODES
        fill_random_words(key, genes, words)
        for i in range(len(values)):
            # 32 random bits times n, divided by 2³², are uniform on 0 .. n − 1, without a division.
            step = ((words[i] >> _HALF_WORD) * (ranges[i] >> _HALF_WORD)) >> _HALF_WORD
            bins[i] = np.int32(np.uint32(ranges[i])) + np.int32(step)
        return
    for i in range(len(values)):
        lowest, last = np.int64(np.uint32(ranges[i])), np.int64(ranges[i] >> _HALF_WORD) - 1
        bins[i] = lowest + (last // 2 if ties == 1 else last if ties == 2 else 0)


@compiled
def _gather_cell(columns: Array, counts: Array, gene_ids: Array, genes: Array, values: Array) -> Any:
    """Fill `genes` and `values` with the known expressed genes of a cell, in the order of its columns.

    Returns:
        Their number, or −1 if the columns are unsorted or repeated.
    """
    n_descents = n_left_out = 0
    for i in range(1, len(columns)):
        n_descents += columns[i] <= columns[i - 1]
    if n_descents:
        return -1
    for i in range(len(columns)):
        genes[i] = gene_ids[np.uint32(columns[i])]
    for i in range(len(columns)):
        values[i] = counts[i]
        n_left_out += (genes[i] < 0) | (counts[i] <= 0)
    if not n_left_out:
        return len(columns)
    k = np.uint64(0)
    for i in range(len(columns)):
        gene, count = genes[i], values[i]
        genes[k], values[k] = gene, count  # overwritten by the next gene unless k advances
        k += np.uint64((gene >= 0) & (count > 0))
    return np.int64(k)


@compiled
def _sort_by_gene(genes: Array, values: Array, present: Array, value_of_gene: Array) -> None:
    """Sort the genes of a cell by id, and `values` along with them.

    The vocabulary is a bitmap with one bit per gene: set the bit of each gene, then read the set bits in order. That
    costs one pass over the bitmap (a thousand words for 60,000 genes) and needs no comparisons.

    Args:
        genes: distinct vocabulary ids, sorted in place.
        values: their values.
        present: the bitmap, 64 genes per word. All zero before and after.
        value_of_gene: workspace with an entry per id of the vocabulary.
    """
    n_descents = 0
    for i in range(1, len(genes)):
        n_descents += genes[i] <= genes[i - 1]
    if not n_descents:
        return
    for i in range(len(genes)):
        value_of_gene[genes[i]] = values[i]
        present[genes[i] >> 6] |= ONE << np.uint64(genes[i] & 63)
    n = 0
    for word in range(len(present)):
        bits = present[word]
        present[word] = np.uint64(0)
        while bits:
            lowest = bits & (~bits + ONE)  # the lowest set bit
            gene = (word << 6) + _BIT_POSITION[(lowest * _DE_BRUIJN) >> np.uint64(58)]
            genes[n], values[n] = gene, value_of_gene[gene]
            n += 1
            bits ^= lowest


@compiled
def _insert_zeros(zero_genes: Array, genes: Array, values: Array, n: int) -> int:
    """Extend the n sorted genes of a cell to all of `zero_genes`, with value 0 for the new ones; return their number.

    It fills the arrays from the end, so that no value is overwritten before it is moved.
    """
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
def tokenize_cells(
    indptr: Array, columns: Array, counts: Array, gene_ids: Array, zero_genes: Array, n_vocab: int, levels: Array,
    ties: int, limit: int, tie_keys: Array, sampling_keys: Array, n_tokens: Array, input_ids: Array, token_values:
        Array,
) -> int:  # fmt: skip
    """Fill the tokens of many cells as `tokenizing_scgpt` describes, and leave one entry before each cell for `<cls>`.

    Args:
        indptr: offsets of the cells in `columns` and `counts`. Shape (cells + 1,).
        columns: column of each stored entry. Shape (entries,).
        counts: value of each stored entry. Shape (entries,).
        gene_ids: vocabulary id of each column, −1 where unknown. Shape (genes,).
        zero_genes: sorted ids of the genes that become tokens in every cell; may be empty.
        n_vocab: size of the vocabulary.
        levels: quantile levels of the bin edges; empty to keep values as they are.
        ties: one of `TIE_CODES`.
        limit: largest number of genes per cell.
        tie_keys: keys of the ties. Shape (cells,).
        sampling_keys: keys of the sampling. Shape (cells,).
        n_tokens: output: tokens per cell with `<cls>`, 0 for a cell without a known gene. Shape (cells,).
        input_ids: output: vocabulary ids. At least as long as all tokens.
        token_values: output: values, same length.

    Returns:
        The first cell with unsorted or repeated columns, or −1.
    """
    widest = len(zero_genes)
    for cell in range(len(indptr) - 1):
        widest = max(widest, indptr[cell + 1] - indptr[cell])
    present, value_of_gene = np.zeros((n_vocab >> 6) + 1, np.uint64), np.empty(n_vocab, counts.dtype)
    genes, values = np.empty(widest, np.int32), np.empty(widest, counts.dtype)
    workspace = _make_workspace(widest, len(levels))
    start = 0
    for cell in range(len(indptr) - 1):
        stored = slice(indptr[cell], indptr[cell + 1])
        n = _gather_cell(columns[stored], counts[stored], gene_ids, genes, values)
        if n < 0:
            return cell
        n_tokens[cell] = 0
        if n == 0:
            continue
        tabulated = _find_edges(values[:n], levels, workspace) if len(levels) else False
        if len(zero_genes):
            _sort_by_gene(genes[:n], values[:n], present, value_of_gene)
            n = _insert_zeros(zero_genes, genes, values, n)
        n = keep_lowest(genes, values, n, limit, sampling_keys[cell], workspace[3][1])
        _sort_by_gene(genes[:n], values[:n], present, value_of_gene)  # after sampling, when fewer genes are left
        ids, bins = input_ids[start + 1 : start + 1 + n], token_values[start + 1 : start + 1 + n]
        for i in range(n):  # not `ids[:] = genes[:n]`: numba takes seconds to compile an assignment of slices
            ids[i] = genes[i]
        if len(levels):
            _assign_bins(values[:n], genes[:n], tie_keys[cell], ties, tabulated, workspace, bins)
        else:
            for i in range(n):
                bins[i] = values[i]
        n_tokens[cell] = n + 1
        start += n + 1
    return -1
