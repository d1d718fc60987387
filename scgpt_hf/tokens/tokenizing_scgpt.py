"""From a block of counts to tokens: which genes of a cell the model sees, in which order, with which value.

Per cell: keep the genes that are expressed and known, bin them, sample down to `max_tokens`, order by vocabulary id,
put `<cls>` first. Bins follow `binning_scgpt`; this file holds the rest of the rule and hands whole blocks to
`kernels_scgpt`.
"""

from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .binning_scgpt import Ties, bin_cell, quantile_levels
from .kernels_scgpt import TIE_CODES, tokenize_block
from .packing_scgpt import Tokens
from .randomness_scgpt import SAMPLING, TIES, Int64Array, SparseCounts, UInt64Array, cell_keys, gene_words
from .sampling_scgpt import COMPILED

_EXACT_IN_FLOAT32 = 2**24
_INFINITY = np.float32(np.inf).view(np.uint32)


@dataclass(frozen=True)
class TokenRule:
    """What `tokenize_counts` needs to know of a processor.

    Attributes:
        n_vocab: number of ids in the vocabulary.
        cls_id: vocabulary id of `<cls>`.
        cls_value: the value it carries.
        max_tokens: most tokens per cell, with `<cls>`.
        n_bins: number of bins with the zero bin, or None to leave values as they are.
        ties: how `bin_counts` settles ties.
        include_zeros: whether known genes that are not expressed become tokens with value 0.
    """

    n_vocab: int
    cls_id: int
    cls_value: float
    max_tokens: int
    n_bins: int | None
    ties: Ties
    include_zeros: bool


@dataclass(frozen=True)
class Block:
    """The arrays of a CSR matrix, (cells, genes)."""

    data: npt.NDArray[Any]
    indices: npt.NDArray[Any]
    indptr: npt.NDArray[Any]
    shape: tuple[int, int]


def csr_of(counts: Any) -> SparseCounts:
    """Return counts in CSR with sorted columns, from scipy sparse, backed AnnData, numpy, torch or nested lists.

    Raises:
        ValueError: counts are not of shape (cells, genes).
    """
    if hasattr(counts, "to_memory"):
        counts = counts.to_memory()
    if hasattr(counts, "tocsr"):
        counts = counts.tocsr()
        if not counts.has_canonical_format:
            counts = counts.copy()
            counts.sum_duplicates()
        block: SparseCounts = counts
        return block
    dense = np.asarray(counts)
    if dense.ndim != 2:
        raise ValueError(
            f"expected counts of shape (cells, genes), found {dense.shape}; for one cell pass counts[None]"
        )
    cell_of_entry, columns = np.nonzero(dense)
    indptr = np.searchsorted(cell_of_entry, np.arange(len(dense) + 1))
    return Block(dense[cell_of_entry, columns], columns, indptr, dense.shape)


def rows_of(counts: SparseCounts, first: int, stop: int) -> Block:
    """Return consecutive rows as views; slicing a scipy matrix would copy them."""
    start, end = counts.indptr[first], counts.indptr[stop]
    indptr = counts.indptr[first : stop + 1] - start
    return Block(counts.data[start:end], counts.indices[start:end], indptr, (stop - first, counts.shape[1]))


def as_block(counts: SparseCounts) -> Block:
    """Return the block with values in float32, or float64 where float32 would round them, and int32 columns.

    Values and columns that are both uint16, as a Census or a cache gives them, stay so.

    Raises:
        ValueError: a value is negative, NaN or infinite.
    """
    data, columns = counts.data, counts.indices
    if data.dtype == columns.dtype == np.uint16:
        return Block(data, columns, counts.indptr.astype(np.int64), counts.shape)
    if data.size and not _all_sound(data):
        bad = data[~(np.isfinite(data) & (data >= 0))]
        raise ValueError(f"expected finite expression ≥ 0, found {bad[0]} ({len(bad):,} such entries); pass raw counts")
    if data.dtype not in (np.float32, np.float64):
        exact = data.dtype.kind in "iub" and (not data.size or data.max() < _EXACT_IN_FLOAT32)
        data = data.astype(np.float32 if exact else np.float64)
    return Block(data, columns.astype(np.int32, copy=False), counts.indptr.astype(np.int64), counts.shape)


def _all_sound(data: npt.NDArray[Any]) -> bool:
    """Return whether all numbers are finite and at least 0; one look at the bits of floats, which order as they do."""
    if data.dtype == np.float32:
        largest: np.uint32 = data.view(np.uint32).max()
        if largest < _INFINITY:  # negative numbers, NaN and infinity lie above
            return True
    return bool(data.min() >= 0 and np.isfinite(data.max()))


def log_normalize(block: Block, target_sum: float) -> Block:
    """Return log(1 + count · target_sum / total of the cell), in float32; totals are over all genes of the data."""
    cell_of_entry = np.repeat(np.arange(block.shape[0]), np.diff(block.indptr))
    totals = np.bincount(cell_of_entry, weights=block.data, minlength=block.shape[0])
    values = np.log1p(block.data * (target_sum / np.where(totals > 0, totals, 1.0))[cell_of_entry])
    return replace(block, data=values.astype(np.float32))


def check_columns(gene_ids: Int64Array, n_columns: int, n_vocab: int) -> None:
    """Raise unless the vocabulary ids are those of so many columns, −1 where unknown.

    Raises:
        ValueError: there are more or fewer, one is beyond the vocabulary, or two columns have the same.
    """
    if gene_ids.shape != (n_columns,):
        raise ValueError(f"found {gene_ids.shape} gene ids for {n_columns:,} columns; pass one per column")
    if (largest := gene_ids.max(initial=-1)) >= n_vocab:
        raise ValueError(f"gene id {largest} is beyond the vocabulary of {n_vocab:,}; use match_genes")
    known = gene_ids[gene_ids >= 0]
    met = np.zeros(n_vocab, np.bool_)
    met[known] = True
    if np.count_nonzero(met) < len(known):
        raise ValueError(f"two columns have gene id {np.bincount(known).argmax()}; each gene may have one column")


def count_known(block: Block, gene_ids: Int64Array) -> Int64Array:
    """Return how many known genes each cell expresses. Shape (cells,)."""
    known = (gene_ids[block.indices] >= 0) & (block.data > 0)
    n_before: Int64Array = np.concatenate([[0], np.cumsum(known)])
    n_known: Int64Array = np.diff(n_before[block.indptr])
    return n_known


def tokenize_counts(
    block: Block, gene_ids: Int64Array, rule: TokenRule, *, cell_ids: Int64Array, seed: int, epoch: int
) -> Tokens:
    """Return the tokens of every cell that expresses a known gene.

    Genes come by ascending vocabulary id, so the order of columns does not matter. Of a cell with too many genes, those
    with the lowest counter-based numbers stay: a uniform sample, the same wherever the cell is met.

    Args:
        block: counts as `as_block` returns them. Shape (cells, genes).
        gene_ids: vocabulary id of each column, each at most once, −1 where unknown. Shape (genes,).
        rule: settings of the processor.
        cell_ids: key of ties and sampling. Shape (cells,).
        seed: changes ties and sampling.
        epoch: the same.

    Raises:
        ValueError: the columns of a row are unsorted or repeated.

    Source: bowang-lab/scGPT:scgpt/data_collator.py (bin, then sample); the order of genes is ours and does not matter
        to the model.
    """
    zero_genes = np.sort(gene_ids[gene_ids >= 0]) if rule.include_zeros else np.empty(0, np.int64)
    tie_keys = cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=TIES)
    sampling_keys = cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=SAMPLING)
    n_most = int((1 + np.minimum(np.maximum(np.diff(block.indptr), len(zero_genes)), rule.max_tokens - 1)).sum())
    n_tokens = np.zeros(block.shape[0], np.int64)
    input_ids, values = np.empty(n_most, np.int64), np.empty(n_most, np.float32)
    fill = _fill_compiled if COMPILED else _fill
    unsorted = fill(block, gene_ids, zero_genes, rule, (tie_keys, sampling_keys), (n_tokens, input_ids, values))
    if unsorted >= 0:
        raise ValueError(f"row {unsorted} has unsorted or repeated columns; call counts.sum_duplicates() first")
    indptr = np.concatenate([[0], np.cumsum(n_tokens[n_tokens > 0])])
    input_ids, values = _trim(input_ids, indptr[-1]), _trim(values, indptr[-1])
    input_ids[indptr[:-1]], values[indptr[:-1]] = rule.cls_id, rule.cls_value
    return Tokens(input_ids, values, None, indptr, cell_ids[n_tokens > 0])


def _trim(flat: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    """Return the first n; as a copy where a view would hold on to much more memory."""
    return flat[:n] if 2 * n > len(flat) else flat[:n].copy()


_Keys = tuple[UInt64Array, UInt64Array]  # of ties and of sampling, each (cells,)
_Out = tuple[Int64Array, Int64Array, npt.NDArray[np.float32]]  # tokens per cell; ids; values, to be filled


def _fill_compiled(
    block: Block, gene_ids: Int64Array, zero_genes: Int64Array, rule: TokenRule, keys: _Keys, out: _Out
) -> int:
    """Fill `out`, leaving room for `<cls>` before each cell; return the first row with unsorted columns, or −1."""
    levels = np.empty(0) if rule.n_bins is None else quantile_levels(rule.n_bins)
    genes = gene_ids.astype(np.int32), zero_genes.astype(np.int32), rule.n_vocab
    how = levels, TIE_CODES[rule.ties], rule.max_tokens - 1
    unsorted: int = tokenize_block(block.indptr, block.indices, block.data, *genes, *how, *keys, *out)
    return unsorted


def _fill(block: Block, gene_ids: Int64Array, zero_genes: Int64Array, rule: TokenRule, keys: _Keys, out: _Out) -> int:
    """Do what `_fill_compiled` does, one cell at a time: the rule in plain numpy, for machines without numba."""
    n_tokens, input_ids, values = out
    start = 0
    for cell, (first, last) in enumerate(pairwise(block.indptr)):
        columns, counts = block.indices[first:last], block.data[first:last]
        if (columns[1:] <= columns[:-1]).any():
            return cell
        known = (gene_ids[columns] >= 0) & (counts > 0)
        if known.any():
            own_keys = keys[0][cell : cell + 1], keys[1][cell : cell + 1]
            genes, bins = _tokenize_cell(gene_ids[columns][known], counts[known], zero_genes, rule, own_keys)
            n_tokens[cell] = len(genes) + 1
            tokens = slice(start + 1, start + 1 + len(genes))
            input_ids[tokens], values[tokens] = genes, bins
            start = tokens.stop
    return -1


def _tokenize_cell(
    genes: Int64Array, values: npt.NDArray[Any], zero_genes: Int64Array, rule: TokenRule, keys: _Keys
) -> tuple[Int64Array, npt.NDArray[np.float32]]:
    """Return ids and values of a cell from its known expressed genes, at least one, in any order."""
    order = np.argsort(genes)
    genes, values = genes[order], values[order]
    if rule.n_bins is not None:
        values = bin_cell(values, genes, keys[0], rule.n_bins, rule.ties)
    if rule.include_zeros:
        with_zeros = np.zeros(len(zero_genes), np.float32)
        with_zeros[np.searchsorted(zero_genes, genes)] = values
        genes, values = zero_genes, with_zeros
    if len(genes) > rule.max_tokens - 1:
        words = gene_words(keys[1], genes)
        sampled = words <= np.partition(words, rule.max_tokens - 2)[rule.max_tokens - 2]
        genes, values = genes[sampled], values[sampled]
    return genes, values.astype(np.float32)
