"""`AnnDataSource`: the cells of `.h5ad` files, read from disk on demand, or of an AnnData in memory.

This module finds the raw counts of a file, and joins several files by gene id. Counts stay on disk: memory holds `obs`
and the cells of one read. To train on millions of cells, build a SOMA (`soma/build.py`) or a cache of the files first.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
from anndata import AnnData
from anndata.io import read_elem, sparse_dataset
from scipy.sparse import csr_matrix, issparse, vstack

from scgpt_hf.cells.block import (
    CHUNK_SIZE,
    CellBlock,
    Int64Array,
    gene_hash,
    name_layers,
    require_cell_ids,
    require_counts,
)
from scgpt_hf.cells.files.probe import require_readable
from scgpt_hf.cells.files.validation import translate_read_errors, validate_sparse
from scgpt_hf.cells.genes import find_gene_ids, join_genes
from scgpt_hf.cells.obs import add_primary_filter, drop_unused_categories, find_matching_rows, require_columns

logger = logging.getLogger(__name__)

RAW = ".raw"  # the name of AnnData's `.raw` among the layers
CELLS_CHECKED = 1000  # first cells of a layer, by which it is checked for raw counts when a file is opened
MOST_GAP = 16  # up to this many unwanted rows, reading through them is faster than a second read


@dataclass(frozen=True)
class AnnDataPart:
    """One open file, or one AnnData.

    Attributes:
        name: the path of the file, or "AnnData".
        counts: raw counts, in memory or on disk. Shape (cells, genes).
        obs: all columns of all cells. Shape (cells, columns).
        genes: `feature_id`, `feature_name`, `feature_length`; row i describes column i of the counts.
        file: the HDF5 file that the counts are read from, or None for an AnnData.
    """

    name: str
    counts: Any
    obs: pd.DataFrame
    genes: pd.DataFrame
    file: h5py.File | None = None

    def read(self, rows: Int64Array) -> csr_matrix:
        """Return the raw counts of some rows as float32.

        Args:
            rows: row numbers, ascending. Shape (rows,).

        Returns:
            Counts with the columns of the file, without stored zeros. Shape (rows, genes).

        Raises:
            ValueError: a value is no raw count, or the file is damaged.
        """
        if issparse(self.counts) or isinstance(self.counts, np.ndarray):
            in_memory: Any = self.counts
            counts = csr_matrix(in_memory[rows], dtype=np.float32)
        else:
            runs = np.split(rows, np.flatnonzero(np.diff(rows) > MOST_GAP) + 1)
            read = [self._read_run(int(run[0]), int(run[-1]) + 1)[run - run[0]] for run in runs if len(run)]
            counts = vstack(read or [csr_matrix((0, self.counts.shape[1]))], format="csr", dtype=np.float32)
        require_counts(counts, self.name)
        counts.sum_duplicates()
        counts.eliminate_zeros()
        return counts

    def _read_run(self, start: int, stop: int) -> csr_matrix:
        """Return consecutive rows of a file."""
        with translate_read_errors(self.name):
            return csr_matrix(validate_sparse(self.counts[start:stop], self.name))


class AnnDataSource:
    """The cells of one or several `.h5ad` files, or of one AnnData; see `CellSource` for the members.

    The cell ids are 0, 1, 2, … over all files in order, before filtering.
    """

    chunk_size = CHUNK_SIZE

    def __init__(
        self,
        data: AnnData | str | Path | Sequence[str | Path],
        *,
        obs_filter: str | None = None,
        layer: str | None = None,
        primary_only: bool = True,
    ) -> None:
        """Open the files, join their genes, and select the cells that match the filter.

        Args:
            data: an AnnData, which is not copied, or one or several paths.
            obs_filter: SOMA value filter.
            layer: the layer with the raw counts, or `.raw` for those of `AnnData.raw`. The default is `X`.
            primary_only: keep only cells with `is_primary_data == True`. The cells of a file without that column are
                kept.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file is no valid `.h5ad` file, has or no raw counts in the layer; or no cell matches the
                filter.
        """
        self._settings: dict[str, Any] = {
            "data": data,
            "obs_filter": obs_filter,
            "layer": layer,
            "primary_only": primary_only,
        }
        self.parts: list[AnnDataPart] = []
        try:
            self._open(data, layer)
        except BaseException:
            self.close()
            raise

    def _open(self, data: AnnData | str | Path | Sequence[str | Path], layer: str | None) -> None:
        self.parts.extend(open_parts(data, layer))
        genes, self._columns = join_genes([part.genes for part in self.parts])
        self.genes = genes[["feature_id", "feature_name"]]
        self._starts = np.cumsum([0, *(len(part.obs) for part in self.parts)])
        obs = _join_obs([part.obs for part in self.parts])
        self.obs_columns = [str(name) for name in obs]
        self._filter = add_primary_filter(
            self._settings["obs_filter"], self.obs_columns, primary_only=self._settings["primary_only"]
        )
        rows = find_matching_rows(obs, self._filter)
        self._obs = drop_unused_categories(obs.iloc[rows])
        self._selected = np.zeros(len(obs), dtype=np.bool_)
        self._selected[rows] = True

    def __enter__(self) -> "AnnDataSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; the source cannot be read afterwards."""
        for part in self.parts:
            if part.file is not None:
                part.file.close()

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the cells that match the filter; see `CellSource.obs`."""
        require_columns(columns, self.obs_columns)
        return self._obs[list(columns)].copy()

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Return the given cells in the given order; see `CellSource.read`."""
        cell_ids = require_cell_ids(cell_ids, self._selected)
        require_columns(columns, self.obs_columns)
        order = np.argsort(cell_ids)  # each file is read once, by ascending row
        edges = np.searchsorted(cell_ids[order], self._starts)
        blocks = []
        for part, place, start, rows in zip(
            self.parts, self._columns, self._starts, np.split(cell_ids[order], edges[1:-1]), strict=False
        ):
            counts = part.read(rows - start)
            shape = (len(rows), len(self.genes))
            blocks.append(csr_matrix((counts.data, place[counts.indices], counts.indptr), shape=shape))
        counts = vstack(blocks, format="csr")[np.argsort(order)]
        counts.sum_duplicates()  # sorts the genes, and sums columns of a file that have the same id
        return CellBlock.from_scipy(counts, self._obs.loc[cell_ids, list(columns)], cell_ids)

    def describe(self) -> dict[str, Any]:
        """Return the origin of the cells as JSON; see `CellSource.describe`."""
        names = [part.name for part in self.parts]
        return {
            "kind": "anndata" if isinstance(self._settings["data"], AnnData) else "h5ad",
            "paths": names,
            "census_version": None,
            "organism": None,
            "layer": self._settings["layer"] or "X",
            "obs_filter": self._filter,
            "n_cells": len(self._obs),
            "n_genes": len(self.genes),
            "gene_hash": gene_hash(self.genes["feature_id"]),
        }


def open_parts(data: AnnData | str | Path | Sequence[str | Path], layer: str | None) -> Iterator[AnnDataPart]:
    """Open files, or an AnnData, one after the other.

    Args:
        data: an AnnData, or one or several paths.
        layer: the layer with the raw counts; see `AnnDataSource`.

    Yields:
        Each file with its raw counts and gene ids.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is no valid `.h5ad` file, has no cells, no such layer, or no raw counts in it.
    """
    if isinstance(data, AnnData):
        raw = {} if data.raw is None else {RAW: data.raw.X}
        var = data.var if data.raw is None else data.raw.var
        yield _make_part("AnnData", {"X": data.X, **data.layers, **raw}, data.obs, {"X": data.var, RAW: var}, layer)
        return
    paths = [str(path) for path in ([data] if isinstance(data, str | Path) else data)]
    require_readable(paths)
    for path in paths:
        with translate_read_errors(path):
            file = h5py.File(path, "r")
        try:
            yield _open_part(file, path, layer)
        except BaseException:
            file.close()
            raise


def _open_part(file: h5py.File, name: str, layer: str | None) -> AnnDataPart:
    with translate_read_errors(name):
        frames = {"X": read_elem(file["var"]), RAW: read_elem(file["raw/var"]) if "raw/var" in file else None}
        obs = read_elem(file["obs"])
        for table, what in ((obs, "obs"), (frames["X"], "var")):
            if not isinstance(table, pd.DataFrame):
                raise ValueError(f"expected a dataframe at {what!r}, found {type(table).__name__}")
        found = {"X": file.get("X"), **file.get("layers", {}), RAW: file.get("raw/X")}
        matrices = {name: _on_disk(matrix) for name, matrix in found.items() if matrix is not None}
        return replace(_make_part(name, matrices, obs, frames, layer), file=file)


def _make_part(
    name: str, matrices: Mapping[str, Any], obs: pd.DataFrame, frames: Mapping[str, pd.DataFrame], layer: str | None
) -> AnnDataPart:
    """Return a file with its chosen layer, after checking that the first cells of the layer are raw counts.

    Args:
        name: the path, for errors.
        matrices: the layers by name, with `X` and `RAW`.
        obs: the cells.
        frames: the genes of `X`, which are those of all layers, and of `RAW`.
        layer: the requested layer, or None for `X`.
    """
    chosen = layer or "X"
    if chosen not in matrices and chosen == "raw":
        chosen = RAW
    if matrices.get(chosen) is None:
        raise ValueError(f"{name} has no layer {chosen!r}; its layers are {list(matrices)}")
    if not len(obs):
        raise ValueError(f"{name} has no cells")
    matrix, var = matrices[chosen], frames[RAW if chosen == RAW else "X"]
    if tuple(matrix.shape) != (len(obs), len(var)) or matrix.dtype.kind not in "biuf":
        raise ValueError(
            f"{name}: expected a numeric matrix of shape (cells, genes) = ({len(obs)}, {len(var)}) in layer "
            f"{chosen!r}, found {matrix.dtype} of shape {tuple(matrix.shape)}"
        )
    try:
        require_counts(_head(matrices[chosen]), f"layer {chosen!r} of {name}")
    except ValueError as error:
        others = {other: _looks_raw(matrix) for other, matrix in matrices.items() if other != chosen}
        raise name_layers(error, others) from error
    return AnnDataPart(name, matrix, obs, find_gene_ids(var, name))


def _on_disk(matrix: h5py.Group | h5py.Dataset) -> Any:
    """Return a matrix of a file that can be sliced by rows; read one that is stored by columns into memory."""
    if isinstance(matrix, h5py.Dataset):
        return matrix
    sparse = sparse_dataset(matrix)
    if sparse.format == "csr":
        return sparse
    logger.warning(
        "%s%s is stored by gene (CSC) and is read into memory; store it by cell (CSR) to leave it on disk",
        *(matrix.file.filename, matrix.name),
    )
    return validate_sparse(sparse.to_memory(), matrix.file.filename).tocsr()


def _head(matrix: Any) -> Any:
    """Return the first cells of a layer."""
    return matrix[: min(CELLS_CHECKED, matrix.shape[0])]


def _looks_raw(matrix: Any) -> bool:
    """Return whether a layer can be suggested in the error for one that does not hold raw counts."""
    if len(matrix.shape) != 2 or matrix.dtype.kind not in "biuf":
        return False
    try:
        require_counts(_head(matrix), "")
    except ValueError:
        return False
    return True


def _join_obs(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the obs of all files, indexed by cell id, with text as categories."""
    names = dict.fromkeys(name for table in tables for name in table)
    # A column without any value has no type of its own: it takes the type that the column has in the other files.
    filled = [table.dropna(axis="columns", how="all") for table in tables] if len(tables) > 1 else tables
    obs = pd.concat(filled, ignore_index=True).reindex(columns=list(names)).rename_axis("cell_id")
    obs.index = obs.index.astype(np.int64)
    for name in obs.select_dtypes(["object", "string"]):
        obs[name] = obs[name].astype("category")
    if "is_primary_data" in obs:
        primary = obs["is_primary_data"]
        # Some files store the booleans as text. A value is missing if only other files have the column; the cells of a
        # file without it count as primary.
        obs["is_primary_data"] = primary.isna() | primary.isin([True, "True", "true"])
    return obs
