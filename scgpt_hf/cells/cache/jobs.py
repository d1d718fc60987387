"""Write a cache in any number of jobs, in any order, on one or many machines.

Each shard is a fixed range of the selected cells, so its bytes do not depend on the job that writes it. A job records
each finished shard with its hash in `.jobs`. The job that finds all shards recorded writes the manifest, which makes
the cache complete. After an interruption, the same job writes only what is missing.
"""

import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from tqdm.auto import tqdm

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.block import CHUNK_SIZE, CellBlock, Int64Array
from scgpt_hf.cells.cache.format import WrittenFile, cache_schema, encode_chunks, obs_type, write_shard
from scgpt_hf.cells.cache.manifest import (
    JOBS,
    MANIFEST,
    CacheError,
    CacheIdentity,
    ShardRecord,
    hash_cells,
    is_cache,
    load_manifest,
    require_same_identity,
    verify_shard,
    write_manifest,
)
from scgpt_hf.cells.cache.presence import write_presence
from scgpt_hf.cells.obs import require_columns
from scgpt_hf.cells.source import CellSource
from scgpt_hf.cells.threads import DaemonThreadPool, in_order
from scgpt_hf.output import require_writable_folder

logger = logging.getLogger(__name__)

# Obs columns that are kept by default, if the source has them: those by which cells are split, grouped and shown.
COLUMNS = (
    *("dataset_id", "donor_id", "assay", "cell_type", "tissue", "tissue_general", "disease", "development_stage"),
    *("sex", "suspension_type", "is_primary_data"),
)
CELLS_PER_SHARD = 32 * CHUNK_SIZE  # about 300 MB
_CELLS_PER_READ = 8 * CHUNK_SIZE  # about 100 MB
_READS_AHEAD = 2  # a source reads the chunks of one read in parallel; the second read keeps its threads busy at the end
_PLAN = "plan.json"  # in `.jobs`: the identity of a cache that is not complete


@dataclass(frozen=True, eq=False)
class CacheJobs:
    """The plan of a cache: which cells go into which shard. It can be pickled and sent to the workers of a cluster.

    Attributes:
        source: the source of the cells.
        folder: the folder of the cache.
        cell_ids: the selected cells, ascending. Shape (cells,).
        identity: what the cache is made of.
        bounds: offsets in `cell_ids`: shard i has the cells `cell_ids[bounds[i]:bounds[i + 1]]`. Shape (shards + 1,).
    """

    source: CellSource
    folder: Path
    cell_ids: Int64Array
    identity: CacheIdentity
    bounds: list[int]

    @property
    def n_shards(self) -> int:
        """Number of shards of the complete cache."""
        return len(self.bounds) - 1

    def name(self, shard: int) -> str:
        """Return the file name of a shard."""
        return f"data-{shard:05d}-of-{self.n_shards:05d}.arrow"

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the shards."""
        columns = self.identity.obs_columns
        obs = self.source.read(self.cell_ids[:1], columns).obs  # one cell shows the types of all
        return cache_schema(len(self.source.genes), {name: obs_type(obs[name]) for name in columns})

    def prepare_folder(self) -> None:
        """Create the folder, or check that it belongs to this cache.

        Raises:
            CacheError: the folder holds a different cache, complete or not.
            FileExistsError: the folder holds other files.
        """
        plan, complete = self.folder / JOBS / _PLAN, (self.folder / MANIFEST).exists()
        if complete or plan.exists():
            found = load_manifest(self.folder)[0] if complete else CacheIdentity(**_read_json(plan))
            require_same_identity(self.folder, found, self.identity)
        elif self.folder.exists() and self._holds_other_files():
            raise FileExistsError(f"{self.folder} exists and is not a cache; choose another folder, or remove this one")
        if not complete:
            require_writable_folder(self.folder)
            with self.ignore_if_completed():
                plan.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(plan, json.dumps(asdict(self.identity), indent=1))

    @contextmanager
    def ignore_if_completed(self) -> Iterator[None]:
        """Ignore that `.jobs` is missing if another job has completed the cache, and removed it, meanwhile."""
        try:
            yield
        except FileNotFoundError as error:
            # A missing file of the source is another matter.
            ours = error.filename is not None and Path(error.filename).is_relative_to(self.folder)
            if not (ours and (self.folder / MANIFEST).exists()):
                raise

    def _holds_other_files(self) -> bool:
        """Return whether the folder holds files that belong to no cache."""
        if not self.folder.is_dir():
            return True
        # Another job may create `.jobs` between these two calls, which is no other file.
        return any(path.name != JOBS for path in self.folder.iterdir()) and not is_cache(self.folder)

    def write(
        self,
        shards: Iterable[int],
        *,
        rewrite: bool = False,
        on_progress: Callable[[int], object] = lambda n_cells: None,
    ) -> None:
        """Write shards one after the other; verify those that exist already.

        Args:
            shards: numbers of the shards.
            rewrite: write corrupt shards again instead of raising.
            on_progress: called with the number of cells written or verified since its last call.

        Raises:
            CacheError: a shard is corrupt, or differs from what was written before because the source has changed.
            OSError: a shard cannot be written.
            ValueError: the source cannot be read.
        """
        reads = (
            partial(self._read, shard, ids)
            for shard in shards
            if not self._verify(shard, rewrite, on_progress)
            for ids in self._ranges(shard)
        )
        with DaemonThreadPool(_READS_AHEAD, "cache-read") as readers:
            # Reads run ahead into the next shard, so that the source is not idle while one is completed.
            blocks = in_order(readers, reads, n_ahead=_READS_AHEAD)
            for shard, read in groupby(blocks, key=itemgetter(0)):
                self._write(shard, (block for _, block in read), on_progress)

    def _read(self, shard: int, cell_ids: Int64Array) -> tuple[int, CellBlock]:
        """Return the number of a shard and some of its cells."""
        return shard, self.source.read(cell_ids, self.identity.obs_columns)

    def _verify(self, shard: int, rewrite: bool, on_progress: Callable[[int], object]) -> bool:
        """Return whether a shard exists and is correct; raise if it is corrupt, unless it is to be rewritten."""
        record = self._record(shard, self._records_in_manifest())
        if record is None or not (self.folder / record.file).exists():
            return False
        try:
            verify_shard(self.folder, record)
        except CacheError as error:
            if not rewrite:
                raise
            logger.warning("%s", error)
            return False
        on_progress(record.n_cells)
        return True

    def _write(self, shard: int, blocks: Iterable[CellBlock], on_progress: Callable[[int], object]) -> None:
        """Write a shard and record it."""
        record, ids = self._record(shard, self._records_in_manifest()), self._cells(shard)
        path = self.folder / self.name(shard)

        def require_same(written: WrittenFile) -> None:
            if record is not None and record.sha256 != written.sha256:
                raise CacheError(
                    f"{path} was recorded with sha256 {record.sha256[:16]}…, but writing it again gives "
                    f"{written.sha256[:16]}…: the source, or the version of pyarrow, has changed; write a new cache"
                )

        with self.ignore_if_completed():
            batches, temporary_folder = self._batches(blocks, on_progress), self.folder / JOBS
            written = write_shard(
                path, self.schema, batches, temporary_folder=temporary_folder, before_rename=require_same
            )
            new = ShardRecord(path.name, *written, len(ids), int(ids[0]), int(ids[-1]))
            if not (self.folder / MANIFEST).exists():
                write_atomically(self.folder / JOBS / f"{path.name}.json", json.dumps(asdict(new)))

    def finish(self) -> bool:
        """Write the manifest if all shards are recorded; return whether the cache is complete."""
        listed = self._records_in_manifest()
        records = [record for shard in range(self.n_shards) if (record := self._record(shard, listed)) is not None]
        if len(records) < self.n_shards:
            return (self.folder / MANIFEST).exists()  # another job may have completed the cache meanwhile
        if not all((self.folder / record.file).exists() for record in records):
            return False
        presence = self.source.presence(self.cell_ids)
        digest = None if presence is None else write_presence(self.folder, self.cell_ids, presence)
        write_manifest(self.folder, self.identity, records, self.source.genes, self.schema, digest)
        shutil.rmtree(self.folder / JOBS, ignore_errors=True)
        return True

    def _cells(self, shard: int) -> Int64Array:
        """Return the ids of the cells of a shard. Shape (cells,)."""
        return self.cell_ids[self.bounds[shard] : self.bounds[shard + 1]]

    def _ranges(self, shard: int) -> list[Int64Array]:
        """Return the ids of the cells of a shard, divided into reads."""
        ids = self._cells(shard)
        return np.split(ids, np.flatnonzero(np.diff(ids // _CELLS_PER_READ)) + 1)

    def _batches(self, blocks: Iterable[CellBlock], on_progress: Callable[[int], object]) -> Iterator[pa.RecordBatch]:
        """Yield blocks as record batches, and report progress."""
        for block in blocks:
            yield from encode_chunks(block, self.schema)
            on_progress(len(block))

    def _record(self, shard: int, listed: dict[str, ShardRecord]) -> ShardRecord | None:
        """Return the record of a shard, or None if it was never finished."""
        with suppress(FileNotFoundError):
            return ShardRecord(**_read_json(self.folder / JOBS / f"{self.name(shard)}.json"))
        return listed.get(self.name(shard))

    def _records_in_manifest(self) -> dict[str, ShardRecord]:
        """Return the shards of the manifest by file name; none if the cache is not complete."""
        shards = load_manifest(self.folder)[1] if (self.folder / MANIFEST).exists() else []
        return {shard.file: shard for shard in shards}


def plan_cache(
    source: CellSource,
    folder: str | Path,
    *,
    cell_ids: Int64Array | None = None,
    columns: Sequence[str] | None = None,
    cells_per_shard: int = CELLS_PER_SHARD,
) -> CacheJobs:
    """Divide cells into the shards of a cache, without writing anything.

    Args:
        source: see `write_cache`.
        folder: see `write_cache`.
        cell_ids: see `write_cache`.
        columns: see `write_cache`.
        cells_per_shard: see `write_cache`.

    Raises:
        ValueError: there are no cells, the ids do not ascend, a column does not exist, or the shards are too small.
    """
    if cells_per_shard < CHUNK_SIZE:
        raise ValueError(f"expected at least {CHUNK_SIZE:,} cells per shard, found {cells_per_shard:,}")
    cell_ids = source.obs().index.to_numpy(np.int64) if cell_ids is None else cell_ids
    if not len(cell_ids) or (np.diff(cell_ids) <= 0).any():
        raise ValueError(
            f"expected at least one cell id, ascending and without repeats, found {len(cell_ids):,}: {cell_ids[:5]}"
        )
    columns = [name for name in COLUMNS if name in source.obs_columns] if columns is None else list(columns)
    require_columns(columns, source.obs_columns)
    identity = CacheIdentity(source.describe(), len(cell_ids), hash_cells(cell_ids), columns, cells_per_shard)
    # A shard starts with the first chunk at or behind each multiple of `cells_per_shard`, so chunks are never split.
    chunks = np.flatnonzero(np.diff(cell_ids // CHUNK_SIZE, prepend=-1))  # offsets of the chunks in `cell_ids`
    first = np.flatnonzero(np.diff(chunks // cells_per_shard, prepend=-1))  # chunks with which a shard starts
    return CacheJobs(source, Path(folder), cell_ids, identity, [*chunks[first].tolist(), len(cell_ids)])


def write_cache(
    source: CellSource,
    folder: str | Path,
    *,
    cell_ids: Int64Array | None = None,
    columns: Sequence[str] | None = None,
    job: tuple[int, int] = (0, 1),
    cells_per_shard: int = CELLS_PER_SHARD,
    rewrite: bool = False,
) -> bool:
    """Write cells to a cache, a folder that `open_source` and `datasets.load_from_disk` open.

    You can call it again after an interruption, or from many jobs at the same time: the resulting files are the same,
    byte for byte. Shards that exist are verified, not written again.

    Args:
        source: the source of the cells.
        folder: the folder of the cache; created if it does not exist.
        cell_ids: the cells, ascending; by default all that match the source's filter. Shape (cells,).
        columns: obs columns to keep; by default those of `COLUMNS` that the source has.
        job: (i, n) writes every n-th shard, starting with shard i.
        cells_per_shard: least number of cells of a file.
        rewrite: write corrupt shards again instead of raising.

    Returns:
        Whether the cache is complete.

    Raises:
        CacheError: the folder holds a different cache, or a shard is corrupt.
        FileExistsError: the folder holds other files.
        OSError: a shard cannot be written, e.g. because the disk is full.
        ValueError: see `plan_cache`; there is no such job; or the source cannot be read.

    Example:
        >>> write_cache(open_source("my_census"), "blood")  # doctest: +SKIP
        True
    """
    jobs = plan_cache(source, folder, cell_ids=cell_ids, columns=columns, cells_per_shard=cells_per_shard)
    return write_shards(jobs, job, rewrite=rewrite)


def write_shards(jobs: CacheJobs, job: tuple[int, int] = (0, 1), *, rewrite: bool = False) -> bool:
    """Write the shards of one job, and the manifest if all shards are complete afterwards.

    Args:
        jobs: the plan of the cache.
        job: see `write_cache`.
        rewrite: see `write_cache`.

    Returns:
        Whether the cache is complete.

    Raises:
        CacheError, FileExistsError, OSError, ValueError: see `write_cache`.
    """
    index, n_jobs = job
    if not 0 <= index < n_jobs:
        raise ValueError(f"expected a job i/n with 0 <= i < n, found {index}/{n_jobs}")
    jobs.prepare_folder()
    mine = range(index, jobs.n_shards, n_jobs)
    n_cells = sum(jobs.bounds[shard + 1] - jobs.bounds[shard] for shard in mine)
    with tqdm(total=n_cells, unit=" cells", unit_scale=True, desc="caching") as progress:
        jobs.write(mine, rewrite=rewrite, on_progress=progress.update)
    return jobs.finish()


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
