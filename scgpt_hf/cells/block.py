"""`CellBlock`: the raw counts, obs rows and ids of some cells, as every source returns them.

This module also defines what valid raw counts and valid cell ids are. It reads nothing: `source.py` opens a source, and
the packages `soma`, `h5ad` and `cache` read it.
"""

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from functools import cached_property
from hashlib import sha256
from typing import Any, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, issparse

Int64Array: TypeAlias = NDArray[np.int64]
# data, indices and indptr of a CSR matrix, in scipy's order
CsrArrays: TypeAlias = tuple[NDArray[Any], NDArray[Any], NDArray[Any]]


class CellBlock:
    """The raw counts of some cells of a source as a CSR matrix, with their obs rows and ids.

    Genes ascend within each cell, without repeats and without stored zeros. A block has the arrays of a CSR matrix, so
    you can pass it to `ScGPTProcessor.tokenize` directly.

    Some readers return a subclass that keeps the counts in a compact form and overrides `_gather`. Such a block builds
    `data`, `indices` and `indptr` for all cells when one of them is first used. Use `take` to work on a few cells at a
    time without that memory.

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
    def data(self) -> NDArray[Any]:
        """The counts, shape (entries,).

        A Census and a cache give uint16 where all counts fit, and float32 otherwise; other sources give float32.
        """
        return self._arrays[0]

    @property
    def indices(self) -> NDArray[Any]:
        """The gene of each count, shape (entries,).

        A Census and a cache give uint16 where all genes fit (of a Census also all counts), and int32 otherwise.
        """
        return self._arrays[1]

    @property
    def indptr(self) -> NDArray[Any]:
        """The offsets of the cells: cell i has entries `indptr[i]:indptr[i + 1]`. Shape (cells + 1,)."""
        return self._arrays[2]

    @cached_property
    def counts(self) -> csr_matrix:
        """The counts as scipy takes them, float32 with int32 genes; built once and kept. Shape (cells, genes)."""
        data, indices, indptr = self._arrays
        if indptr[-1] <= np.iinfo(np.int32).max:  # scipy wants both index arrays of one type
            indptr = indptr.astype(np.int32, copy=False)
        arrays = data.astype(np.float32, copy=False), indices.astype(np.int32, copy=False), indptr
        matrix = csr_matrix(arrays, shape=self.shape, copy=False)
        matrix.has_canonical_format = True  # a block promises it; scipy would look at every entry to find out
        return matrix

    def take(self, positions: Int64Array) -> "CellBlock":
        """Return the cells at the given positions, in this order, without unpacking the rest of the block.

        Args:
            positions: rows of this block, not cell ids. Shape (taken cells,).
        """
        obs, cell_ids = self.obs.iloc[positions], self.cell_ids[positions]
        return CellBlock(self._gather(positions), obs, cell_ids, n_genes=self.shape[1])

    def with_obs(self, columns: Sequence[str]) -> "CellBlock":
        """Return the same cells with only these obs columns. The counts are shared."""
        block = copy(self)
        block.obs = self.obs[list(columns)]
        return block

    @cached_property
    def _arrays(self) -> CsrArrays:
        """The CSR arrays of all cells, which a compact block gathers here and others receive in `__init__`."""
        return self._gather(np.arange(len(self)))

    def _gather(self, positions: Int64Array) -> CsrArrays:
        """Return the CSR arrays of the cells at the given positions."""
        data, indices, indptr = self._arrays
        starts, stops = indptr[positions], indptr[positions + 1]
        taken_indptr = np.concatenate([[0], np.cumsum(stops - starts, dtype=np.int64)])
        entries: Any
        if len(positions) and (np.diff(positions) == 1).all():
            entries = slice(starts[0], stops[-1])  # neighbouring cells, the common case: views, no copy
        else:
            entries = np.repeat(starts - taken_indptr[:-1], stops - starts) + np.arange(taken_indptr[-1])
        return data[entries], indices[entries], taken_indptr


def require_counts(counts: Any, where: str) -> None:
    """Raise unless every count is finite, whole and at least zero.

    Args:
        counts: sparse or dense matrix. Shape (cells, genes).
        where: names the matrix in the message, e.g. `"layer 'raw'"`.

    Raises:
        ValueError: a count is NaN or infinite, negative, or fractional.
    """
    matrix: Any = counts
    stored = np.asarray(matrix.data if issparse(counts) else matrix).ravel()
    if stored.dtype.kind in "ub":
        return
    for what, wrong in (
        ("not finite", ~np.isfinite(stored)),
        ("negative", stored < 0),
        ("fractional", stored != np.floor(stored)),
    ):
        if n_wrong := int(np.count_nonzero(wrong)):
            raise ValueError(
                f"expected raw counts (whole numbers >= 0), found {stored[wrong.argmax()]:g} and {n_wrong - 1:,} more "
                f"{what} values of {stored.size:,} in {where}; choose the layer with counts: --layer NAME "
                "(layer='NAME' in Python)"
            )


def name_layers(error: ValueError, others: Mapping[str, bool]) -> ValueError:
    """Return the error of `require_counts` with the other layers there are, and which of them look raw.

    Args:
        error: what `require_counts` raised.
        others: whether the counts look raw, for each layer but the one refused.
    """
    if not others:
        return ValueError(f"{error}; there is no other layer")
    raw = [f"--layer={name!r}" for name, looks_raw in others.items() if looks_raw]
    return ValueError(f"{error}; the other layers are {list(others)}, of which look raw: {' or '.join(raw) or 'none'}")


def require_cell_ids(cell_ids: Int64Array, known: NDArray[np.bool_]) -> Int64Array:
    """Return the ids as int64 after checking that each can be read, once.

    Args:
        cell_ids: the cells asked for, in any order. Shape (cells,).
        known: true at each id the source offers. Shape (largest id + 1,).

    Raises:
        ValueError: the ids are not a row of integers, one is asked twice, or one is not offered by the source.
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
            f"e.g. {unknown[:5].tolist()}; ask for ids from the index of `source.obs()`"
        )
    ascending = np.sort(ids)
    repeated = ascending[1:][ascending[1:] == ascending[:-1]]
    if len(repeated):
        raise ValueError(f"{len(repeated):,} cell ids are asked for more than once, e.g. {repeated[:5].tolist()}")
    return ids


def gene_hash(feature_ids: Iterable[str]) -> str:
    """Return a fingerprint of the genes and their order: the first 16 hexadecimal digits of a SHA-256."""
    return sha256("\n".join(feature_ids).encode()).hexdigest()[:16]
