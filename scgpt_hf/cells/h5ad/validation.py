"""Whether what was read from a file can be trusted, and one kind of error for all that damaged files make others raise.

Which files are read, and what they must hold, is decided in `h5ad.py`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from scipy.sparse import issparse


@contextmanager
def translate_read_errors(name: str) -> Iterator[None]:
    """Turn what h5py and anndata raise on a damaged file into an error that names it; ours pass.

    Raises:
        PermissionError: the file may not be read.
        ValueError: the file cannot be read as h5ad.
    """
    try:
        yield
    except Exception as error:  # h5py and anndata raise anything; the cause is kept
        if isinstance(error, ValueError | PermissionError) and name in str(error):
            raise
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(
            f"cannot read {name!r} as an .h5ad file: {said}; is it whole? Copy it again, or write it anew with anndata"
        ) from error


def validate_sparse(matrix: Any, where: str) -> Any:
    """Return a matrix, if sparse with its parts checked: scipy reads beyond its memory where they do not fit together.

    Raises:
        ValueError: what is wrong.
    """
    if not issparse(matrix):
        return matrix
    n_major, n_minor = matrix.shape if matrix.format == "csr" else matrix.shape[::-1]
    indptr, indices = matrix.indptr, matrix.indices
    fits = len(indptr) == n_major + 1 and indptr[0] == 0 and indptr[-1] == len(indices) == len(matrix.data)
    if not fits or (np.diff(indptr) < 0).any():
        raise ValueError(
            f"{where}: expected indptr of {n_major + 1:,} numbers ascending from 0 to {len(indices):,}, the number of "
            f"indices, found {len(indptr):,} from {indptr[:1]} to {indptr[-1:]}, and {len(matrix.data):,} values"
        )
    if len(indices) and (indices.min() < 0 or indices.max() >= n_minor):
        raise ValueError(
            f"{where}: expected indices from 0 to {n_minor - 1:,}, found {indices.min()} to {indices.max()}"
        )
    return matrix
