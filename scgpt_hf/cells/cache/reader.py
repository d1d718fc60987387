"""Cells of a cache: a folder of shards that `cache_census.py` or a first epoch of training wrote.

Any order of cells is as fast as any other, so a plan may shuffle over all of them. The shards are mapped into memory,
once their hashes are seen to be right, and a block's cells are copied from there when they are asked for.
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
from scgpt_hf.cells.cache.manifest import MANIFEST, REMEDY, CacheError, check_shard, read_genes, read_manifest
from scgpt_hf.cells.cache.shards import Shard, find_cells
from scgpt_hf.cells.obs import PRIMARY, drop_unused_categories, full_filter, require_columns, select_rows

logger = logging.getLogger(__name__)

# A cache up to this size is hashed before its first use, at about 1 GB/s and core; a larger one when asked to.
VERIFIED_BYTES = 64 * 2**30
# Chunks of a plan, of which each takes 16 bytes an epoch: up to 8 million cells are shuffled one by one.
_MOST_CHUNKS = 2**23


def uniform_chunk_size(n_cells: int) -> int:
    """Return the cells that a plan over a cache keeps together: 1, or for many cells the least that bounds the plan."""
    return 1 << max(0, (n_cells - 1).bit_length() - _MOST_CHUNKS.bit_length() + 1)


class CacheSource:
    """The cells of a cache; see `CellSource` for what its members promise."""

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
        """Map the shards, after a look at the size of each.

        Args:
            folder: of the cache.
            obs_filter: SOMA value filter on the obs columns of the cache, besides the one it was made with.
            layer: for the record: a cache holds one layer.
            primary_only: keep only cells with `is_primary_data == True`.
            verify: check the hash of all shards before the first is mapped; by default up to 64 GiB. It brings a cold
                cache into memory, too.
            n_threads: that look for cells, and wait for the disk if they are not in memory.

        Raises:
            CacheError: the folder is not a whole cache; the message names what is wrong.
            ValueError: the cache was made of another layer, or the filter is not one expression.
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
        made_of = self.identity.source
        if layer not in (None, made_of["layer"]):
            raise ValueError(f"{folder} has no layer {layer!r}; it has {[made_of['layer']]}")
        self.columns = list(self.identity.columns)
        if PRIMARY in (made_of["obs_filter"] or ""):
            primary_only = False
        self._filter = full_filter(obs_filter, self.columns, primary_only=primary_only)
        small = sum(record.n_bytes for record in self._records) <= VERIFIED_BYTES
        self._unverified = (small if verify is None else verify) and bool(self._records)
        self._pool = ThreadPoolExecutor(n_threads, thread_name_prefix="cache-find")

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]

    @cached_property
    def genes(self) -> pd.DataFrame:
        """The genes by their number in the shards: columns `feature_id` and `feature_name`."""
        return read_genes(self._folder, self.identity)

    @property
    def chunk_size(self) -> int:
        """Cells best read together: 1, unless the plan of so many would take too much memory."""
        return uniform_chunk_size(self.identity.cells)

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the cells that match the filter; see `CellSource.obs`."""
        require_columns(columns, self.columns)
        rows = np.flatnonzero(self._offered[self._cell_ids])
        index = pd.Index(self._cell_ids[rows], name="cell_id")
        table = {name: self._column(name)[rows] for name in columns}
        return drop_unused_categories(pd.DataFrame(table, index=index, columns=list(columns)))

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Return these cells in this order; see `CellSource.read`.

        Raises:
            CacheError: a shard is corrupt; the message names it.
            ValueError: as `CellSource.read`.
        """
        cell_ids = require_cell_ids(cell_ids, self._offered)
        require_columns(columns, self.columns)
        shard_of_cell = np.searchsorted([record.last_cell for record in self._records], cell_ids)
        obs = pd.DataFrame(index=pd.Index(cell_ids, name="cell_id"))
        for name in columns:
            obs[name] = self._column(name)[np.searchsorted(self._cell_ids, cell_ids)]
        n_genes, n_threads = len(self.genes), self._n_threads
        return find_cells(
            self._shards, shard_of_cell, obs, cell_ids, n_genes=n_genes, pool=self._pool, n_threads=n_threads
        )

    def describe(self) -> dict[str, Any]:
        """Return where the cells come from: the description of the source that was cached, and this folder."""
        made_of = self.identity.source
        both = [text for text in (made_of["obs_filter"], self._filter) if text]
        where = {key: value for key, value in made_of.items() if key not in {"uri", "paths"}}
        return where | {
            "kind": "cache",
            "uri": str(self._folder),
            "cells_hash": self.identity.cells_hash,
            "obs_filter": " and ".join(f"({text})" for text in both) if len(both) == 2 else "".join(both) or None,
            "n_cells": int(self._offered.sum()),
        }

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    @cached_property
    def _shards(self) -> list[Shard]:
        """The shards, mapped once their hashes are seen to be right, with the cells that the manifest says."""
        with self._lock:
            if self._unverified:
                logger.info("checking the %d shards of %s", len(self._records), self._folder)
                list(self._pool.map(lambda record: check_shard(self._folder, record), self._records))
                self._unverified = False
        shards = [Shard(self._folder / record.file, len(self.genes)) for record in self._records]
        for shard, record in zip(shards, self._records, strict=True):
            ids, types = shard.cell_ids, shard.table.schema
            said = {"cells": record.n_cells, "first": record.first_cell, "last": record.last_cell}
            found = {"cells": len(ids), "first": int(ids[0]), "last": int(ids[-1])}
            if found != said:
                raise CacheError(f"{shard.path} is not as {MANIFEST} says: expected {said}, found {found}; {REMEDY}")
            if not types.equals(shards[0].table.schema):
                raise CacheError(f"{shard.path} has other columns than {shards[0].path}: {types.names}; {REMEDY}")
        return shards

    @cached_property
    def _cell_ids(self) -> Int64Array:
        """All cells of the cache, ascending; int64, shape (cells,)."""
        return np.concatenate([shard.cell_ids for shard in self._shards])

    @cached_property
    def _offered(self) -> NDArray[np.bool_]:
        """True at the id of each cell that matches the filter."""
        matching = self._cell_ids
        if self._filter is not None:
            obs = pd.DataFrame({name: self._column(name) for name in self.columns}, index=self._cell_ids)
            matching = matching[select_rows(obs, self._filter)]
        offered = np.zeros(int(self._cell_ids[-1]) + 1, dtype=np.bool_)
        offered[matching] = True
        return offered

    def _column(self, name: str) -> Any:
        """Return a column of obs of all cells, text as categories; kept once read. Shape (cells,)."""
        if name not in self._obs:
            column = pa.chunked_array([chunk for shard in self._shards for chunk in shard.obs_column(name).chunks])
            if column.type == pa.string():
                column = column.dictionary_encode().unify_dictionaries()
            self._obs[name] = column.to_pandas().array
        return self._obs[name]

    @cached_property
    def _obs(self) -> dict[str, Any]:
        return {}
