"""Decide from a path how the file is read. This module is imported for every source, so it imports no library.

| path | format | reader | counts |
| --- | --- | --- | --- |
| `.h5ad`, also of anndata 0.6 | hdf5 | anndata | stay on disk |
| `.h5ad.gz` | hdf5 | anndata, after decompressing it to a temporary file | stay on disk |
| folder `.zarr` | zarr | anndata | stay on disk |
| `.h5` of 10x, also `.h5.gz` | hdf5 | `scanpy.read_10x_h5` | in memory |
| folder with `matrix.mtx`, or that file, plain or `.gz` | 10x matrix | `scanpy.read_10x_mtx` | in memory |
| `.loom` | loom | `anndata.io.read_loom`, with loompy | in memory |
| `.csv`, `.tsv`, `.txt`, plain or `.gz`: a table of counts | text | pandas | in memory |

Letter case does not matter in suffixes. `contents.py` opens files, with `tenx.py` and `loom_and_text.py`.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Literal, TypeAlias

Format: TypeAlias = Literal["hdf5", "zarr", "10x matrix", "loom", "text"]

SUPPORTED = ".h5ad (also .gz), .zarr, .h5 of 10x, a 10x folder with matrix.mtx, .loom, or counts as .csv or .tsv"
MATRIX = "matrix.mtx"
_SUFFIXES: dict[Format, tuple[str, ...]] = {
    "hdf5": (".h5ad", ".h5", ".hdf5"),
    "10x matrix": (MATRIX,),
    "loom": (".loom",),
    "text": (".csv", ".tsv", ".txt"),
}


def find_format(path: Path) -> Format | None:
    """Return how a path is read, or None if it is no file of cells. Contents are not read.

    Example:
        >>> find_format(Path("CELLS.H5AD.gz"))
        'hdf5'
    """
    name = path.name.lower()
    if path.is_dir():
        if name.endswith(".zarr") or any((path / file).exists() for file in ("zarr.json", ".zgroup", ".zattrs")):
            return "zarr"
        return "10x matrix" if matrix_files(path) else None
    plain = name.removesuffix(".gz")
    return next((found for found, suffixes in _SUFFIXES.items() if plain.endswith(suffixes)), None)


def matrix_files(folder: Path) -> list[str]:
    """Return the names of the files `matrix.mtx` in a folder, which may have prefixes."""
    return sorted(path.name for path in folder.iterdir() if path.name.lower().endswith((MATRIX, f"{MATRIX}.gz")))


def name_files(paths: Sequence[str | Path]) -> list[str]:
    """Return a name for each file: its name without suffix, or the name of its folder where several files share it.

    The folder is the nearest one that differs between these files. If no single folder does, all folders that are not
    common to them are joined.

    Args:
        paths: the files.

    Example:
        >>> name_files(["s1/outs/filtered.h5ad", "s2/outs/filtered.h5ad", "blood.h5ad.gz"])
        ['s1', 's2', 'blood']
    """
    suffix = r"(?i)(\.(h5ad|h5|hdf5|zarr|mtx|loom|csv|tsv|txt))?(\.gz)?$"
    names = [re.sub(suffix, "", Path(path).name) for path in paths]
    for name in {name for name in names if names.count(name) > 1}:
        same = [index for index, other in enumerate(names) if other == name]
        parents = [Path(paths[index]).absolute().parent for index in same]
        levels = zip(*(reversed(parent.parts) for parent in parents), strict=False)
        distinct = next((level for level in levels if len(set(level)) == len(level)), None)
        common = os.path.commonpath(parents)
        for place, index in enumerate(same):
            names[index] = distinct[place] if distinct else "_".join(parents[place].relative_to(common).parts) or name
    return names
