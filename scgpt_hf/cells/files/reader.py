"""`AnnDataSource`: the cells of files, read from disk on demand, or of an AnnData in memory.

This module joins several files by gene id. `contents.py` opens a file, `layers.py` finds its raw counts. Counts of
`.h5ad` and `.zarr` files stay on disk: memory holds `obs` and the cells of one read. To train on millions of cells,
build a SOMA (`soma/build.py`) or a cache of the files first.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix, vstack

from scgpt_hf.cells.block import CHUNK_SIZE, CellBlock, Int64Array, gene_hash, require_cell_ids, require_counts
from scgpt_hf.cells.files.contents import Contents, contents_of, open_contents, require_readable_files
from scgpt_hf.cells.files.layers import choose_layer
from scgpt_hf.cells.files.matrices import read_rows
from scgpt_hf.cells.genes import find_gene_ids, join_genes
from scgpt_hf.cells.obs import (
    add_primary_filter,
    drop_unused_categories,
    find_matching_rows,
    name_columns_as_text,
    require_columns,
)
from scgpt_hf.cells.presence import Presence

logger = logging.getLogger(__name__)

EXACT_IN_FLOAT32 = 2**24  # float32 holds all whole numbers up to this one


@dataclass(frozen=True)
class AnnDataPart:
    """One open file, or one AnnData.

    Attributes:
        name: the path of the file, or "AnnData".
        kind: "anndata", "h5ad", "zarr", "10x", "loom" or "text".
        layer: the layer with the raw counts.
        counts: raw counts, in memory or on disk. Shape (cells, genes).
        obs: all columns of all cells. Shape (cells, columns).
        genes: `feature_id`, `feature_name`, `feature_length`; row i describes column i of the counts.
        close: closes the file.
        round_counts: whether fractional counts are rounded.
        contents: all layers and tables of the file.
    """

    name: str
    kind: str
    layer: str
    counts: Any
    obs: pd.DataFrame
    genes: pd.DataFrame
    close: Callable[[], None]
    round_counts: bool
    contents: Contents

    def read(self, rows: Int64Array) -> csr_matrix:
        """Return the raw counts of some rows as float32.

        Args:
            rows: row numbers, ascending. Shape (rows,).

        Returns:
            Counts with the columns of the file, without stored zeros. Shape (rows, genes).

        Raises:
            ValueError: a value is no raw count, or the file is damaged.
        """
        counts = read_rows(self.counts, rows, self.name, whole=not self.round_counts)
        require_counts(counts, self.name, whole=not self.round_counts)
        if _sum_repeated(counts, self.name):
            _warn_of_repeats(self.name)
        if self.round_counts:
            np.rint(counts.data, out=counts.data)
        counts.eliminate_zeros()
        return counts


class AnnDataSource:
    """The cells of one or several files, or of one AnnData; see `CellSource` for the members.

    The cell ids are 0, 1, 2, … over all files in order, before filtering.
    """

    chunk_size = CHUNK_SIZE
    cells_at_once = 0

    def __init__(
        self,
        data: AnnData | str | Path | Sequence[str | Path],
        *,
        obs_filter: str | None = None,
        layer: str | None = None,
        primary_only: bool = True,
        round_counts: bool = False,
    ) -> None:
        """Open the files, join their genes, and select the cells that match the filter.

        Args:
            data: an AnnData, which is not copied, or one or several paths of files; see `formats.py`.
            obs_filter: SOMA value filter.
            layer: the layer with the raw counts, or `.raw` for those of `AnnData.raw`. By default it is found; see
                `choose_layer`.
            primary_only: keep only cells with `is_primary_data == True`. The cells of a file without that column are
                kept.
            round_counts: round fractional counts to the nearest whole number, half to even, instead of raising.

        Raises:
            FileNotFoundError: a file does not exist.
            ValueError: a file is not valid, or has no raw counts in the layer; or no cell matches the filter.
        """
        self._settings: dict[str, Any] = {
            "data": data,
            "obs_filter": obs_filter,
            "layer": layer,
            "primary_only": primary_only,
            "round_counts": round_counts,
        }
        self.parts: list[AnnDataPart] = []
        try:
            self._open(data)
        except BaseException:
            self.close()
            raise

    def _open(self, data: AnnData | str | Path | Sequence[str | Path]) -> None:
        self.parts.extend(open_parts(data, self._settings["layer"], round_counts=self._settings["round_counts"]))
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
            part.close()

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
        _sum_repeated(counts, ", ".join(part.name for part in self.parts))  # columns of a file that have the same id
        return CellBlock.from_scipy(counts, self._obs.loc[cell_ids, list(columns)], cell_ids)

    def presence(self, cell_ids: Int64Array) -> Presence:
        """Return the genes of the file of each cell; see `CellSource.presence`."""
        measured = np.zeros((len(self.parts), len(self.genes)), np.bool_)
        for row, place in zip(measured, self._columns, strict=True):
            row[place] = True
        return Presence(np.searchsorted(self._starts, cell_ids, side="right") - 1, measured)

    def describe(self) -> dict[str, Any]:
        """Return the origin of the cells as JSON; see `CellSource.describe`."""
        rounded = {"round_counts": True} if self._settings["round_counts"] else {}
        return {
            "kind": "+".join(dict.fromkeys(part.kind for part in self.parts)),
            "paths": [part.name for part in self.parts],
            "census_version": None,
            "organism": None,
            "layer": ", ".join(dict.fromkeys(part.layer for part in self.parts)),
            **rounded,
            "obs_filter": self._filter,
            "n_cells": len(self._obs),
            "n_genes": len(self.genes),
            "gene_hash": gene_hash(self.genes["feature_id"]),
        }


def _sum_repeated(counts: csr_matrix, where: str) -> bool:
    """Sort each row by gene, add up the counts of a repeated gene, and return whether there was any.

    Args:
        counts: float32 counts, which are changed. Shape (cells, genes).
        where: the name of the file, for the error.

    Raises:
        ValueError: float32 may have rounded a sum.
    """
    n_stored = counts.nnz
    counts.sum_duplicates()
    if counts.nnz == n_stored:
        return False
    if (largest := counts.data.max()) >= EXACT_IN_FLOAT32:
        raise ValueError(
            f"{where}: the counts of a gene that occurs several times add up to {largest:.0f} in a cell, which float32 "
            "may have rounded; expected raw counts, whole numbers of up to 16,777,216"
        )
    return True


@cache
def _warn_of_repeats(name: str) -> None:
    """Log a warning, once for a file in a process."""
    logger.warning("%s has repeated entries: counts of the same cell and gene are added up, as by SciPy", name)


def open_parts(
    data: AnnData | str | Path | Sequence[str | Path], layer: str | None, *, round_counts: bool = False
) -> Iterator[AnnDataPart]:
    """Open files, or an AnnData, one after the other.

    Args:
        data: an AnnData, or one or several paths.
        layer: the layer with the raw counts; see `AnnDataSource`.
        round_counts: round fractional counts.

    Yields:
        Each file with its raw counts and gene ids.

    Raises:
        FileNotFoundError: a file does not exist.
        ValueError: a file is not valid, has no cells, no such layer, or no raw counts in it.
    """
    if isinstance(data, AnnData):
        yield _make_part(contents_of(data), layer, round_counts=round_counts)
        return
    paths = [Path(path) for path in ([data] if isinstance(data, str | Path) else data)]
    require_readable_files(paths)
    for path in paths:
        contents = open_contents(path)
        try:
            yield _make_part(contents, layer, round_counts=round_counts)
        except BaseException:
            contents.close()
            raise


def _make_part(contents: Contents, layer: str | None, *, round_counts: bool) -> AnnDataPart:
    """Return a file with its layer of raw counts."""
    if not len(contents.obs):
        raise ValueError(f"{contents.name} has no cells")
    chosen = choose_layer(contents, layer, round_counts=round_counts)
    return AnnDataPart(
        name=contents.name,
        kind=contents.kind,
        layer=chosen,
        counts=contents.matrices[chosen],
        obs=name_columns_as_text(contents.obs, contents.name),
        genes=find_gene_ids(contents.genes_of(chosen), contents.name),
        close=contents.close,
        round_counts=round_counts,
        contents=contents,
    )


def _join_obs(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    """Return the obs of all files, indexed by cell id, with text as categories."""
    names = dict.fromkeys(name for table in tables for name in table)
    # A column without any value has no type: it takes the type that the column has in the other files.
    filled = [table.dropna(axis="columns", how="all") for table in tables] if len(tables) > 1 else tables
    starts = np.cumsum([0, *map(len, tables)])
    placed = [
        table.set_axis(np.arange(start, start + len(table))) for table, start in zip(filled, starts, strict=False)
    ]
    # pandas warns where a table without columns, such as that of a 10x folder, is joined with columns of text.
    some = [table for table in placed if len(table.columns)] or placed
    obs = pd.concat(some).reindex(index=np.arange(starts[-1]), columns=list(names)).rename_axis("cell_id")
    for name in obs.select_dtypes(["object", "string"]):
        try:
            obs[name] = obs[name].astype("category")
        except TypeError:  # lists and dictionaries cannot be compared
            kind = type(obs.pop(str(name)).dropna().iloc[0]).__name__
            logger.warning("left out the obs column %r: its values are of type %s, not text or numbers", name, kind)
    if "is_primary_data" in obs:
        primary = obs["is_primary_data"]
        # Some files store the booleans as text. A value is missing if only other files have the column; the cells of a
        # file without it count as primary.
        obs["is_primary_data"] = primary.isna() | primary.isin([True, "True", "true", "TRUE"])
    return obs
