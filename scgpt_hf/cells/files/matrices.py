"""Read rows of the matrices of a file as CSR, wherever they are: in memory, in HDF5 or in zarr, sparse or dense.

`layers.py` chooses the matrix with the counts. Numbers are converted to what scipy and pandas support: the byte order
of this machine, and at least 4 bytes for floats.
"""

import logging
from dataclasses import dataclass
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata.abc import CSCDataset, CSRDataset
from anndata.io import sparse_dataset
from scipy.sparse import csr_matrix, issparse, vstack

from scgpt_hf.cells.block import Int64Array, to_float32
from scgpt_hf.cells.files.elements import write_element
from scgpt_hf.cells.files.validation import translate_read_errors, validate_sparse

logger = logging.getLogger(__name__)

ROWS_COPIED = 8192
MOST_GAP = 16  # up to this many unwanted rows, reading through them is faster than a second read


@dataclass(frozen=True)
class UnusualCsr:
    """A CSR matrix on disk with numbers that scipy, and so anndata, refuses: big-endian, or float16.

    Attributes:
        group: the group of HDF5 or zarr.
        shape: cells, genes.
    """

    group: Any
    shape: tuple[int, int]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the numbers that are returned."""
        return _supported(self.group["data"].dtype)

    def __getitem__(self, rows: slice) -> csr_matrix:
        """Return consecutive rows."""
        start, stop, _ = rows.indices(self.shape[0])
        indptr = native(self.group["indptr"][start : stop + 1]).astype(np.int64)
        if len(indptr) != stop - start + 1 or not 0 <= indptr[0] <= indptr[-1] <= self.group["data"].shape[0]:
            raise ValueError(f"expected {self.shape[0] + 1} ascending numbers in indptr, found others")
        data, indices = (native(self.group[name][indptr[0] : indptr[-1]]) for name in ("data", "indices"))
        return csr_matrix((data, indices.astype(np.int64), indptr - indptr[0]), shape=(stop - start, self.shape[1]))


def open_matrix(matrix: Any) -> Any:
    """Return a matrix that can be sliced by rows; read one that is on disk and stored by columns into memory.

    Args:
        matrix: a dataset or group of HDF5 or zarr, or the `X` of an AnnData.
    """
    if isinstance(matrix, CSRDataset | CSCDataset):
        matrix = matrix.group
    if issparse(matrix) or not hasattr(matrix, "keys"):
        return matrix
    sparse = sparse_dataset(matrix)
    unusual = _supported(sparse.dtype) != sparse.dtype
    if sparse.format == "csr":
        return UnusualCsr(matrix, tuple(sparse.shape)) if unusual else sparse
    name = matrix.file.filename if hasattr(matrix, "file") else str(matrix.store_path)
    logger.warning(
        "%s: %s is stored by gene (CSC) and is read into memory; store it by cell (CSR) to leave it on disk",
        *(name, matrix.name),
    )
    if unusual:  # the transposed matrix has the same arrays
        return validate_sparse(UnusualCsr(matrix, tuple(sparse.shape[::-1]))[:], name).T.tocsr()
    return validate_sparse(sparse.to_memory(), name).tocsr()


def copy_matrix(source: Any, file: h5py.File, name: str) -> None:
    """Copy a matrix of zarr to an HDF5 file, a few thousand rows (of CSC: columns) at a time."""
    if not hasattr(source, "keys"):
        write_element(file, name, source[:ROWS_COPIED], dataset_kwargs={"maxshape": (None, *source.shape[1:])})
        file[name].resize(source.shape)
        for start in range(ROWS_COPIED, source.shape[0], ROWS_COPIED):
            file[name][start : start + ROWS_COPIED] = source[start : start + ROWS_COPIED]
        return
    sparse = sparse_dataset(source)
    by_row = sparse.format == "csr"
    for start in range(0, max(sparse.shape[0 if by_row else 1], 1), ROWS_COPIED):
        part = slice(start, start + ROWS_COPIED)
        found = sparse[part] if by_row else sparse[:, part]
        if start:
            sparse_dataset(file[name]).append(found)
        else:
            write_element(file, name, found)


def read_rows(matrix: Any, rows: Int64Array, name: str, *, whole: bool = True) -> csr_matrix:
    """Return some rows of a matrix as float32.

    Args:
        matrix: as `open_matrix` returns it, or in memory. Shape (all rows, columns).
        rows: row numbers, ascending. Shape (rows,).
        name: the file, for errors.
        whole: raise where float32 would make a fraction a whole number.

    Returns:
        The rows, shape (rows, columns). Entries may be repeated, or zero.

    Raises:
        ValueError: the file is damaged, or float32 would round a count.
    """
    if isinstance(matrix, np.ndarray):
        return csr_matrix(to_float32(matrix[rows], name, whole=whole))
    if issparse(matrix):
        return _as_float32(csr_matrix(matrix[rows]), name, whole=whole)
    runs = np.split(rows, np.flatnonzero(np.diff(rows) > MOST_GAP) + 1)
    read = [
        _as_float32(_read_run(matrix, int(run[0]), int(run[-1]) + 1, name)[run - run[0]], name, whole=whole)
        for run in runs
        if len(run)
    ]
    return vstack(read or [csr_matrix((0, matrix.shape[1]))], format="csr", dtype=np.float32)


def _read_run(matrix: Any, start: int, stop: int, name: str) -> csr_matrix:
    """Return consecutive rows of a file."""
    with translate_read_errors(name):
        found = matrix[start:stop]
        if not issparse(found):
            found = native(np.asarray(found))
        return csr_matrix(validate_sparse(found, name))


def _as_float32(counts: csr_matrix, name: str, *, whole: bool) -> csr_matrix:
    """Return a CSR matrix as float32; see `to_float32`."""
    data = to_float32(counts.data, name, whole=whole)
    return csr_matrix((data, counts.indices, counts.indptr), shape=counts.shape)


def native(values: Any) -> Any:
    """Return an array or a table with all numbers in a type that scipy and pandas support; others are not copied."""
    if not isinstance(values, pd.DataFrame):
        return values.astype(_supported(values.dtype), copy=False)
    table = values.copy(deep=False)
    for name, column in values.items():
        if isinstance(column.dtype, np.dtype) and _supported(column.dtype) != column.dtype:
            table[name] = native(column.to_numpy())
    return table


def _supported(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(np.float32) if dtype.kind == "f" and dtype.itemsize < 4 else dtype.newbyteorder("=")
