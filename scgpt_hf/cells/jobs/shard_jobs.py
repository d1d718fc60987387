"""Write a folder of shards in any number of jobs, in any order, on one or many machines.

Each shard is a file with a fixed range of the selected cells, so its bytes do not depend on the job that writes it. A
job records each finished shard with its hash in a hidden folder. The job that finds all shards recorded writes the
manifest, which makes the folder complete. After an interruption, the same job writes only what is missing.

`CacheJobs` (caches) and `EmbeddingJobs` (embeddings) define what a shard holds. `cluster.py` runs jobs on Ray.
"""

import json
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.block import CHUNK_SIZE, Int64Array
from scgpt_hf.cells.jobs.hashed_file import HashedFile, WrittenFile, write_hashed
from scgpt_hf.cells.jobs.records import (
    PLAN,
    ShardError,
    ShardRecord,
    ShardsIdentity,
    describe_missing,
    read_plan,
    require_same_identity,
    verify_shard,
)
from scgpt_hf.cells.source import CellSource
from scgpt_hf.output import require_writable_folder
from scgpt_hf.progress_bar import progress_bar

logger = logging.getLogger(__name__)

CELLS_PER_SHARD = 32 * CHUNK_SIZE  # of a cache, about 300 MB


@dataclass(frozen=True, eq=False)
class ShardJobs(ABC):
    """The plan of a folder of shards. It can be pickled and sent to the workers of a cluster.

    Attributes:
        source: the source of the cells.
        folder: the folder of the shards.
        cell_ids: the selected cells, ascending. Shape (cells,).
        identity: what the shards are made of.
        bounds: offsets in `cell_ids`: shard i has the cells `cell_ids[bounds[i]:bounds[i + 1]]`. Shape (shards + 1,).
        MANIFEST: name of the manifest, which exists only in a complete folder.
        RECORDS: name of the folder in which jobs record finished shards; it is removed when the folder is complete.
        SUFFIX: suffix of the files.
        ACTION: what happens to the cells, for the progress bar.
    """

    source: CellSource
    folder: Path
    cell_ids: Int64Array
    identity: ShardsIdentity
    bounds: list[int]

    MANIFEST: ClassVar[str]
    RECORDS: ClassVar[str]
    SUFFIX: ClassVar[str]
    ACTION: ClassVar[str]

    @abstractmethod
    def write(
        self,
        shards: Iterable[int],
        *,
        rewrite: bool = False,
        on_progress: Callable[[int], object] = lambda n_cells: None,
    ) -> None:
        """Write shards one after the other with `save`, but not those that `verify` finds.

        Args:
            shards: numbers of the shards.
            rewrite: write corrupt shards again instead of raising.
            on_progress: called with the number of cells written or verified since its last call.

        Raises:
            ShardError: a shard is corrupt, or differs from what was written before because the source has changed.
            OSError: a shard cannot be written.
            ValueError: the source cannot be read.
        """

    @abstractmethod
    def complete(self, records: list[ShardRecord]) -> None:
        """Write what belongs to a complete folder besides the shards, the manifest last.

        Args:
            records: all shards, by ascending cell id.
        """

    @abstractmethod
    def records_in_manifest(self) -> tuple[ShardsIdentity, list[ShardRecord]]:
        """Return the identity and the shards that the manifest of a complete folder lists."""

    @property
    def n_shards(self) -> int:
        """Number of shards of the complete folder."""
        return len(self.bounds) - 1

    @property
    def records(self) -> Path:
        """The folder of the records."""
        return self.folder / self.RECORDS

    def name(self, shard: int) -> str:
        """Return the file name of a shard."""
        return f"data-{shard:05d}-of-{self.n_shards:05d}.{self.SUFFIX}"

    def cells(self, shard: int) -> Int64Array:
        """Return the ids of the cells of a shard. Shape (cells,)."""
        return self.cell_ids[self.bounds[shard] : self.bounds[shard + 1]]

    def prepare_folder(self) -> None:
        """Create the folder, or check that it belongs to these jobs.

        Raises:
            ShardError: the folder holds different shards, complete or not.
            FileExistsError: the folder holds other files.
        """
        plan, complete = self.records / PLAN, self._is_complete()
        if complete or plan.exists():
            found = self.records_in_manifest()[0] if complete else type(self.identity)(**read_plan(self.records)[0])
            require_same_identity(self.folder, found, self.identity)
        elif self.folder.exists() and self._holds_other_files():
            raise FileExistsError(
                f"{self.folder} exists and holds other files; choose another folder, or remove this one"
            )
        if not complete:
            require_writable_folder(self.folder)
            with self.ignore_if_completed():
                plan.parent.mkdir(parents=True, exist_ok=True)
                content = {"identity": asdict(self.identity), "files": [self.name(i) for i in range(self.n_shards)]}
                write_atomically(plan, json.dumps(content, indent=1))

    @contextmanager
    def ignore_if_completed(self) -> Iterator[None]:
        """Ignore that records are missing if another job has completed the folder, and removed them, meanwhile."""
        try:
            yield
        except FileNotFoundError as error:
            # A missing file of the source is another matter.
            ours = error.filename is not None and Path(error.filename).is_relative_to(self.folder)
            if not (ours and self._is_complete()):
                raise

    def verify(self, shard: int, rewrite: bool) -> bool:
        """Return whether a shard exists and is correct; raise if it is corrupt, unless it is to be rewritten."""
        record = self._record(shard, self._listed())
        if record is None or not (self.folder / record.file).exists():
            return False
        try:
            verify_shard(self.folder, record)
        except ShardError as error:
            if not rewrite:
                raise
            logger.warning("%s", error)
            return False
        return True

    def save(self, shard: int, fill: Callable[[HashedFile], object]) -> None:
        """Write the file of a shard and record it.

        Args:
            shard: its number.
            fill: writes its content.

        Raises:
            ShardError: the shard was recorded with another hash.
            OSError: the file cannot be written.
        """
        record, ids = self._record(shard, self._listed()), self.cells(shard)
        path = self.folder / self.name(shard)

        def require_same(written: WrittenFile) -> None:
            if record is not None and record.sha256 != written.sha256:
                raise ShardError(
                    f"{path} was recorded with sha256 {record.sha256[:16]}…, but writing it again gives "
                    f"{written.sha256[:16]}…: the source, or the version of a library, has changed; write a new folder"
                )

        with self.ignore_if_completed():
            written = write_hashed(path, fill, temporary_folder=self.records, before_rename=require_same)
            new = ShardRecord(path.name, *written, len(ids), int(ids[0]), int(ids[-1]))
            if not self._is_complete():
                write_atomically(self.records / f"{path.name}.json", json.dumps(asdict(new)))

    def finish(self) -> bool:
        """Complete the folder if all shards are recorded; return whether it is complete."""
        listed = self._listed()
        records = [record for shard in range(self.n_shards) if (record := self._record(shard, listed)) is not None]
        if len(records) < self.n_shards:
            return self._is_complete()  # another job may have completed the folder meanwhile
        if not all((self.folder / record.file).exists() for record in records):
            return False
        with self.ignore_if_completed():
            self.records.mkdir(exist_ok=True)  # for temporary files
            self.complete(records)
        shutil.rmtree(self.records, ignore_errors=True)
        return True

    def require_finished(self) -> None:
        """Complete the folder without writing any shard.

        Raises:
            ShardError: shards are missing; the message names them.
        """
        self.prepare_folder()
        if not self.finish():
            raise ShardError(describe_missing(self.folder, self.records))

    def _is_complete(self) -> bool:
        return (self.folder / self.MANIFEST).exists()

    def _holds_other_files(self) -> bool:
        """Return whether the folder holds files that are not ours."""
        if not self.folder.is_dir():
            return True
        # Another job may create the folder of the records between these two calls, which is no other file.
        other = any(path.name != self.RECORDS for path in self.folder.iterdir())
        return other and not (self._is_complete() or self.records.exists())

    def _record(self, shard: int, listed: dict[str, ShardRecord]) -> ShardRecord | None:
        """Return the record of a shard, or None if it was never finished."""
        with suppress(FileNotFoundError):
            text = (self.records / f"{self.name(shard)}.json").read_text(encoding="utf-8")
            return ShardRecord(**json.loads(text))
        return listed.get(self.name(shard))

    def _listed(self) -> dict[str, ShardRecord]:
        """Return the shards of the manifest by file name; none if the folder is not complete."""
        shards = self.records_in_manifest()[1] if self._is_complete() else []
        return {shard.file: shard for shard in shards}


def divide_cells(cell_ids: Int64Array, cells_per_shard: int) -> list[int]:
    """Return the offsets at which shards start in ascending cell ids, and their number at the end. Shape (shards + 1,).

    A shard starts with the first chunk at or behind each multiple of `cells_per_shard`, so chunks are never split.

    Args:
        cell_ids: the cells. Shape (cells,).
        cells_per_shard: least number of cells of a shard.

    Raises:
        ValueError: there are no cells, the ids do not ascend, or the shards are smaller than a chunk.
    """
    if cells_per_shard < CHUNK_SIZE:
        raise ValueError(f"expected at least {CHUNK_SIZE:,} cells per shard, found {cells_per_shard:,}")
    if not len(cell_ids) or (np.diff(cell_ids) <= 0).any():
        raise ValueError(
            f"expected at least one cell id, ascending and without repeats, found {len(cell_ids):,}: {cell_ids[:5]}"
        )
    chunks = np.flatnonzero(np.diff(cell_ids // CHUNK_SIZE, prepend=-1))  # offsets of the chunks in `cell_ids`
    first = np.flatnonzero(np.diff(chunks // cells_per_shard, prepend=-1))  # chunks with which a shard starts
    return [*chunks[first].tolist(), len(cell_ids)]


def write_shards(
    jobs: ShardJobs, job: tuple[int, int] = (0, 1), *, rewrite: bool = False, progress: bool = True
) -> bool:
    """Write the shards of one job in this process, and the manifest if all shards are complete afterwards.

    Args:
        jobs: the plan of the folder.
        job: (i, n) writes every n-th shard, starting with shard i.
        rewrite: write corrupt shards again instead of raising.
        progress: show a progress bar.

    Returns:
        Whether the folder is complete.

    Raises:
        ShardError, FileExistsError, OSError, ValueError: see `ShardJobs.write` and `ShardJobs.prepare_folder`; or
            there is no such job.
    """
    index, n_jobs = job
    if not 0 <= index < n_jobs:
        raise ValueError(f"expected a job i/n with 0 <= i < n, found {index}/{n_jobs}")
    jobs.prepare_folder()
    mine = range(index, jobs.n_shards, n_jobs)
    n_cells = sum(jobs.bounds[shard + 1] - jobs.bounds[shard] for shard in mine)
    with progress_bar(total=n_cells, unit="cells", description=jobs.ACTION, show=progress) as bar:
        jobs.write(mine, rewrite=rewrite, on_progress=bar.update)
    return jobs.finish()
