"""Tokenizing: which genes of a cell the model reads, in which order, and with which values.

For each cell:

1. Keep the genes that are expressed and in the vocabulary.
2. Replace their counts by quantile bins (`binning_scgpt`).
3. If there are more than `max_tokens` − 1 genes, keep a random sample of them.
4. Sort them by vocabulary id, and put `<cls>` first.

Example with the vocabulary {GENE_A: 0, GENE_B: 1, GENE_C: 2, <cls>: 4} and `n_bins=3`:

    counts      GENE_C 5, GENE_A 1, GENE_X 2      GENE_X is not in the vocabulary
    input_ids   [4, 0, 2]
    values      [0, 1, 2]                         0 is `cls_value`; bins 1 and 2

This module holds the rule and a slow version of it in numpy; `kernels_scgpt` holds the compiled version.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from .binning_scgpt import Ties, bin_cell, quantile_levels
from .counts_scgpt import SparseCounts, count_known_genes, select_columns, to_offsets
from .kernels_scgpt import TIE_CODES, tokenize_cells
from .packing_scgpt import Tokens
from .randomness_scgpt import SAMPLING, TIES, Int64Array, UInt64Array, cell_keys, random_words
from .sampling_scgpt import COMPILED


@dataclass(frozen=True)
class TokenSettings:
    """The settings of one call of `tokenize_counts`; only `ScGPTProcessor` makes them, and owns their defaults.

    It exists because a call may override settings of the processor, and because the processor imports this module, so
    this module cannot import the processor.

    Attributes:
        n_vocab: size of the vocabulary.
        cls_id: vocabulary id of `<cls>`.
        cls_value: value of `<cls>`.
        max_tokens: largest number of tokens per cell, including `<cls>`.
        n_bins: number of bins, including the zero bin, or None to keep values as they are.
        ties: how `bin_cell` chooses a bin where edges coincide.
        include_zeros: whether known genes that are not expressed become tokens with value 0.
    """

    n_vocab: int
    cls_id: int
    cls_value: float
    max_tokens: int
    n_bins: int | None
    ties: Ties
    include_zeros: bool


def check_gene_ids(gene_ids: Int64Array, n_columns: int, n_vocab: int) -> npt.NDArray[np.bool_] | None:
    """Check that there is one valid vocabulary id for each column of the counts, and find genes with several columns.

    Args:
        gene_ids: vocabulary id of each column, −1 where unknown.
        n_columns: number of columns of the counts.
        n_vocab: size of the vocabulary.

    Returns:
        Whether each column has a gene that another column has, too; None if there is no such column. Shape (columns,).

    Raises:
        ValueError: the number of ids is wrong, or an id is outside the vocabulary.
    """
    if gene_ids.shape != (n_columns,):
        raise ValueError(f"found {gene_ids.shape} gene ids for {n_columns:,} columns; pass one per column")
    if (largest := gene_ids.max(initial=-1)) >= n_vocab:
        raise ValueError(f"gene id {largest} is outside the vocabulary of {n_vocab:,}; use ids from match_genes")
    n_columns_of = np.bincount(gene_ids[gene_ids >= 0], minlength=n_vocab)
    if n_columns_of.max() <= 1:
        return None
    repeated: npt.NDArray[np.bool_] = (gene_ids >= 0) & (n_columns_of[gene_ids] > 1)
    return repeated


def tokenize_counts(
    counts: SparseCounts, gene_ids: Int64Array, settings: TokenSettings, *, cell_ids: Int64Array, seed: int, epoch: int
) -> Tokens:
    """Tokenize every cell that expresses a known gene.

    Genes are sorted by vocabulary id, so the order of the columns does not matter. Of a cell with too many genes, those
    with the lowest random words stay. This is a uniform sample, and it is the same wherever the cell is read.

    Args:
        counts: counts that `validate_counts` has returned. Shape (cells, genes).
        gene_ids: vocabulary id of each column, −1 where unknown; no cell may have a gene twice. Shape (genes,).
        settings: settings of the processor.
        cell_ids: keys of ties and sampling. Shape (cells,).
        seed: seed of ties and sampling.
        epoch: epoch of ties and sampling.

    Raises:
        ValueError: the columns of a cell are unsorted or repeated.

    Source: bowang-lab/scGPT:scgpt/data_collator.py (bin first, then sample). The order of the genes is ours; the model
        does not depend on it.
    """
    zero_genes = np.unique(gene_ids[gene_ids >= 0]) if settings.include_zeros else np.empty(0, np.int64)
    tie_keys = cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=TIES)
    sampling_keys = cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=SAMPLING)
    # Allocate for the largest possible number of tokens; the kernels cannot grow an array.
    n_genes = np.minimum(np.maximum(np.diff(counts.indptr), len(zero_genes)), settings.max_tokens - 1)
    capacity = int((1 + n_genes).sum())
    n_tokens = np.zeros(counts.shape[0], np.int64)
    input_ids, values = np.empty(capacity, np.int64), np.empty(capacity, np.float32)
    fill = _fill_compiled if COMPILED else _fill_with_numpy
    unsorted = fill(counts, gene_ids, zero_genes, settings, (tie_keys, sampling_keys), (n_tokens, input_ids, values))
    if unsorted >= 0:
        raise ValueError(f"row {unsorted} has unsorted or repeated columns; call counts.sum_duplicates() first")
    indptr = to_offsets(n_tokens[n_tokens > 0])
    input_ids, values = _trim(input_ids, indptr[-1]), _trim(values, indptr[-1])
    input_ids[indptr[:-1]], values[indptr[:-1]] = settings.cls_id, settings.cls_value
    return Tokens(input_ids, values, None, indptr, cell_ids[n_tokens > 0])


def tokenize_modalities(
    counts: SparseCounts,
    gene_ids: Int64Array,
    modality_of_gene: Int64Array,
    settings: TokenSettings,
    normalize: Callable[[SparseCounts], SparseCounts],
    *,
    cell_ids: Int64Array,
    seed: int,
    epoch: int,
) -> Tokens:
    """Tokenize each modality by itself, so that proteins are ranked among proteins, and join the tokens of each cell.

    Args:
        counts: see `tokenize_counts`.
        gene_ids: see `tokenize_counts`.
        modality_of_gene: modality of each vocabulary id, from 0. Shape (vocabulary,). Columns of unknown genes belong
            to the first one.
        settings: see `tokenize_counts`; `share_tokens` divides `max_tokens` between the modalities.
        normalize: is applied to the counts of each modality.
        cell_ids: see `tokenize_counts`.
        seed: see `tokenize_counts`.
        epoch: see `tokenize_counts`.

    Returns:
        Tokens of every cell that expresses a known gene of any modality.
    """
    modality_of_column = np.where(gene_ids >= 0, modality_of_gene[gene_ids], 0)
    sizes = np.bincount(modality_of_column[gene_ids >= 0], minlength=modality_of_gene.max() + 1)
    cells, genes, values = [], [], []
    for modality, n_tokens in enumerate(share_tokens(settings.max_tokens - 1, sizes.tolist())):
        own = modality_of_column == modality
        part, ids = select_columns(counts, own), np.where(own, gene_ids, -1)
        if n_tokens:
            limited = replace(settings, max_tokens=n_tokens + 1)
            tokens = tokenize_counts(normalize(part), ids, limited, cell_ids=cell_ids, seed=seed, epoch=epoch)
            is_gene = np.ones(len(tokens.input_ids), np.bool_)
            is_gene[tokens.indptr[:-1]] = False
            kept = np.flatnonzero(count_known_genes(part, ids))
            cells.append(np.repeat(kept, np.diff(tokens.indptr) - 1))
            genes.append(tokens.input_ids[is_gene])
            values.append(tokens.values[is_gene])
    cell_of_gene, all_genes, all_values = np.concatenate(cells), np.concatenate(genes), np.concatenate(values)
    order = np.lexsort((all_genes, cell_of_gene))
    n_genes = np.bincount(cell_of_gene, minlength=counts.shape[0])
    indptr = to_offsets(1 + n_genes[n_genes > 0])
    is_gene = np.ones(indptr[-1], np.bool_)
    is_gene[indptr[:-1]] = False
    input_ids, joined = np.full(indptr[-1], settings.cls_id), np.full(indptr[-1], settings.cls_value, np.float32)
    input_ids[is_gene], joined[is_gene] = all_genes[order], all_values[order]
    return Tokens(input_ids, joined, None, indptr, cell_ids[n_genes > 0])


def share_tokens(n_tokens: int, sizes: list[int]) -> list[int]:
    """Divide the tokens of a cell between modalities: equal shares, but small modalities leave what they cannot use.

    Args:
        n_tokens: largest number of tokens of a cell, without `<cls>`.
        sizes: number of genes of each modality.

    Example:
        >>> share_tokens(1200, [20000, 14])  # 14 proteins are always read completely
        [1186, 14]
    """
    shares, left = [0] * len(sizes), n_tokens
    for done, modality in enumerate(np.argsort(sizes, kind="stable").tolist()):
        shares[modality] = min(sizes[modality], left // (len(sizes) - done))
        left -= shares[modality]
    return shares


def _trim(flat: npt.NDArray[Any], n: int) -> npt.NDArray[Any]:
    """Return the first n entries, as a copy if a view would keep much more memory alive."""
    return flat[:n] if 2 * n > len(flat) else flat[:n].copy()


_Keys = tuple[UInt64Array, UInt64Array]  # of ties and of sampling, each (cells,)
_Outputs = tuple[Int64Array, Int64Array, npt.NDArray[np.float32]]  # tokens per cell, input_ids, values


def _fill_compiled(
    counts: SparseCounts,
    gene_ids: Int64Array,
    zero_genes: Int64Array,
    settings: TokenSettings,
    keys: _Keys,
    outputs: _Outputs,
) -> int:
    """Fill `outputs` with one free entry for `<cls>` before each cell; return the first unsorted cell, or −1."""
    levels = np.empty(0) if settings.n_bins is None else quantile_levels(settings.n_bins)
    genes = gene_ids.astype(np.int32), zero_genes.astype(np.int32), settings.n_vocab
    limits = levels, TIE_CODES[settings.ties], settings.max_tokens - 1
    unsorted: int = tokenize_cells(counts.indptr, counts.indices, counts.data, *genes, *limits, *keys, *outputs)
    return unsorted


def _fill_with_numpy(
    counts: SparseCounts,
    gene_ids: Int64Array,
    zero_genes: Int64Array,
    settings: TokenSettings,
    keys: _Keys,
    outputs: _Outputs,
) -> int:
    """Do the same as `_fill_compiled`, one cell at a time in numpy, for machines without numba."""
    n_tokens, input_ids, values = outputs
    start = 0
    for cell, (first, last) in enumerate(pairwise(counts.indptr)):
        columns, expression = counts.indices[first:last], counts.data[first:last]
        if (columns[1:] <= columns[:-1]).any():
            return cell
        known = (gene_ids[columns] >= 0) & (expression > 0)
        if known.any():
            own_keys = keys[0][cell : cell + 1], keys[1][cell : cell + 1]
            genes, bins = _tokenize_cell(gene_ids[columns][known], expression[known], zero_genes, settings, own_keys)
            n_tokens[cell] = len(genes) + 1
            tokens = slice(start + 1, start + 1 + len(genes))
            input_ids[tokens], values[tokens] = genes, bins
            start = tokens.stop
    return -1


def _tokenize_cell(
    genes: Int64Array, values: npt.NDArray[Any], zero_genes: Int64Array, settings: TokenSettings, keys: _Keys
) -> tuple[Int64Array, npt.NDArray[np.float32]]:
    """Return ids and values of one cell's tokens, given its known expressed genes in any order, at least one."""
    order = np.argsort(genes)
    genes, values = genes[order], values[order]
    if settings.n_bins is not None:
        values = bin_cell(values, genes, keys[0], settings.n_bins, settings.ties)
    if settings.include_zeros:
        with_zeros = np.zeros(len(zero_genes), np.float32)
        with_zeros[np.searchsorted(zero_genes, genes)] = values
        genes, values = zero_genes, with_zeros
    if len(genes) > settings.max_tokens - 1:
        words = random_words(keys[1], genes)
        sampled = words <= np.partition(words, settings.max_tokens - 2)[settings.max_tokens - 2]
        genes, values = genes[sampled], values[sampled]
    return genes, values.astype(np.float32)
