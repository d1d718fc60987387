"""The noun every source hands on: a block of cells with raw counts.

Decides what raw counts are and which cell ids may be asked for. It does not read anything: `source.py` opens,
its neighbours read.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix, issparse

Int64Array: TypeAlias = NDArray[np.int64]


class Rows(NamedTuple):
    """Raw counts of some cells: the arrays of a CSR matrix, no wider than they must be.

    Genes ascend within each cell, without stored zeros.

    Attributes:
        data: the counts; of a Census or a cache uint16, or float32 where one does not fit. Shape (entries,).
        indices: their genes; of a Census or a cache uint16, or int32 where one, or of a Census a count, does not fit.
            Shape (entries,).
        indptr: where each cell begins and ends. Shape (cells + 1,).
        shape: (cells, genes).
    """

    data: NDArray[Any]
    indices: NDArray[Any]
    indptr: NDArray[Any]
    shape: tuple[int, int]


class CellBlock:
    """Some cells of a source, in the order they were asked for.

    Attributes:
        obs: the obs columns asked for, indexed by cell id. Shape (cells, columns).
        cell_ids: which cells these are, int64. Shape (cells,).
    """

    def __init__(
        self, counts: csr_matrix | Callable[[Int64Array], Rows], obs: pd.DataFrame, cell_ids: Int64Array
    ) -> None:
        """Put the parts together.

        Args:
            counts: raw counts of all cells; or what gathers those of the cells at some positions, which spares the
                memory of all.
            obs: their labels.
            cell_ids: which they are.
        """
        self._counts, self.obs, self.cell_ids = counts, obs, cell_ids

    def __len__(self) -> int:
        return len(self.cell_ids)

    @property
    def counts(self) -> csr_matrix:
        """Raw counts of all cells, float32 or integer; genes ascend within each cell, no stored zeros, no repeats.

        Shape (cells, genes).
        """
        counts = self._counts
        if callable(counts):
            counts = self._counts = _widen(counts(np.arange(len(self))))
        return counts

    def take(self, positions: Int64Array) -> Rows:
        """Return the counts of the cells at these positions, in this order."""
        counts = self._counts
        if callable(counts):
            return counts(positions)
        taken = counts[positions]
        return Rows(taken.data, taken.indices, taken.indptr, taken.shape)

    def with_obs(self, columns: Sequence[str]) -> "CellBlock":
        """Return the same cells with only these columns of obs."""
        return CellBlock(self._counts, self.obs[list(columns)], self.cell_ids)


def _widen(rows: Rows) -> csr_matrix:
    """Return rows as scipy takes them: int32 genes, float32 counts. Shape (cells, genes)."""
    indptr = rows.indptr
    if indptr[-1] <= np.iinfo(np.int32).max:  # scipy wants both index arrays of one type
        indptr = indptr.astype(np.int32)
    counts, genes = rows.data.astype(np.float32, copy=False), rows.indices.astype(np.int32, copy=False)
    matrix = csr_matrix((counts, genes, indptr), shape=rows.shape, copy=False)
    matrix.has_sorted_indices = True
    return matrix


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
