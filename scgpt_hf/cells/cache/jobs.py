"""Write a cache: copy cells to shards in the format of `format.py`, in any number of jobs.

`cells/jobs/shard_jobs.py` divides the work and records what is finished.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path

import numpy as np
import pyarrow as pa

from scgpt_hf.cells.block import CHUNK_SIZE, CellBlock, Int64Array
from scgpt_hf.cells.cache.format import cache_schema, encode_chunks, obs_type, write_batches
from scgpt_hf.cells.cache.manifest import JOBS, MANIFEST, load_manifest, write_manifest
from scgpt_hf.cells.cache.presence import write_presence
from scgpt_hf.cells.jobs.records import ShardRecord, ShardsIdentity, hash_cells
from scgpt_hf.cells.jobs.shard_jobs import CELLS_PER_SHARD, ShardJobs, divide_cells, write_shards
from scgpt_hf.cells.obs import require_columns
from scgpt_hf.cells.source import CellSource
from scgpt_hf.cells.threads import DaemonThreadPool, in_order

# Obs columns that are kept by default, if the source has them: those by which cells are split, grouped and shown.
COLUMNS = (
    *("dataset_id", "donor_id", "assay", "cell_type", "tissue", "tissue_general", "disease", "development_stage"),
    *("sex", "suspension_type", "is_primary_data"),
)
_CELLS_PER_READ = 8 * CHUNK_SIZE  # about 100 MB
_READS_AHEAD = 2  # a source reads the chunks of one read in parallel; the second read keeps its threads busy at the end


class CacheJobs(ShardJobs):
    """The plan of a cache; see `ShardJobs`."""

    MANIFEST, RECORDS, SUFFIX, ACTION = MANIFEST, JOBS, "arrow", "caching"

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema of the shards."""
        columns = self.identity.obs_columns
        obs = self.source.read(self.cell_ids[:1], columns).obs  # one cell shows the types of all
        return cache_schema(len(self.source.genes), {name: obs_type(obs[name]) for name in columns})

    def write(
        self,
        shards: Iterable[int],
        *,
        rewrite: bool = False,
        on_progress: Callable[[int], object] = lambda n_cells: None,
    ) -> None:
        """Copy the cells of shards; see `ShardJobs.write`."""
        reads = (
            partial(self._read, shard, ids)
            for shard in shards
            if not self._is_written(shard, rewrite, on_progress)
            for ids in self._ranges(shard)
        )
        with DaemonThreadPool(_READS_AHEAD, "cache-read") as readers:
            # Reads run ahead into the next shard, so that the source is not idle while one is completed.
            blocks = in_order(readers, reads, n_ahead=_READS_AHEAD)
            for shard, read in groupby(blocks, key=itemgetter(0)):
                batches = self._encode((block for _, block in read), on_progress)
                self.save(shard, partial(write_batches, schema=self.schema, batches=batches))

    def complete(self, records: list[ShardRecord]) -> None:
        """Write the measured genes, the genes, the files of `datasets` and the manifest."""
        presence = self.source.presence(self.cell_ids)
        digest = None if presence is None else write_presence(self.folder, self.cell_ids, presence)
        write_manifest(self.folder, self.identity, records, self.source.genes, self.schema, digest)

    def records_in_manifest(self) -> tuple[ShardsIdentity, list[ShardRecord]]:
        """Load the manifest."""
        return load_manifest(self.folder)

    def _is_written(self, shard: int, rewrite: bool, on_progress: Callable[[int], object]) -> bool:
        """Return whether a shard needs no writing, and report its cells as done."""
        written = self.verify(shard, rewrite)
        if written:
            on_progress(len(self.cells(shard)))
        return written

    def _read(self, shard: int, cell_ids: Int64Array) -> tuple[int, CellBlock]:
        """Return the number of a shard and some of its cells."""
        return shard, self.source.read(cell_ids, self.identity.obs_columns)

    def _ranges(self, shard: int) -> list[Int64Array]:
        """Return the ids of the cells of a shard, divided into reads."""
        ids = self.cells(shard)
        return np.split(ids, np.flatnonzero(np.diff(ids // _CELLS_PER_READ)) + 1)

    def _encode(self, blocks: Iterable[CellBlock], on_progress: Callable[[int], object]) -> Iterator[pa.RecordBatch]:
        """Yield blocks as record batches, and report progress."""
        for block in blocks:
            yield from encode_chunks(block, self.schema)
            on_progress(len(block))


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
    cell_ids = source.obs().index.to_numpy(np.int64) if cell_ids is None else cell_ids
    bounds = divide_cells(cell_ids, cells_per_shard)
    columns = [name for name in COLUMNS if name in source.obs_columns] if columns is None else list(columns)
    require_columns(columns, source.obs_columns)
    identity = ShardsIdentity(source.describe(), len(cell_ids), hash_cells(cell_ids), columns, cells_per_shard)
    return CacheJobs(source, Path(folder), cell_ids, identity, bounds)


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
        ShardError: the folder holds a different cache, or a shard is corrupt.
        FileExistsError: the folder holds other files.
        OSError: a shard cannot be written, e.g. because the disk is full.
        ValueError: see `plan_cache`; there is no such job; or the source cannot be read.

    Example:
        >>> write_cache(open_source("my_census"), "blood")  # doctest: +SKIP
        True
    """
    jobs = plan_cache(source, folder, cell_ids=cell_ids, columns=columns, cells_per_shard=cells_per_shard)
    return write_shards(jobs, job, rewrite=rewrite)
