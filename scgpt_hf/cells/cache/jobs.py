"""Writes a cache as jobs over ranges of cells: in any order, on any number of machines, again and again.

A shard is a fixed range of the selected cells, so its bytes do not depend on who writes it. A shard that is finished
is recorded with its hash; whoever finds all of them recorded writes the manifest.
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

from scgpt_hf.cells.block import CellBlock, Int64Array
from scgpt_hf.cells.cache.format import Written, cache_schema, encode_chunks, obs_type, write_shard
from scgpt_hf.cells.cache.manifest import (
    JOBS,
    MANIFEST,
    CacheError,
    Identity,
    ShardRecord,
    check_shard,
    hash_cells,
    is_cache,
    load_manifest,
    require_identity,
    write_manifest,
    write_text,
)
from scgpt_hf.cells.obs import require_columns
from scgpt_hf.cells.soma.layout import TILE
from scgpt_hf.cells.source import CellSource
from scgpt_hf.cells.threads import DaemonThreadPool, in_order

logger = logging.getLogger(__name__)

# Obs columns kept when none are named, of those that the source has: what cells are split, grouped and shown by.
COLUMNS = (
    *("dataset_id", "donor_id", "assay", "cell_type", "tissue", "tissue_general", "disease", "development_stage"),
    *("sex", "suspension_type", "is_primary_data"),
)
CELLS_PER_SHARD = 32 * TILE  # about 300 MB
_READ_TOGETHER = 8 * TILE  # cells of one read, 100 MB
_READS_AHEAD = 2  # at once: when one has no chunk left to begin, the other has
PLAN = "plan.json"


@dataclass(frozen=True, eq=False)
class CacheJobs:
    """The shards of a cache to be; travels by pickle to whoever writes one.

    Attributes:
        source: where the cells are read.
        folder: of the cache.
        cell_ids: the selected cells, ascending. Shape (cells,).
        identity: what the cache is made of.
        bounds: where each shard begins and ends in `cell_ids`. Shape (shards + 1,).
    """

    source: CellSource
    folder: Path
    cell_ids: Int64Array
    identity: Identity
    bounds: list[int]

    @property
    def n_shards(self) -> int:
        """Number of shards, however many jobs there are."""
        return len(self.bounds) - 1

    def name(self, shard: int) -> str:
        """Return the file of a shard."""
        return f"data-{shard:05d}-of-{self.n_shards:05d}.arrow"

    @cached_property
    def schema(self) -> pa.Schema:
        """The columns of a shard; the types of obs are those of the first cell."""
        columns = self.identity.columns
        obs = self.source.read(self.cell_ids[:1], columns).obs
        return cache_schema(len(self.source.genes), {name: obs_type(obs[name]) for name in columns})

    def prepare_folder(self) -> None:
        """Make the folder, or find that it is of this cache.

        Raises:
            CacheError: it holds a cache, or the beginning of one, of something else.
            FileExistsError: it holds something that is no cache.
        """
        plan, whole = self.folder / JOBS / PLAN, (self.folder / MANIFEST).exists()
        if whole or plan.exists():
            found = load_manifest(self.folder)[0] if whole else Identity(**_read_json(plan))
            require_identity(self.folder, found, self.identity)
        elif self.folder.exists() and self._is_foreign():
            raise FileExistsError(f"{self.folder} exists and is not a cache; choose another folder or remove it")
        if not whole:
            with self._unless_finished():
                plan.parent.mkdir(parents=True, exist_ok=True)
                write_text(plan, json.dumps(asdict(self.identity), indent=1))

    @contextmanager
    def _unless_finished(self) -> Iterator[None]:
        """Go on where the folder of jobs is gone because another job has just finished the cache."""
        try:
            yield
        except FileNotFoundError as error:
            ours = error.filename is not None and Path(error.filename).is_relative_to(self.folder)
            if not (ours and (self.folder / MANIFEST).exists()):
                raise

    def _is_foreign(self) -> bool:
        """Return whether the folder holds something that is no cache; another job may begin one at this moment."""
        if not self.folder.is_dir():
            return True
        return any(path.name != JOBS for path in self.folder.iterdir()) and not is_cache(self.folder)

    def write(
        self, shards: Iterable[int], *, rewrite: bool = False, tell: Callable[[int], object] = lambda n_cells: None
    ) -> None:
        """Write shards, one after the other, but for those that are there: they are verified.

        Args:
            shards: their numbers.
            rewrite: write corrupt ones again.
            tell: is told the number of cells each time some are done.

        Raises:
            CacheError: one is corrupt; or the source gives other cells than when it was written first.
            OSError: one cannot be written.
            ValueError: the source cannot be read.
        """
        reads = (
            partial(self._read, shard, ids)
            for shard in shards
            if not self._verify(shard, rewrite, tell)
            for ids in self._ranges(shard)
        )
        with DaemonThreadPool(_READS_AHEAD, "cache-read") as readers:
            blocks = in_order(readers, reads, n_ahead=_READS_AHEAD)  # of the next shard too, while one is completed
            for shard, read in groupby(blocks, key=itemgetter(0)):
                self._write(shard, (block for _, block in read), tell)

    def _read(self, shard: int, cell_ids: Int64Array) -> tuple[int, CellBlock]:
        """Return cells, and the shard they are of."""
        return shard, self.source.read(cell_ids, self.identity.columns)

    def _verify(self, shard: int, rewrite: bool, tell: Callable[[int], object]) -> bool:
        """Return whether a shard is there and what it should be; raise if it is corrupt and not to be written again."""
        record = self._record(shard, self._listed())
        if record is None or not (self.folder / record.file).exists():
            return False
        try:
            check_shard(self.folder, record)
        except CacheError as error:
            if not rewrite:
                raise
            logger.warning("%s", error)
            return False
        tell(record.n_cells)
        return True

    def _write(self, shard: int, blocks: Iterable[CellBlock], tell: Callable[[int], object]) -> None:
        """Write a shard and record it."""
        record, ids = self._record(shard, self._listed()), self._cells(shard)
        path = self.folder / self.name(shard)

        def require_same(written: Written) -> None:
            if record is not None and record.sha256 != written.sha256:
                raise CacheError(
                    f"{path}, written again, would not be what it was (sha256 {written.sha256[:16]}…, before "
                    f"{record.sha256[:16]}…): the source, or the version of pyarrow, has changed; make a new cache"
                )

        with self._unless_finished():
            batches, scratch = self._batches(blocks, tell), self.folder / JOBS
            written = write_shard(path, self.schema, batches, scratch=scratch, check=require_same)
            new = ShardRecord(path.name, *written, len(ids), int(ids[0]), int(ids[-1]))
            if not (self.folder / MANIFEST).exists():
                write_text(self.folder / JOBS / f"{path.name}.json", json.dumps(asdict(new)))

    def finish(self) -> bool:
        """Write the manifest if all shards are there, and return whether they are."""
        listed = self._listed()
        records = [record for shard in range(self.n_shards) if (record := self._record(shard, listed)) is not None]
        if len(records) < self.n_shards:
            return (self.folder / MANIFEST).exists()  # another job may have finished meanwhile
        if not all((self.folder / record.file).exists() for record in records):
            return False
        write_manifest(self.folder, self.identity, records, self.source.genes, self.schema)
        shutil.rmtree(self.folder / JOBS, ignore_errors=True)
        return True

    def _cells(self, shard: int) -> Int64Array:
        """Return the cells of a shard. Shape (cells,)."""
        return self.cell_ids[self.bounds[shard] : self.bounds[shard + 1]]

    def _ranges(self, shard: int) -> list[Int64Array]:
        """Return the cells of a shard as they are read, some chunks together."""
        ids = self._cells(shard)
        return np.split(ids, np.flatnonzero(np.diff(ids // _READ_TOGETHER)) + 1)

    def _batches(self, blocks: Iterable[CellBlock], tell: Callable[[int], object]) -> Iterator[pa.RecordBatch]:
        """Yield the record batches of the blocks of a shard."""
        for block in blocks:
            yield from encode_chunks(block, self.schema)
            tell(len(block))

    def _record(self, shard: int, listed: dict[str, ShardRecord]) -> ShardRecord | None:
        """Return what is recorded of a shard, or None if it was never finished."""
        with suppress(FileNotFoundError):
            return ShardRecord(**_read_json(self.folder / JOBS / f"{self.name(shard)}.json"))
        return listed.get(self.name(shard))

    def _listed(self) -> dict[str, ShardRecord]:
        """Return the shards of the manifest by file; none before there is one."""
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
    """Return the shards of a cache; nothing is written. Arguments as of `write_cache`.

    Raises:
        ValueError: no cells, ids that do not ascend, a column that the source lacks, or too small shards.
    """
    if cells_per_shard < TILE:
        raise ValueError(f"expected at least {TILE:,} cells per shard, found {cells_per_shard:,}")
    cell_ids = source.obs().index.to_numpy(np.int64) if cell_ids is None else cell_ids
    if not len(cell_ids) or (np.diff(cell_ids) <= 0).any():
        raise ValueError(f"expected ascending cell ids, at least one, found {len(cell_ids):,}: {cell_ids[:5]} …")
    columns = [name for name in COLUMNS if name in source.columns] if columns is None else list(columns)
    require_columns(columns, source.columns)
    identity = Identity(source.describe(), len(cell_ids), hash_cells(cell_ids), columns, cells_per_shard)
    chunks = np.flatnonzero(np.diff(cell_ids // TILE, prepend=-1))  # where each begins
    first = np.flatnonzero(np.diff(chunks // cells_per_shard, prepend=-1))
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
    """Write cells to a folder that `open_source` and `datasets.load_from_disk` open; return whether it is whole.

    It may be called again after an interruption, or by many jobs at once: the files are the same, byte for byte. What
    is there is verified, not written again.

    Args:
        source: where the cells are read.
        folder: of the cache; made if it does not exist.
        cell_ids: which cells, ascending; by default all that match the source's filter. Shape (cells,).
        columns: obs columns to keep; by default those of `COLUMNS` that the source has.
        job: (i, n): write every n-th shard from number i on.
        cells_per_shard: least number of cells of a file.
        rewrite: write corrupt shards again, instead of raising.

    Raises:
        CacheError: the folder is of another cache, or a shard is corrupt; the message names it.
        FileExistsError: the folder is of something else.
        OSError: the disk is full.
        ValueError: see `plan_cache`; there is no such job; or what reading the source raises.
    """
    jobs = plan_cache(source, folder, cell_ids=cell_ids, columns=columns, cells_per_shard=cells_per_shard)
    return write_shards(jobs, job, rewrite=rewrite)


def write_shards(jobs: CacheJobs, job: tuple[int, int] = (0, 1), *, rewrite: bool = False) -> bool:
    """Write the shards of one job, and the manifest if all shards are there then; see `write_cache`."""
    index, n_jobs = job
    if not 0 <= index < n_jobs:
        raise ValueError(f"expected a job i/n with 0 <= i < n, found {index}/{n_jobs}")
    jobs.prepare_folder()
    mine = range(index, jobs.n_shards, n_jobs)
    n_cells = sum(jobs.bounds[shard + 1] - jobs.bounds[shard] for shard in mine)
    with tqdm(total=n_cells, unit=" cells", unit_scale=True, desc="caching") as progress:
        jobs.write(mine, rewrite=rewrite, tell=progress.update)
    return jobs.finish()


def _read_json(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content
