"""Validate what is read from a file, and turn the errors of other libraries into ours.

`reader.py` decides which parts of a file are read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.sparse import issparse

from scgpt_hf.cells.files.read_errors import explain_read_error


@contextmanager
def translate_read_errors(name: str, what: str = "an .h5ad file") -> Iterator[None]:
    """Turn the errors of h5py, zarr, anndata and scanpy into an error that names the file and explains the cause.

    Args:
        name: the path of the file. An error that contains it already passes unchanged.
        what: what the file is read as.

    Raises:
        OSError: the operating system denies reading, e.g. because another program has locked the file.
        ValueError: the file is of another kind, or damaged.
    """
    try:
        yield
    except Exception as error:  # on damaged files, h5py and anndata raise many unrelated types; the cause is kept
        if isinstance(error, ValueError | PermissionError) and name in str(error):
            raise
        raise explain_read_error(error, name, what) from error


def validate_sparse(matrix: Any, where: str) -> Any:
    """Return a matrix after checking that the arrays of a sparse one are consistent.

    Args:
        matrix: CSR, CSC or dense.
        where: the name of the file, for the error.

    Raises:
        ValueError: an index or an offset of a sparse matrix is out of range.
    """
    # scipy trusts these arrays: compiled code would read outside of its memory.
    if not issparse(matrix):
        return matrix
    n_major, n_minor = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    indptr, indices = matrix.indptr, matrix.indices
    fits = len(indptr) == n_major + 1 and indptr[0] == 0 and indptr[-1] == len(indices) == len(matrix.data)
    if not fits or (np.diff(indptr) < 0).any():
        raise ValueError(
            f"{where}: expected an indptr of {n_major + 1:,} ascending numbers from 0 to {len(indices):,}, the number "
            f"of indices, found {len(indptr):,} numbers from {indptr[:1]} to {indptr[-1:]}, and {len(matrix.data):,} "
            "values"
        )
    if len(indices) and (indices.min() < 0 or indices.max() >= n_minor):
        raise ValueError(
            f"{where}: expected indices from 0 to {n_minor - 1:,}, found {indices.min()} to {indices.max()}"
        )
    return matrix
