"""`CachingSource`: write a cache of the cells that a run reads in its first epoch.

Each process stores the blocks that it reads as parts: files in the format of a shard, named by their hash. At the end
of the epoch the processes write the shards from all parts, and read from the source what no process has read. The
result is the cache that `cache_census.py` would have written, byte for byte.
"""

import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
from scipy.sparse import vstack

from scgpt_hf.cells.block import CellBlock, Int64Array
from scgpt_hf.cells.cache.format import encode_chunks, write_batches
from scgpt_hf.cells.cache.jobs import COLUMNS, plan_cache
from scgpt_hf.cells.cache.manifest import JOBS, MANIFEST
from scgpt_hf.cells.cache.reader import CacheSource
from scgpt_hf.cells.cache.shards import Shard, find_cells, gather_obs
from scgpt_hf.cells.jobs.hashed_file import write_hashed
from scgpt_hf.cells.jobs.records import ShardError, hash_file, require_same_source
from scgpt_hf.cells.jobs.shard_jobs import CELLS_PER_SHARD, write_shards
from scgpt_hf.cells.presence import Presence
from scgpt_hf.cells.source import CellSource

logger = logging.getLogger(__name__)

PARTS = "parts"  # folder of the parts, within `.jobs`; removed when the cache is complete
_N_THREADS = 4


class CachingSource:
    """A source that stores what is read from it, and becomes a cache; see `CellSource` for the members.

    Example:
        >>> caching = CachingSource(source, "blood", cell_ids)  # doctest: +SKIP
        >>> blocks = [caching.read(some) for some in np.split(cell_ids, 10)]  # doctest: +SKIP
        >>> cache = caching.finish()  # doctest: +SKIP
    """

    def __init__(
        self,
        source: CellSource,
        folder: str | Path,
        cell_ids: Int64Array,
        *,
        columns: Sequence[str] = (),
        job: tuple[int, int] = (0, 1),
        barrier: Callable[[], object] = lambda: None,
        cells_per_shard: int = CELLS_PER_SHARD,
    ) -> None:
        """Open the cache if it is complete, or else the parts that an interrupted run stored. Nothing is written yet.

        Args:
            source: the source of the cells.
            folder: the folder of the cache.
            cell_ids: all cells that will be read, ascending. Shape (cells,).
            columns: obs columns that will be read; they are cached in addition to the default ones.
            job: (rank of this process, number of processes). All processes must see the same folder.
            barrier: returns when all processes have called it.
            cells_per_shard: least number of cells of a file.

        Raises:
            ShardError: the folder holds a cache of another source, or one without some of the cells or columns.
            ValueError: the source is a cache.
        """
        if source.describe()["kind"] == "cache":
            raise ValueError("the data are already a cache; train on them without --cache_dir")
        self._source, self._folder, self._job, self._barrier = source, Path(folder), job, barrier
        kept = [name for name in COLUMNS if name in source.obs_columns]
        kept += [name for name in columns if name not in kept]
        self._jobs = plan_cache(source, folder, cell_ids=cell_ids, columns=kept, cells_per_shard=cells_per_shard)
        self._cache = self._open_cache(columns) if (self._folder / MANIFEST).exists() else None
        self._parts: list[Shard] = []
        self._loaded: set[str] = set()
        self._part_of = np.full(len(cell_ids), -1, np.int32)  # the part that holds each cell, −1 for none
        self._storing_enabled, self._finished, self._last_store = True, False, Future[None]()
        self._last_store.set_result(None)
        self._parts_lock, self._submit_lock = threading.Lock(), threading.Lock()
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="cache-store")
        self._pool = ThreadPoolExecutor(_N_THREADS, thread_name_prefix="cache-find")
        if self._cache is None:
            self._load_parts()

    @property
    def genes(self) -> pd.DataFrame:
        """The genes of the source."""
        return self._source.genes

    @property
    def obs_columns(self) -> list[str]:
        """The obs columns of the source."""
        return self._source.obs_columns

    @property
    def chunk_size(self) -> int:
        """The chunk size of the source, because in the first epoch cells are read from there."""
        return self._source.chunk_size

    @property
    def cells_at_once(self) -> int:
        """Number of cells that the source reads at the same time."""
        return self._source.cells_at_once

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the cells of the source; see `CellSource.obs`."""
        return self._source.obs(columns)

    def presence(self, cell_ids: Int64Array) -> Presence | None:
        """Return the measured genes as the source knows them; see `CellSource.presence`."""
        return self._source.presence(cell_ids)

    def describe(self) -> dict[str, Any]:
        """Return the description of the source."""
        return self._source.describe()

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Return the given cells in the given order; see `CellSource.read`. What is read from the source is stored."""
        if self._cache is not None:
            return self._cache.read(cell_ids, columns)
        part_of = self._find_parts(cell_ids)
        kept, other = np.flatnonzero(part_of >= 0), np.flatnonzero(part_of < 0)
        if not len(kept):
            return self._read_source(cell_ids, columns)
        parts, part_of_cell, ids, n_genes = self._parts, part_of[kept], cell_ids[kept], len(self.genes)
        obs = gather_obs(parts, part_of_cell, ids, columns)
        found = find_cells(parts, part_of_cell, obs, ids, n_genes=n_genes, pool=self._pool, n_threads=_N_THREADS)
        counts = found.counts  # copied now, because the files of the parts are removed when the cache is complete
        if len(other):
            block, order = self._read_source(cell_ids[other], columns), np.argsort(np.concatenate([kept, other]))
            counts = vstack([counts, block.counts], format="csr")[order]
            obs = pd.concat([obs.astype(object), block.obs.astype(object)]).iloc[order]
        return CellBlock.from_scipy(counts, obs, cell_ids)

    def finish(self) -> CacheSource:
        """Complete the cache and return it. Every process must call this; further calls return the same cache.

        Raises:
            ShardError, OSError, ValueError: see `write_cache`.
        """
        if not self._finished:
            self._storing_enabled = False
            self._last_store.result()
            self._barrier()  # all processes have stored their parts
            if self._cache is None:
                self._load_parts()
                missing = int((self._part_of < 0).sum())
                logger.info("writing the cache %s; %d of its cells still have to be read", self._folder, missing)
                write_shards(replace(self._jobs, source=self), self._job)
            self._barrier()  # all processes have written their shards
            self._cache, self._parts, self._finished = self._cache or self._open_cache(()), [], True
        assert self._cache is not None
        return self._cache

    def _read_source(self, cell_ids: Int64Array, columns: Sequence[str]) -> CellBlock:
        """Return cells of the source and start storing them; the part is written while the next cells are read."""
        block = self._source.read(cell_ids, self._jobs.identity.obs_columns)
        with self._submit_lock:
            # Wait for the last part: at most one block is held in memory, and an error of writing is raised here.
            self._last_store.result()
            if self._storing_enabled:
                self._last_store = self._writer.submit(self._store, block)
        return block.with_obs(columns)

    def _store(self, block: CellBlock) -> None:
        """Write the cells of a block that belong to the cache and are in no part yet."""
        rows = np.flatnonzero((self._find_parts(block.cell_ids) < 0) & np.isin(block.cell_ids, self._jobs.cell_ids))
        if not len(rows) or (self._folder / MANIFEST).exists():
            return
        self._jobs.prepare_folder()
        folder = self._folder / JOBS / PARTS
        path, schema = folder / f"new-{uuid4().hex}", self._jobs.schema
        with self._jobs.ignore_if_completed():  # another run may complete the same cache, which removes the parts
            folder.mkdir(exist_ok=True)
            fill = partial(write_batches, schema=schema, batches=encode_chunks(block, schema, rows))
            written = write_hashed(path, fill, temporary_folder=folder)
            self._add(path.rename(folder / f"{written.sha256}.arrow"))

    def _find_parts(self, cell_ids: Int64Array) -> Any:
        """Return the part that holds each cell, −1 for none. Shape (cells,)."""
        wanted = self._jobs.cell_ids
        place = np.minimum(np.searchsorted(wanted, cell_ids), len(wanted) - 1)
        return np.where(wanted[place] == cell_ids, self._part_of[place], -1)

    def _load_parts(self) -> None:
        """Map the parts that this process has not mapped yet. The cells of a corrupt one are read again."""
        for path in sorted((self._folder / JOBS / PARTS).glob("*.arrow")):
            if path.stem in self._loaded:
                continue
            if hash_file(path) == path.stem:
                self._add(path)
            else:
                logger.warning("%s is corrupt: its SHA-256 differs from its name; its cells are read again", path)

    def _add(self, path: Path) -> None:
        part = Shard(path, len(self.genes))
        with self._parts_lock:
            self._loaded.add(path.stem)
            self._parts.append(part)
            self._part_of[np.searchsorted(self._jobs.cell_ids, part.cell_ids)] = len(self._parts) - 1

    def _open_cache(self, columns: Sequence[str]) -> CacheSource:
        """Return the complete cache in the folder, after checking that it holds the cells and columns of the run."""
        cache, jobs = CacheSource(self._folder, primary_only=False), self._jobs
        require_same_source(self._folder, cache.identity, jobs.identity)
        if missing_columns := [name for name in columns if name not in cache.obs_columns]:
            raise ShardError(
                f"{self._folder} does not have the obs columns {missing_columns}; remove it, or choose another "
                "--cache_dir"
            )
        missing = jobs.cell_ids[~np.isin(jobs.cell_ids, cache.obs().index.to_numpy())]
        if len(missing):
            raise ShardError(
                f"{self._folder} does not have {len(missing):,} of the {len(jobs.cell_ids):,} cells of the run, e.g. "
                f"{missing[:5].tolist()}; remove it, or choose another --cache_dir"
            )
        return cache
