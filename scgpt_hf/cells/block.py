"""`CellBlock`: the raw counts, obs rows and ids of some cells, as every source returns them.

This module also defines what valid raw counts and valid cell ids are. It reads nothing: `source.py` opens a source, and
the packages `soma`, `files` and `cache` read it.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from hashlib import sha256
from typing import Any, Literal, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, issparse

# Cells of one chunk: the rows of one tile of X in a Census. The row of a cell crosses about 30 tiles, and TileDB
# decompresses all of them, however few of their rows are read. Measured on a local Census (4 cores, 8,192 cells to a
# query): 51,000 cells/s in aligned runs of 2,048 cells, 12,000 in runs of 256, 6,500 in runs of 16.
CHUNK_SIZE = 2048

AnyArray: TypeAlias = NDArray[Any]
InvalidCounts: TypeAlias = Literal["not finite", "negative", "fractional"]
FloatArray: TypeAlias = NDArray[np.floating[Any]]  # of any precision
Float64Array: TypeAlias = NDArray[np.float64]
Int64Array: TypeAlias = NDArray[np.int64]
# data, indices and indptr of a CSR matrix, in scipy's order
CsrArrays: TypeAlias = tuple[AnyArray, AnyArray, AnyArray]


class CellBlock:
    """The raw counts of some cells of a source as a CSR matrix, with their obs rows and ids.

    Genes ascend within each cell, without repeats and without stored zeros. A block has the arrays of a CSR matrix, so
    you can pass it to `ScGPTProcessor.tokenize` directly.

    Readers of the Census and of caches return subclasses that keep the counts compact and override `_gather`. Such a
    block builds `data`, `indices` and `indptr` for all cells when you first use one of them. To save that memory, work
    on a few cells at a time and use `take`. Several threads may use one block.

    Attributes:
        obs: the requested obs columns, indexed by cell id. Shape (cells, columns).
        cell_ids: the ids of the cells, int64. Shape (cells,).
        shape: number of cells and of genes.

    Example:
        >>> obs, cell_ids = pd.DataFrame(index=[7, 3]), np.array([7, 3])
        >>> block = CellBlock.from_scipy(csr_matrix([[0, 5, 1], [2, 0, 0]]), obs, cell_ids)
        >>> block.shape
        (2, 3)
        >>> block.take(np.array([1])).counts.toarray()
        array([[2., 0., 0.]], dtype=float32)
    """

    def __init__(self, arrays: CsrArrays | None, obs: pd.DataFrame, cell_ids: Int64Array, *, n_genes: int) -> None:
        """Create a block without copying anything.

        Args:
            arrays: `data`, `indices` and `indptr` of all cells; None in a subclass that overrides `_gather`.
            obs: obs columns, indexed by cell id. Shape (cells, columns).
            cell_ids: the ids of the cells. Shape (cells,).
            n_genes: number of columns of the matrix.
        """
        if arrays is not None:
            self._arrays = arrays
        self.obs, self.cell_ids, self.shape = obs, cell_ids, (len(cell_ids), n_genes)

    @classmethod
    def from_scipy(cls, counts: csr_matrix, obs: pd.DataFrame, cell_ids: Int64Array) -> "CellBlock":
        """Create a block from a scipy matrix in canonical format, whose arrays it shares.

        Args:
            counts: raw counts. Shape (cells, genes).
            obs: obs columns, indexed by cell id. Shape (cells, columns).
            cell_ids: the ids of the cells. Shape (cells,).
        """
        return CellBlock((counts.data, counts.indices, counts.indptr), obs, cell_ids, n_genes=counts.shape[1])

    def __len__(self) -> int:
        return len(self.cell_ids)

    @property
    def data(self) -> AnyArray:
        """The counts, shape (entries,).

        uint16 from a Census or a cache if all counts fit, else float32. Narrow counts need half the memory, and the
        tokenizer reads them as they are.
        """
        return self._arrays[0]

    @property
    def indices(self) -> AnyArray:
        """The gene of each count, shape (entries,).

        uint16 from a Census or a cache if all genes fit (from a Census also all counts), else int32.
        """
        return self._arrays[1]

    @property
    def indptr(self) -> AnyArray:
        """The offsets of the cells: cell i has entries `indptr[i]:indptr[i + 1]`. Shape (cells + 1,)."""
        return self._arrays[2]

    @cached_property
    def counts(self) -> csr_matrix:
        """The counts as a scipy matrix, float32 with int32 genes. Shape (cells, genes).

        It is built on first use and kept, 8 bytes per entry. Use `data`, `indices` and `indptr` where they suffice.
        """
        data, indices, indptr = self._arrays
        if indptr[-1] <= np.iinfo(np.int32).max:  # scipy expects one dtype for both index arrays
            indptr = indptr.astype(np.int32, copy=False)
        arrays = data.astype(np.float32, copy=False), indices.astype(np.int32, copy=False), indptr
        matrix = csr_matrix(arrays, shape=self.shape, copy=False)
        matrix.has_canonical_format = True  # true of every block; scipy would check every entry
        return matrix

    def take(self, positions: Int64Array) -> "CellBlock":
        """Return the cells at the given positions, in this order, without materialising the complete block.

        Args:
            positions: rows of this block, not cell ids. Shape (taken cells,).
        """
        rows = _as_slice(positions)
        arrays, obs, cell_ids = self._gather(positions), self.obs.iloc[rows], self.cell_ids[rows]
        return CellBlock(arrays, obs, cell_ids, n_genes=self.shape[1])

    def with_obs(self, columns: Sequence[str]) -> "CellBlock":
        """Return the same cells with only these obs columns. The counts are shared."""
        block = copy(self)
        block.obs = self.obs[list(columns)]
        return block

    @cached_property
    def _arrays(self) -> CsrArrays:
        """The CSR arrays of all cells: passed to `__init__`, or gathered by a compact block on first use."""
        return self._gather(np.arange(len(self)))

    def _gather(self, positions: Int64Array) -> CsrArrays:
        """Return the CSR arrays of the cells at the given positions, in this order; compact blocks override it."""
        data, indices, indptr = self._arrays
        starts, stops = indptr[positions], indptr[positions + 1]
        taken_indptr = to_offsets(stops - starts)
        entries: Any
        if isinstance(_as_slice(positions), slice):
            entries = slice(starts[0], stops[-1])
        else:
            entries = np.repeat(starts - taken_indptr[:-1], stops - starts) + np.arange(taken_indptr[-1])
        return data[entries], indices[entries], taken_indptr


def to_offsets(lengths: AnyArray | Sequence[int]) -> Int64Array:
    """Return where each of several consecutive parts starts, and the end of the last one. Shape (parts + 1,)."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def _as_slice(positions: Int64Array) -> slice | Int64Array:
    """Return neighboring positions as a slice, others as they are.

    The pipeline takes neighboring cells. A slice of an array is a view, and that of a dataframe is much faster.
    """
    if len(positions) and (np.diff(positions) == 1).all():
        return slice(int(positions[0]), int(positions[-1]) + 1)
    return positions


def require_counts(counts: Any, where: str, *, whole: bool = True) -> None:
    """Raise unless every count is finite, whole and at least zero.

    Args:
        counts: sparse or dense matrix. Shape (cells, genes).
        where: names the matrix in the message, e.g. `"layer 'raw'"`.
        whole: require whole numbers.

    Raises:
        ValueError: a count is NaN or infinite, negative, or fractional.
    """
    matrix: Any = counts
    stored = np.asarray(matrix.data if issparse(counts) else matrix).ravel()
    if found := find_invalid_counts(stored, whole=whole):
        what, wrong = found
        raise ValueError(
            f"expected raw counts (whole numbers >= 0), found {stored[wrong.argmax()]:g} and "
            f"{int(np.count_nonzero(wrong)) - 1:,} more {what} values of {stored.size:,} in {where}; choose the layer "
            "with counts: --layer NAME (layer='NAME' in Python)"
        )


def find_invalid_counts(stored: AnyArray, *, whole: bool = True) -> tuple[InvalidCounts, NDArray[np.bool_]] | None:
    """Find values that are not raw counts: return the kind, and a mask of shape (values,); None if all are counts.

    Args:
        stored: the values. Shape (values,).
        whole: require whole numbers.
    """
    if stored.dtype.kind in "ub":
        return None
    checks: tuple[tuple[InvalidCounts, NDArray[np.bool_]], ...] = (
        ("not finite", ~np.isfinite(stored)),
        ("negative", stored < 0),
        ("fractional", (stored != np.floor(stored)) & whole),
    )
    return next(((what, wrong) for what, wrong in checks if wrong.any()), None)


def to_float32(counts: NDArray[Any], where: str, *, whole: bool = True) -> NDArray[np.float32]:
    """Return counts as float32 after checking that none is rounded to another whole number.

    float32 holds all whole numbers up to 2**24 = 16,777,216, and only some of the larger ones.

    Args:
        counts: counts of any numeric type, of any shape. float32 counts are returned as they are.
        where: names the array in the message.
        whole: whether fractions are checked, too.

    Raises:
        ValueError: float32 rounds a larger count, or a fraction, to a whole number.
    """
    narrow = counts.astype(np.float32, copy=False)
    if narrow is counts:
        return narrow
    rounded = (narrow != counts) & (narrow == np.floor(narrow)) & np.isfinite(narrow)
    if not whole:
        rounded &= counts == np.floor(counts)
    if n_rounded := int(np.count_nonzero(rounded)):
        before, after = counts[rounded][0], narrow[rounded][0]
        raise ValueError(
            f"{where}: float32 rounds {n_rounded:,} of {counts.size:,} counts to another whole number, e.g. {before!s} "
            f"to {after:.0f}; expected raw counts, whole numbers of up to 16,777,216"
        )
    return narrow


def name_layers(error: ValueError, others: Mapping[str, bool]) -> ValueError:
    """Return the error of `require_counts` with the names of the other layers added, and which of them look raw.

    Args:
        error: the error that `require_counts` raised.
        others: for each other layer, whether its counts look raw.
    """
    if not others:
        return ValueError(f"{error}; there is no other layer")
    raw = [f"--layer={name!r}" for name, looks_raw in others.items() if looks_raw]
    return ValueError(f"{error}; the other layers are {list(others)}, of which look raw: {' or '.join(raw) or 'none'}")


def require_cell_ids(cell_ids: Int64Array, known: NDArray[np.bool_]) -> Int64Array:
    """Return the ids as int64 after checking that the source has each of them and that none is repeated.

    Args:
        cell_ids: the requested cells, in any order. Shape (cells,).
        known: mask by cell id of the cells that the source has. Shape (largest id + 1,).

    Raises:
        ValueError: the ids are not integers of shape (cells,), an id is repeated, or the source does not have it.
    """
    ids = np.asarray(cell_ids)
    if ids.ndim != 1 or (ids.dtype.kind not in "iu" and ids.size):
        raise ValueError(f"expected cell ids as integers of shape (cells,), found {ids.dtype} of shape {ids.shape}")
    ids = ids.astype(np.int64, copy=False)
    inside = (ids >= 0) & (ids < len(known))
    unknown = ids[~inside | ~known[np.where(inside, ids, 0)]] if len(known) else ids
    if len(unknown):
        raise ValueError(
            f"{len(unknown):,} of {len(ids):,} cell ids are not among the {int(known.sum()):,} cells of this source, "
            f"e.g. {unknown[:5].tolist()}; use ids from the index of `source.obs()`"
        )
    ascending = np.sort(ids)
    repeated = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(repeated):
        raise ValueError(f"{len(repeated):,} cell ids are repeated, e.g. {repeated[:5].tolist()}; pass each id once")
    return ids


def gene_hash(feature_ids: Iterable[str]) -> str:
    """Return a hash of the genes and their order: the first 16 hexadecimal digits of their SHA-256."""
    return sha256("\n".join(feature_ids).encode()).hexdigest()[:16]
