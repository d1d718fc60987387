"""`CacheSource`: the cells of a cache, a folder of shards that `cache_census.py` or the first epoch of a run wrote.

Cells can be read in any order at the same speed, so an epoch can shuffle over all of them. The shards are mapped into
memory after their hashes are verified. A block copies its cells from there when they are needed.
"""

import logging
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from scgpt_hf.cells.block import CellBlock, Int64Array, require_cell_ids
from scgpt_hf.cells.cache.manifest import MANIFEST, read_genes, read_manifest
from scgpt_hf.cells.cache.presence import read_presence
from scgpt_hf.cells.cache.shards import Shard, find_cells
from scgpt_hf.cells.jobs.records import REMEDY, ShardError, verify_shard
from scgpt_hf.cells.obs import PRIMARY, add_primary_filter, drop_unused_categories, find_matching_rows, require_columns
from scgpt_hf.cells.presence import Presence

logger = logging.getLogger(__name__)

# A cache up to this size is verified before its first use by default; hashing takes a second for each GB on one core.
VERIFIED_BYTES = 64 * 2**30
# An epoch plan takes 16 bytes for each chunk: up to 8 million cells are shuffled one by one.
_MAX_CHUNKS = 2**23


def uniform_chunk_size(n_cells: int) -> int:
    """Return how many neighboring cells of a cache an epoch keeps together, so that its plan stays small.

    Args:
        n_cells: number of cells of the cache.

    Returns:
        1 up to 8 million cells, else the smallest power of 2 that gives at most 8 million chunks.
    """
    return 1 << max(0, (n_cells - 1).bit_length() - _MAX_CHUNKS.bit_length() + 1)


class CacheSource:
    """The cells of a cache; see `CellSource` for the members."""

    cells_at_once = 0  # the shards are mapped into memory

    def __init__(
        self,
        folder: str | Path,
        *,
        obs_filter: str | None = None,
        layer: str | None = None,
        primary_only: bool = True,
        verify: bool | None = None,
        n_threads: int = 4,
    ) -> None:
        """Read the manifest and check the size of each shard.

        Args:
            folder: the folder of the cache.
            obs_filter: SOMA value filter on the obs columns of the cache, in addition to the one it was written with.
            layer: None, or the layer that the cache was written from; a cache holds one layer only.
            primary_only: keep only cells with `is_primary_data == True`.
            verify: verify the hashes of all shards before the first read; by default if they take up to 64 GiB in
                total. Verifying also brings the files into memory.
            n_threads: number of threads that find cells, and that wait for the disk if they are not in memory.

        Raises:
            ShardError: the folder is not a complete cache.
            ValueError: the cache was written from another layer, or the filter cannot be parsed.
        """
        self._settings: dict[str, Any] = {
            "folder": folder,
            "obs_filter": obs_filter,
            "layer": layer,
            "primary_only": primary_only,
            "verify": verify,
            "n_threads": n_threads,
        }
        self._folder, self._n_threads, self._lock = Path(folder), n_threads, threading.Lock()
        self.identity, self._records = read_manifest(self._folder)
        source = self.identity.source
        if layer not in (None, source["layer"]):
            raise ValueError(f"{folder} has no layer {layer!r}; its only layer is {source['layer']!r}")
        self.obs_columns = list(self.identity.obs_columns)
        if PRIMARY in (source["obs_filter"] or ""):
            primary_only = False  # all cells of the cache are primary, even if it has no such column
        self._filter = add_primary_filter(obs_filter, self.obs_columns, primary_only=primary_only)
        small = sum(record.n_bytes for record in self._records) <= VERIFIED_BYTES
        self._unverified = (small if verify is None else verify) and bool(self._records)
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="cache-find")

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]

    @cached_property
    def genes(self) -> pd.DataFrame:
        """The genes: columns `feature_id` and `feature_name`, row i for gene i of the shards."""
        return read_genes(self._folder, self.identity)

    @property
    def chunk_size(self) -> int:
        """Number of neighboring cells that are shuffled together; see `uniform_chunk_size`."""
        return uniform_chunk_size(self.identity.cells)

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the cells that match the filter; see `CellSource.obs`."""
        require_columns(columns, self.obs_columns)
        rows = np.flatnonzero(self._selected[self._cell_ids])
        index = pd.Index(self._cell_ids[rows], name="cell_id")
        table = {name: self._column(name)[rows] for name in columns}
        return drop_unused_categories(pd.DataFrame(table, index=index, columns=list(columns)))

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Return the given cells in the given order; see `CellSource.read`.

        Raises:
            ShardError: a shard is corrupt.
            ValueError: see `CellSource.read`.
        """
        cell_ids = require_cell_ids(cell_ids, self._selected)
        require_columns(columns, self.obs_columns)
        shard_of_cell = np.searchsorted([record.last_cell for record in self._records], cell_ids)
        obs = pd.DataFrame(index=pd.Index(cell_ids, name="cell_id"))
        for name in columns:
            obs[name] = self._column(name)[np.searchsorted(self._cell_ids, cell_ids)]
        n_genes, n_threads = len(self.genes), self._n_threads
        return find_cells(
            self._shards, shard_of_cell, obs, cell_ids, n_genes=n_genes, pool=self._pool, n_threads=n_threads
        )

    def presence(self, cell_ids: Int64Array) -> Presence | None:
        """Return the measured genes as the source of the cache knew them; see `CellSource.presence`."""
        return read_presence(self._folder, cell_ids, len(self.genes))

    def describe(self) -> dict[str, Any]:
        """Return the description of the source that was cached, with this folder as its address."""
        source = self.identity.source
        both = [text for text in (source["obs_filter"], self._filter) if text]
        # Addresses of the source of the cache may name folders of another machine.
        description = {key: value for key, value in source.items() if key not in {"uri", "paths"}}
        return description | {
            "kind": "cache",
            "uri": str(self._folder),
            "cells_hash": self.identity.cells_hash,
            "obs_filter": " and ".join(f"({text})" for text in both) if len(both) == 2 else "".join(both) or None,
            "n_cells": int(self._selected.sum()),
        }

    def close(self) -> None:
        """End the threads; the source cannot be read afterwards."""
        self._pool.shutdown()

    @cached_property
    def _shards(self) -> list[Shard]:
        """The mapped shards, after verifying their hashes, and that their cells are those of the manifest."""
        with self._lock:
            if self._unverified:
                logger.info("verifying the %d shards of %s", len(self._records), self._folder)
                list(self._pool.map(lambda record: verify_shard(self._folder, record), self._records))
                self._unverified = False
        shards = [Shard(self._folder / record.file, len(self.genes)) for record in self._records]
        for shard, record in zip(shards, self._records, strict=True):
            ids, types = shard.cell_ids, shard.table.schema
            expected = {"cells": record.n_cells, "first": record.first_cell, "last": record.last_cell}
            found = {"cells": len(ids), "first": int(ids[0]), "last": int(ids[-1])}
            if found != expected:
                raise ShardError(f"{shard.path} contradicts {MANIFEST}: expected {expected}, found {found}; {REMEDY}")
            if not types.equals(shards[0].table.schema):
                raise ShardError(
                    f"{shard.path} has the columns {types.names}, but {shards[0].path} has "
                    f"{shards[0].table.schema.names}, or columns of other types; {REMEDY}"
                )
        return shards

    @cached_property
    def _cell_ids(self) -> Int64Array:
        """The ids of all cells of the cache, ascending. Shape (cells,)."""
        return np.concatenate([shard.cell_ids for shard in self._shards])

    @cached_property
    def _selected(self) -> NDArray[np.bool_]:
        """True at the id of each cell that matches the filter. Shape (last cell id + 1,)."""
        matching = self._cell_ids
        if self._filter is not None:
            obs = pd.DataFrame({name: self._column(name) for name in self.obs_columns}, index=self._cell_ids)
            matching = matching[find_matching_rows(obs, self._filter)]
        offered = np.zeros(int(self._cell_ids[-1]) + 1, dtype=np.bool_)
        offered[matching] = True
        return offered

    def _column(self, name: str) -> Any:
        """Return an obs column of all cells, text as categories. Shape (cells,)."""
        if name not in self._obs:
            column = pa.chunked_array([chunk for shard in self._shards for chunk in shard.obs_column(name).chunks])
            if column.type == pa.string():
                column = column.dictionary_encode().unify_dictionaries()
            self._obs[name] = column.to_pandas().array
        return self._obs[name]

    @cached_property
    def _obs(self) -> dict[str, Any]:
        """The columns that were read before, by name."""
        return {}
