"""Counts on their way into the processor: conversion to CSR, validation, normalization.

Any object with the four attributes of `SparseCounts` can be tokenized: a `scipy.sparse.csr_matrix`, or a block of cells
as a source reads it. The functions here accept such an object and return one. `tokenizing_scgpt` turns the result into
tokens.
"""

from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from .randomness_scgpt import GOLDEN_GAMMA, Int64Array, mix_bits

_EXACT_IN_FLOAT32 = 2**24  # float32 represents every integer below
_INFINITY_BITS = np.float32(np.inf).view(np.uint32)


class SparseCounts(Protocol):
    """A CSR matrix of shape (cells, genes). It needs these attributes only, so scipy is not required."""

    @property
    def data(self) -> npt.NDArray[Any]:
        """Values of the stored entries. Shape (entries,)."""

    @property
    def indices(self) -> npt.NDArray[Any]:
        """Column of each stored entry. Shape (entries,)."""

    @property
    def indptr(self) -> npt.NDArray[Any]:
        """Offsets of the cells in `data` and `indices`. Shape (cells + 1,)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and number of genes."""


class _CsrArrays(NamedTuple):
    """CSR arrays in a tuple; compiled kernels take arrays, not scipy matrices, and scipy is not required."""

    data: npt.NDArray[Any]
    indices: npt.NDArray[Any]
    indptr: npt.NDArray[Any]
    shape: tuple[int, int]


def to_offsets(lengths: npt.NDArray[Any]) -> Int64Array:
    """Return where each of several consecutive parts starts, and the end of the last one. Shape (parts + 1,)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def to_csr(counts: Any) -> SparseCounts:
    """Convert counts to CSR with sorted columns and no repeated entries.

    Args:
        counts: a scipy sparse matrix, the X of a backed AnnData, a numpy array, a torch tensor or nested lists. Shape
            (cells, genes).

    Raises:
        ValueError: counts are not two-dimensional.
    """
    if hasattr(counts, "to_memory"):  # the X of a backed AnnData
        counts = counts.to_memory()
    if hasattr(counts, "tocsr"):
        counts = counts.tocsr()
        if not counts.has_canonical_format:
            counts = counts.copy()  # `sum_duplicates` works in place, and the matrix belongs to the caller
            counts.sum_duplicates()
        matrix: SparseCounts = counts
        return matrix
    dense = np.asarray(counts)
    if dense.ndim != 2:
        raise ValueError(
            f"expected counts of shape (cells, genes), found {dense.shape}; for one cell pass counts[None]"
        )
    cell_of_entry, columns = np.nonzero(dense)
    indptr = np.searchsorted(cell_of_entry, np.arange(len(dense) + 1))
    return _CsrArrays(dense[cell_of_entry, columns], columns, indptr, dense.shape)


def validate_counts(counts: SparseCounts) -> SparseCounts:
    """Check the values and convert the arrays to the types that the kernels are compiled for.

    Returns:
        The same matrix with int64 offsets. If values and columns are both uint16, as in a Census or a cache, they stay
        uint16. Otherwise columns become int32, and values float32, or float64 where float32 would round them.

    Raises:
        ValueError: a value is negative, NaN or infinite.
    """
    data, columns, indptr = counts.data, counts.indices, counts.indptr.astype(np.int64, copy=False)
    if data.dtype == columns.dtype == np.uint16:  # cannot be negative or infinite
        return _CsrArrays(data, columns, indptr, counts.shape)
    if data.size and not _all_finite_and_nonnegative(data):
        bad = data[~(np.isfinite(data) & (data >= 0))]
        raise ValueError(f"expected finite expression ≥ 0, found {bad[0]} ({len(bad):,} such entries); pass raw counts")
    if data.dtype not in (np.float32, np.float64):
        exact = data.dtype.kind in "iub" and (not data.size or data.max() < _EXACT_IN_FLOAT32)
        data = data.astype(np.float32 if exact else np.float64)
    return _CsrArrays(data, columns.astype(np.int32, copy=False), indptr, counts.shape)


def _all_finite_and_nonnegative(data: npt.NDArray[Any]) -> bool:
    if data.dtype == np.float32:
        # Read as unsigned integers, floats ≥ 0 keep their order, and infinity, NaN and negative floats are larger than
        # all finite ones. One maximum therefore checks everything. Only −0.0 needs the slower check below.
        largest: np.uint32 = data.view(np.uint32).max()
        if largest < _INFINITY_BITS:
            return True
    return bool(data.min() >= 0 and np.isfinite(data.max()))


def log_normalize(counts: SparseCounts, target_sum: float) -> SparseCounts:
    """Compute log(1 + count · target_sum / total of the cell), in float32.

    Args:
        counts: counts that `validate_counts` has returned. Shape (cells, genes).
        target_sum: counts per cell after normalizing. The total of a cell includes the genes that are not in the
            vocabulary.
    """
    n_cells = counts.shape[0]
    cell_of_entry = np.repeat(np.arange(n_cells), np.diff(counts.indptr))
    totals = np.bincount(cell_of_entry, weights=counts.data, minlength=n_cells)
    values = np.log1p(counts.data * (target_sum / np.where(totals > 0, totals, 1.0))[cell_of_entry])
    return _CsrArrays(values.astype(np.float32), counts.indices, counts.indptr, counts.shape)


def select_columns(counts: SparseCounts, selected: npt.NDArray[np.bool_]) -> SparseCounts:
    """Return the counts without the entries of the other columns; the columns keep their numbers.

    Args:
        counts: counts that `validate_counts` has returned. Shape (cells, genes).
        selected: which columns to keep. Shape (genes,).
    """
    kept = selected[counts.indices]
    return _CsrArrays(counts.data[kept], counts.indices[kept], to_offsets(kept)[counts.indptr], counts.shape)


def sum_repeated_genes(counts: SparseCounts, gene_ids: Int64Array, repeated: npt.NDArray[np.bool_]) -> SparseCounts:
    """Sum the counts of the columns that have one gene, so that no cell has a gene twice.

    In each cell the sum takes the place of the first of these columns that is expressed; the other entries are removed.

    Args:
        counts: counts that `validate_counts` has returned. Shape (cells, genes).
        gene_ids: vocabulary id of each column, −1 where unknown. Shape (genes,).
        repeated: whether another column has the same id. Shape (genes,).

    Returns:
        The counts with the same columns.
    """
    entries = np.flatnonzero(repeated[counts.indices])
    cells = np.searchsorted(counts.indptr, entries, side="right") - 1
    genes = gene_ids[counts.indices[entries]]
    _, first, group = np.unique(cells * (gene_ids.max() + 1) + genes, return_index=True, return_inverse=True)
    sums = np.bincount(group, counts.data[entries], minlength=len(first))
    data, columns = counts.data.copy(), counts.indices
    if data.dtype == np.uint16 and sums.max(initial=0) > np.iinfo(np.uint16).max:
        data, columns = data.astype(np.float32), columns.astype(np.int32)
    kept = np.ones(len(data), np.bool_)
    kept[entries] = False
    kept[entries[first]] = True
    data[entries[first]] = sums
    n_before = to_offsets(kept)
    return _CsrArrays(data[kept], columns[kept], n_before[counts.indptr], counts.shape)


def count_known_genes(counts: SparseCounts, gene_ids: Int64Array) -> Int64Array:
    """Count the genes of the vocabulary that each cell expresses. Shape (cells,).

    Args:
        counts: counts that `validate_counts` has returned. Shape (cells, genes).
        gene_ids: vocabulary id of each column, −1 where unknown. Shape (genes,).
    """
    known = (gene_ids[counts.indices] >= 0) & (counts.data > 0)
    n_before = to_offsets(known)
    n_known: Int64Array = np.diff(n_before[counts.indptr])
    return n_known


def content_ids(counts: SparseCounts, gene_ids: Int64Array) -> Int64Array:
    """Hash the known genes of each cell and their counts to an id.

    The id replaces a cell id where there is none. The same cell then gets the same random numbers in any file, order or
    batch, whatever the order of the columns, and whether counts are stored as integers or as floats.

    Args:
        counts: expression without repeated entries. Shape (cells, genes).
        gene_ids: vocabulary id of each column, −1 where unknown. Shape (genes,).

    Returns:
        int64 ids, shape (cells,).
    """
    genes = gene_ids[counts.indices]
    bits = counts.data.astype(np.float32).view(np.uint32).astype(np.uint64)
    words = mix_bits(((bits << np.uint64(32)) | genes.astype(np.uint32)) + GOLDEN_GAMMA)
    words[(genes < 0) | (counts.data == 0)] = 0
    # A sum does not depend on the order of the columns. Unsigned sums wrap around, which does no harm to a hash.
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words, dtype=np.uint64)])
    ids: Int64Array = (sums[counts.indptr[1:]] - sums[counts.indptr[:-1]]).view(np.int64)
    return ids
