"""Add obs columns, embeddings and reports to a copy of an `.h5ad` file. Nothing else of the file is written again.

What a file has may be stored in types that the installed anndata reads but does not write, such as nullable text.
"""

import errno
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import h5py
import numpy as np
import pandas as pd
from anndata import OldFormatWarning
from anndata.io import write_elem

from scgpt_hf.cells.files.contents import copy_as_h5ad, open_anndata
from scgpt_hf.cells.files.elements import write_element
from scgpt_hf.cells.files.validation import translate_read_errors
from scgpt_hf.output import require_writable_file

_ROWS_KEPT = 2**16  # rows of an array that are in memory at the same time


@contextmanager
def open_copy(path: str | Path, out: str | Path, *, overwrite: bool) -> Iterator[h5py.File]:
    """Copy a file of cells to an .h5ad file, and open the copy for additions. It becomes `out` when the block ends.

    The copy is made first, so a folder without permission or space raises an error before anything is computed. If the
    block raises, the copy is removed.

    Args:
        path: the file.
        out: the copy; may be `path` itself.
        overwrite: replace `out`.

    Yields:
        The copy, which has the groups obs, obsm and uns.

    Raises:
        OSError: `out` cannot be written; see `require_writable_file`. If this is found only at the end, for example
            because another run has written `out` in the meantime, the copy is kept beside it and named in the error.
        ValueError: the file is damaged.
    """
    out = Path(out)
    require_writable_file(out, overwrite=overwrite)
    # In the same folder, because a file can be renamed in one step only within a file system.
    # Two runs may write the same file at the same time: each writes a separate copy.
    temporary = out.with_name(f".{out.name}.{uuid4().hex[:8]}.part")
    try:
        try:
            copy_as_h5ad(Path(path), temporary)
        except OSError as error:
            raise OSError(error.errno, f"cannot copy {path} to {out}: {error.strerror}; make room there") from error
        with h5py.File(temporary, "r+") as file:
            with translate_read_errors(str(path)):
                _prepare_groups(file, path)
            yield file
        try:
            if not overwrite and out.exists():  # written by another run since the first look
                raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST))
            temporary.replace(out)
        except OSError as error:
            kept = out.with_name(f"{out.stem}.unsaved-{uuid4().hex[:8]}{out.suffix}")
            temporary.replace(kept)
            raise OSError(
                error.errno, f"{out} could not be written: {error.strerror}. The result is complete in {kept}"
            ) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_columns(file: h5py.File, columns: pd.DataFrame) -> None:
    """Write columns to obs of an open file; columns of the same name are replaced.

    Args:
        file: a file from `open_copy`.
        columns: the columns, in the order of the cells of the file. Shape (cells, columns).
    """
    obs = file["obs"]
    order = [name.decode() if isinstance(name, bytes) else str(name) for name in obs.attrs["column-order"]]
    for name, column in columns.items():
        write_elem(obs, str(name), column.array if isinstance(column.dtype, pd.CategoricalDtype) else column.to_numpy())
        order += [] if name in order else [str(name)]
    obs.attrs.create("column-order", order, dtype=h5py.string_dtype())


def create_rows(file: h5py.File, name: str, shape: tuple[int, int]) -> h5py.Dataset:
    """Create an array of NaN that anndata reads, without holding it in memory. Its space on the disk is taken now.

    Args:
        file: a file from `open_copy`.
        name: where in the file, such as "obsm/X_scgpt".
        shape: (cells, columns).

    Raises:
        OSError: the disk is full.
    """
    # anndata writes one row with its metadata; h5py then extends the array.
    row = np.full((1, shape[1]), np.nan, np.float32)
    write_element(file, name, row, dataset_kwargs={"maxshape": (None, shape[1]), "fillvalue": np.nan})
    rows = file[name]
    rows.resize(shape)
    for start in range(0, shape[0], _ROWS_KEPT):
        rows[start : start + _ROWS_KEPT] = np.nan
    file.flush()
    return rows


def write_plainly(folder: Path, additions: Mapping[str, Any]) -> None:
    """Write additions to a folder in formats that need no library: tables as CSV, arrays as .npy, the rest as JSON.

    Args:
        folder: an empty folder.
        additions: name → table, array or report.
    """
    for name, value in additions.items():
        path = folder / name.replace("/", "-")
        if isinstance(value, pd.DataFrame):
            value.to_csv(path.with_name(f"{path.name}.csv"))
        elif hasattr(value, "shape"):
            array = np.lib.format.open_memmap(
                path.with_name(f"{path.name}.npy"), mode="w+", dtype=value.dtype, shape=value.shape
            )
            for start in range(0, len(value), _ROWS_KEPT):
                array[start : start + _ROWS_KEPT] = value[start : start + _ROWS_KEPT]
            array.flush()
        else:
            path.with_name(f"{path.name}.json").write_text(json.dumps(value, indent=1, default=str), encoding="utf-8")


def _prepare_groups(file: h5py.File, path: str | Path) -> None:
    """Create the groups that a file lacks, and convert arrays of anndata before 0.7, to which nothing can be added."""
    for group in {"obsm", "uns"} - file.keys():
        write_elem(file, group, {})
    if isinstance(file["obs"], h5py.Dataset):
        with warnings.catch_warnings(action="ignore", category=OldFormatWarning):
            adata = open_anndata(path)
        adata.file.close()
        write_elem(file, "obs", adata.obs)
    if isinstance(file["obsm"], h5py.Dataset):
        arrays = file["obsm"][()]
        write_elem(file, "obsm", {name: arrays[name] for name in arrays.dtype.names})
