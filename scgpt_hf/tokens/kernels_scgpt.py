"""The rules of `binning_scgpt` and `tokenizing_scgpt`, compiled over whole blocks of cells.

Each kernel releases the GIL, uses one thread, and gives the same bits as the plain numpy beside the rule; tests hold
them together.
"""

from typing import Any

import numpy as np

from .sampling_scgpt import ONE, Array, compiled, draw_words, keep_lowest

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
def _count_values(values: Array, whole: Array, tally: Any) -> int:
    """Fill `tally` with the distinct values, ascending, and how many do not exceed each; return how many there are.

    Returns −1 if a value is not tabulated. Eight histograms take turns, side by side and zero before and after: most
    counts are 1, and adding to one number again and again waits for the last addition.
    """
    histograms, distinct, n_up_to = tally
    n_untabulated, beyond = 0, values.dtype.type(_LARGEST_TABULATED + 1)
    largest: Any = np.int32(0)
    for i in range(len(values)):
        count: Any = np.int32(min(values[i], beyond))
        n_untabulated += count != values[i]
        largest = max(largest, count)
        whole[i] = count
    if n_untabulated or largest > _LARGEST_TABULATED:
        return -1
    for i in range(len(values)):
        histograms[np.uint32((whole[i] << 3) | (i & 7))] += 1  # unsigned: no test for an index from the end
    n_distinct, n = np.uint64(0), np.int64(0)
    for count in range(largest + 1):
        n_here = np.int64(0)
        for rank_group in range(8):
            n_here += histograms[(count << 3) + rank_group]
            histograms[(count << 3) + rank_group] = 0
        n += n_here
        distinct[n_distinct], n_up_to[n_distinct] = count, n  # overwritten by the next one unless there are any
        n_distinct += np.uint64(n_here > 0)
    return int(n_distinct)


@compiled
def _edges_by_counting(n: int, distinct: Array, n_up_to: Array, levels: Array, edges: Array) -> None:
    """Fill the quantiles of n whole values, given as `_count_values` tallies them."""
    lower = upper = 0
    for k in range(len(levels)):
        position = (n - 1) * levels[k]
        below = int(np.floor(position))
        while n_up_to[lower] <= below:
            lower += 1
        upper = max(upper, lower)
        while n_up_to[upper] <= min(below + 1, n - 1):
            upper += 1
        edges[k] = _edge(float(distinct[lower]), float(distinct[upper]), position - below)


@compiled
def _edges_by_sorting(values: Array, levels: Array, edges: Array) -> None:
    ordered = np.sort(values)
    for k in range(len(levels)):
        position = (len(values) - 1) * levels[k]
        below = int(np.floor(position))
        edges[k] = _edge(ordered[below], ordered[min(below + 1, len(values) - 1)], position - below)


@compiled
def _scratch(widest: int, n_levels: int) -> Any:
    """Return what binning a cell of up to `widest` genes writes on.

    Edges; the tally of `_count_values`; the bins that each count may fall in; per gene: whole values, words, bins.
    """
    n_tabulated = _LARGEST_TABULATED + 1
    tally = np.zeros(8 * n_tabulated, np.int32), np.empty(n_tabulated, np.int32), np.empty(n_tabulated, np.int64)
    per_gene = np.empty(widest, np.int32), np.empty(widest, np.uint64), np.empty(widest, np.uint64)
    return np.empty(n_levels), tally, np.empty(n_tabulated, np.uint64), per_gene


@compiled
def _find_edges(values: Array, levels: Array, scratch: Any) -> bool:
    """Fill the edges of a cell; return whether its values are tabulated, with the bins that each may fall in."""
    edges, tally, choices, (whole, _, _) = scratch
    n_distinct = _count_values(values, whole, tally)
    if n_distinct < 0:
        _edges_by_sorting(values, levels, edges)
        return False
    _, distinct, n_up_to = tally
    _edges_by_counting(len(values), distinct, n_up_to, levels, edges)
    choices[0] = _choice(0, 1)  # of genes that are not expressed, if they become tokens
    n_less = n_less_equal = 0
    for count in distinct[:n_distinct]:
        while n_less < len(edges) and edges[n_less] < count:
            n_less += 1
        n_less_equal = max(n_less, n_less_equal)
        while n_less_equal < len(edges) and edges[n_less_equal] <= count:
            n_less_equal += 1
        lowest = min(n_less + 1, n_less_equal)
        choices[count] = _choice(lowest, n_less_equal - lowest + 1)
    return True


@compiled
def _choice(lowest: Any, n_bins: Any) -> Any:
    """Return `n_bins` bins from `lowest` on as one word, its upper and its lower half."""
    return (np.uint64(n_bins) << _HALF_WORD) | np.uint64(lowest)


@compiled
def _look_up(value: Any, edges: Array) -> Any:
    """Return the bins that a value may fall in, found by bisection."""
    n_less, n_more = 0, len(edges)  # edges below the value; then those equal to it
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
    return _choice(lowest, highest - lowest + 1)


@compiled
def _assign_bins(values: Array, genes: Array, key: Any, ties: int, tabulated: bool, scratch: Any, bins: Array) -> None:
    """Fill the bin of each value, 0 for 0; `tabulated` and `scratch` as `_find_edges` left them."""
    edges, _, choices, (_, words, choice_of) = scratch
    if tabulated:
        for i in range(len(values)):
            choice_of[i] = choices[np.uint32(np.int32(values[i]))]  # unsigned: no test for an index from the end
    else:
        for i in range(len(values)):
            choice_of[i] = _look_up(values[i], edges)
    if ties == 0:
        draw_words(key, genes, words)
        for i in range(len(values)):  # the upper half of a word draws one of the choices
            step = ((words[i] >> _HALF_WORD) * (choice_of[i] >> _HALF_WORD)) >> _HALF_WORD
            bins[i] = np.int32(np.uint32(choice_of[i])) + np.int32(step)
        return
    for i in range(len(values)):
        lowest, last = np.int64(np.uint32(choice_of[i])), np.int64(choice_of[i] >> _HALF_WORD) - 1
        bins[i] = lowest + (last // 2 if ties == 1 else last if ties == 2 else 0)


@compiled
def bin_block(values: Array, indptr: Array, genes: Array, keys: Array, levels: Array, ties: int, bins: Array) -> None:
    """Fill `bins` as `bin_counts` says."""
    widest = 0
    for cell in range(len(indptr) - 1):
        widest = max(widest, indptr[cell + 1] - indptr[cell])
    scratch = _scratch(widest, len(levels))
    for cell in range(len(indptr) - 1):
        part = slice(indptr[cell], indptr[cell + 1])
        if part.stop > part.start:
            tabulated = _find_edges(values[part], levels, scratch)
            _assign_bins(values[part], genes[part], keys[cell], ties, tabulated, scratch, bins[part])


@compiled
def _gather_cell(columns: Array, counts: Array, gene_ids: Array, genes: Array, values: Array) -> Any:
    """Fill the known expressed genes of a cell in the order of its columns, and return how many.

    Returns −1 if the columns do not ascend, or repeat.
    """
    n_descents = n_left_out = 0
    for i in range(1, len(columns)):
        n_descents += columns[i] <= columns[i - 1]
    if n_descents:
        return -1
    for i in range(len(columns)):  # several short loops: the compiler takes many entries at once in each
        genes[i] = gene_ids[np.uint32(columns[i])]  # unsigned: no test for an index from the end
    for i in range(len(columns)):
        values[i] = counts[i]
        n_left_out += (genes[i] < 0) | (counts[i] <= 0)
    if not n_left_out:
        return len(columns)
    k = np.uint64(0)  # unsigned: no test for an index from the end
    for i in range(len(columns)):
        gene, count = genes[i], values[i]
        genes[k], values[k] = gene, count  # overwritten by the next gene unless k moves on
        k += np.uint64((gene >= 0) & (count > 0))
    return np.int64(k)


@compiled
def _sort_by_gene(genes: Array, values: Array, present: Array, by_gene: Array) -> None:
    """Order a cell's genes by id, by marking them in a bitmap and reading it back; `present` is left all zero."""
    n_descents = 0
    for i in range(1, len(genes)):
        n_descents += genes[i] <= genes[i - 1]
    if not n_descents:
        return
    for i in range(len(genes)):
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
    genes, values, scratch = np.empty(widest, np.int32), np.empty(widest, counts.dtype), _scratch(widest, len(levels))
    start = 0
    for cell in range(len(indptr) - 1):
        stored = slice(indptr[cell], indptr[cell + 1])
        n = _gather_cell(columns[stored], counts[stored], gene_ids, genes, values)
        if n < 0:
            return cell
        n_tokens[cell] = 0
        if n == 0:
            continue
        tabulated = _find_edges(values[:n], levels, scratch) if len(levels) else False
        if len(zero_genes):
            _sort_by_gene(genes[:n], values[:n], present, by_gene)
            n = _spread_zeros(zero_genes, genes, values, n)
        n = keep_lowest(genes, values, n, limit, sampling_keys[cell], scratch[3][1])
        _sort_by_gene(genes[:n], values[:n], present, by_gene)  # after sampling: fewer are left to sort
        ids, bins = input_ids[start + 1 : start + 1 + n], token_values[start + 1 : start + 1 + n]
        for i in range(n):  # slices are not assigned to, which numba takes seconds to compile
            ids[i] = genes[i]
        if len(levels):
            _assign_bins(values[:n], genes[:n], tie_keys[cell], ties, tabulated, scratch, bins)
        else:
            for i in range(n):
                bins[i] = values[i]
        n_tokens[cell] = n + 1
        start += n + 1
    return -1
