"""Open files of cells, and describe their contents in one form, whatever the format.

`formats.py` decides how a path is read. `layers.py` chooses one of the matrices that are found here, and `reader.py`
reads cells.
"""

import gzip
import logging
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import anndata
import h5py
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem

from scgpt_hf.cells.files.elements import write_element
from scgpt_hf.cells.files.formats import SUPPORTED, Format, find_format
from scgpt_hf.cells.files.loom_and_text import read_loom, read_text_table
from scgpt_hf.cells.files.matrices import copy_matrix, native, open_matrix
from scgpt_hf.cells.files.probe import require_readable
from scgpt_hf.cells.files.tenx import read_10x_folder, read_10x_hdf5
from scgpt_hf.cells.files.validation import translate_read_errors

logger = logging.getLogger(__name__)

RAW = ".raw"  # the name of AnnData's `.raw` among the layers


# Formats that are read into memory and are no HDF5 → the kind of the source, and the function that reads a path.
_READ_INTO_MEMORY: dict[Format | None, tuple[str, Callable[[Path], AnnData]]] = {
    "10x matrix": ("10x", read_10x_folder),
    "text": ("text", read_text_table),
}


def _nothing() -> None:
    pass


@dataclass(frozen=True)
class Contents:
    """The tables and matrices of one file or one AnnData. Matrices are in memory or on disk; all can be sliced by rows.

    Attributes:
        name: the path of the file, or "AnnData".
        kind: "anndata", "h5ad", "zarr", "10x", "loom" or "text".
        matrices: the layers by name, with "X" and `.raw`; those that the file does not have are absent.
        obs: all columns of all cells. Shape (cells, columns).
        var: the genes of "X" and of the layers. Shape (genes, columns).
        raw_var: the genes of `.raw`, or None.
        close: closes the file.
    """

    name: str
    kind: str
    matrices: Mapping[str, Any]
    obs: pd.DataFrame
    var: pd.DataFrame
    raw_var: pd.DataFrame | None
    close: Callable[[], None] = _nothing

    def genes_of(self, layer: str) -> pd.DataFrame:
        """Return the genes of the columns of a layer."""
        return self.raw_var if layer == RAW and self.raw_var is not None else self.var


def require_readable_files(paths: Sequence[Path]) -> None:
    """Raise if the HDF5 library crashes or hangs on a file; one child process checks all that are not compressed.

    Raises:
        ChildProcessError, FileNotFoundError, ValueError: see `require_readable`.
    """
    plain = [path for path in paths if path.suffix.lower() != ".gz" and find_format(path) in ("hdf5", "loom")]
    require_readable([str(path) for path in plain])


def open_contents(path: str | Path) -> Contents:
    """Open a file of any supported format.

    Raises:
        OSError: the file does not exist, or there is no space to decompress it.
        ValueError: the format is not supported, or the file is not valid.
    """
    path = Path(path)
    found = find_format(path)
    if found is None:
        raise ValueError(f"cannot read {str(path)!r}; expected {SUPPORTED}")
    if found == "zarr":
        import zarr

        with translate_read_errors(str(path), "an AnnData in zarr format"):
            group = zarr.open_group(path, mode="r")
        return _open_groups(group, str(path), "zarr")
    if found in _READ_INTO_MEMORY:
        kind, read = _READ_INTO_MEMORY[found]
        return contents_of(read(path), str(path), kind)
    with decompressed(path) as plain:
        if in_memory := _read_hdf5(plain, str(path), found):
            return contents_of(in_memory, str(path), "loom" if found == "loom" else "10x")
        with translate_read_errors(str(path)):
            file = h5py.File(plain, "r")
        try:
            return _open_groups(file, str(path), "h5ad")
        except BaseException:
            file.close()
            raise


def open_anndata(path: str | Path) -> AnnData:
    """Open a file of any supported format as an AnnData; `X` and the layers stay on disk where the format allows it.

    Raises:
        OSError: the file does not exist, or there is no space to decompress it.
        ValueError: the format is not supported, or the file is not valid.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file {path}")
    found = find_format(path)
    if found == "zarr":
        import zarr

        with translate_read_errors(str(path), "an AnnData in zarr format"):
            group: Any = zarr.open_group(path, mode="r")
            parts = {name: read_elem(group[name]) for name in ("obs", "var", "obsm", "uns") if name in group}
            layers = {name: open_matrix(group[f"layers/{name}"]) for name in group.get("layers", {})}
            raw = {"X": open_matrix(group["raw/X"]), "var": read_elem(group["raw/var"])} if "raw/X" in group else None
            return AnnData(open_matrix(group["X"]) if "X" in group else None, layers=layers, raw=raw, **parts)
    if found in _READ_INTO_MEMORY:
        return _READ_INTO_MEMORY[found][1](path)
    with decompressed(path) as plain:
        if in_memory := _read_hdf5(plain, str(path), found):
            return in_memory
        with translate_read_errors(str(path)), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # on files of old versions, which are read all the same
            return anndata.read_h5ad(plain, backed="r")


def copy_as_h5ad(path: Path, target: Path) -> None:
    """Copy a file of any supported format to an `.h5ad` file; matrices that are on disk are copied by parts.

    Raises:
        OSError, ValueError: see `open_contents`.
    """
    found = find_format(path)
    if found == "zarr":
        import zarr

        with translate_read_errors(str(path), "an AnnData in zarr format"), h5py.File(target, "w") as file:
            _copy_group(zarr.open_group(path, mode="r"), file)
        return
    if found in _READ_INTO_MEMORY:
        _READ_INTO_MEMORY[found][1](path).write_h5ad(target)
        return
    with decompressed(path) as plain:
        if in_memory := _read_hdf5(plain, str(path), found):
            in_memory.write_h5ad(target)
        else:
            shutil.copyfile(plain, target)


def _read_hdf5(plain: Path, name: str, found: Format | None) -> AnnData | None:
    """Return the cells of an HDF5 file that is read into memory, or None for an AnnData, which stays on disk."""
    require_readable([str(plain)], [name])
    if found == "loom":
        return read_loom(plain, name)
    return read_10x_hdf5(plain, name) if found == "hdf5" and _is_10x(plain, name) else None


def _copy_group(source: Any, file: h5py.File) -> None:
    """Copy an AnnData in zarr format to an HDF5 file."""
    file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
    matrices = [
        name for name in ("X", "raw/X", *(f"layers/{name}" for name in source.get("layers", {}))) if name in source
    ]
    others = [name for name in source if name not in ("X", "layers", "raw")]
    others += [f"raw/{name}" for name in source.get("raw", {}) if name != "X"]
    if "raw" in source:
        write_element(file, "raw", {})
        file["raw"].attrs.update({"encoding-type": "raw", "encoding-version": "0.1.0"})
    write_element(file, "layers", {})
    with anndata.settings.override(allow_write_nullable_strings=True):
        for name in others:
            write_element(file, name, read_elem(source[name]))
    for name in matrices:
        copy_matrix(source[name], file, name)


def contents_of(adata: AnnData, name: str = "AnnData", kind: str = "anndata") -> Contents:
    """Return the contents of an AnnData, which is not copied."""
    layers = {
        layer: adata.layers[layer] for layer in adata.layers if layer is not None
    }  # from anndata 0.13 on, None is X
    found = {"X": adata.X, **layers, RAW: None if adata.raw is None else adata.raw.X}
    matrices = {layer: open_matrix(matrix) for layer, matrix in found.items() if matrix is not None}
    raw_var = None if adata.raw is None else adata.raw.var
    return Contents(name, kind, matrices, native(adata.obs), native(adata.var), raw_var)


@contextmanager
def decompressed(path: Path) -> Iterator[Path]:
    """Give a plain file for a path; a `.gz` file is decompressed for the duration of the context.

    On POSIX, a file that was opened within the context can be read after it.

    Raises:
        OSError: there is no space.
        ValueError: the file is not a complete gzip file.
    """
    if path.suffix.lower() != ".gz":
        yield path
        return
    with TemporaryDirectory(prefix="scgpt_hf-") as scratch:
        plain = Path(scratch) / path.stem
        logger.info("decompressing %s into %s", path, scratch)
        try:
            with gzip.open(path) as source, plain.open("wb") as target:
                shutil.copyfileobj(source, target, 2**20)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"cannot decompress {str(path)!r}: {error}; download it again") from error
        except OSError as error:
            raise OSError(
                error.errno, f"cannot decompress {str(path)!r} into {scratch} ({error}); set TMPDIR to a larger disk"
            ) from error
        yield plain


def _open_groups(file: Any, name: str, kind: str) -> Contents:
    """Return the contents of an AnnData on disk, whose groups are those of HDF5 or of zarr."""
    with translate_read_errors(name, "an .h5ad file" if kind == "h5ad" else "an AnnData in zarr format"):
        old = any(isinstance(file.get(table), h5py.Dataset) for table in ("obs", "var"))
        obs, var, raw_var = _read_old_tables(file.filename) if old else _read_tables(file)
        for table, what in ((obs, "obs"), (var, "var")):
            if not isinstance(table, pd.DataFrame):
                raise ValueError(f"expected a dataframe at {what!r}, found {type(table).__name__}")
        found = {"X": file.get("X"), **file.get("layers", {}), RAW: file.get("raw.X" if "raw.X" in file else "raw/X")}
        matrices = {layer: open_matrix(matrix) for layer, matrix in found.items() if matrix is not None}
        return Contents(name, kind, matrices, native(obs), native(var), raw_var, getattr(file, "close", _nothing))


def _read_tables(file: Any) -> tuple[Any, Any, Any]:
    """Return obs, var and the var of `.raw`, or None."""
    var, raw_var = read_elem(file["var"]), read_elem(file["raw/var"]) if "raw/var" in file else None
    return read_elem(file["obs"]), var, raw_var


def _read_old_tables(path: str) -> tuple[Any, Any, Any]:
    """Return the same of a file of anndata 0.6, which stored tables as compound arrays and their categories in uns."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # advises to write the file again
        adata = anndata.read_h5ad(path, backed="r")
    try:
        return adata.obs, adata.var, None if adata.raw is None else adata.raw.var
    finally:
        adata.file.close()


def _is_10x(path: Path, name: str) -> bool:
    """Return whether an HDF5 file is one of 10x, and not an AnnData."""
    if path.suffix.lower() == ".h5ad":
        return False
    with translate_read_errors(name, "an HDF5 file"), h5py.File(path, "r") as file:
        return "obs" not in file
