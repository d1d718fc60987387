"""The cells that an epoch reads become the same cache, byte for byte, that `write_cache` writes."""

import threading

import numpy as np
import pytest

from scgpt_hf.cells.cache.jobs import CacheJobs, write_cache
from scgpt_hf.cells.cache.write_through import CachingSource
from scgpt_hf.cells.jobs.records import ShardError
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.source import CellSource, open_source
from tests.support.caches import SHARD, contents, make_cells

CELLS = np.arange(100, 8900)


@pytest.fixture(scope="module")
def complete(source: CellSource, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("cache") / "one"
    write_cache(source, folder, cell_ids=CELLS, **SHARD)
    return contents(folder)


def blocks(rank: int = 0, world_size: int = 1) -> list[np.ndarray]:
    """Return the cell ids of each block that a rank reads in an epoch."""
    plan = plan_epoch(CELLS, seed=0, epoch=0, batch_size=256, chunks_per_window=2)
    return [np.concatenate(plan.steps(block, rank=rank, world_size=world_size)) for block in range(plan.n_windows)]


def same(block, expected) -> bool:
    names = ("data", "indices", "indptr")
    return all((getattr(block.counts, name) == getattr(expected.counts, name)).all() for name in names) and (
        block.cell_ids.tolist() == expected.cell_ids.tolist() == block.obs.index.tolist()
        and block.obs.astype(str).equals(expected.obs.astype(str))
    )


def test_reading_returns_the_same_blocks_and_writes_the_same_cache(source, complete, tmp_path):
    caching = CachingSource(source, tmp_path / "cache", CELLS, **SHARD)
    for columns in (["donor_id"], []):
        for ids in [*blocks(), *blocks()]:
            assert same(caching.read(ids, columns), source.read(ids, columns))
    cache = caching.finish()
    assert contents(tmp_path / "cache") == complete
    assert same(cache.read(CELLS[::-3], ["donor_id"]), source.read(CELLS[::-3], ["donor_id"]))
    assert caching.finish() is cache
    assert caching.describe() == source.describe()


@pytest.mark.parametrize("world_size", [2, 4])
def test_many_processes_write_one_cache(source, complete, tmp_path, world_size):
    barrier, failed = threading.Barrier(world_size), []

    def rank(index: int) -> None:
        try:
            caching = CachingSource(
                source, tmp_path / "cache", CELLS, job=(index, world_size), barrier=lambda: barrier.wait(60), **SHARD
            )
            for ids in blocks(index, world_size):
                caching.read(ids)
            caching.finish()
        except BaseException as error:  # noqa: BLE001
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=rank, args=(index,)) for index in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert contents(tmp_path / "cache") == complete


class Counting:
    """A source that counts the cells that are read from it."""

    def __init__(self, source: CellSource) -> None:
        self.source, self.n_read = source, 0

    def read(self, cell_ids, columns=()):
        self.n_read += len(cell_ids)
        return self.source.read(cell_ids, columns)

    def __getattr__(self, name: str):
        return getattr(self.source, name)


def test_cells_that_an_interrupted_epoch_stored_are_not_read_again(source, complete, tmp_path):
    counting = Counting(source)
    first = CachingSource(counting, tmp_path / "cache", CELLS, **SHARD)
    for ids in blocks()[:2]:
        first.read(ids)
    first._last_store.result()
    counting.n_read = 0
    second = CachingSource(counting, tmp_path / "cache", CELLS, **SHARD)
    for ids in blocks():
        assert same(second.read(ids, ["donor_id"]), source.read(ids, ["donor_id"]))
    second.finish()
    assert (
        counting.n_read <= len(CELLS) - sum(map(len, blocks()[:2])) + 5
    )  # each source reads one cell for the types of obs
    assert contents(tmp_path / "cache") == complete


def test_the_cells_of_a_corrupt_part_are_read_again_with_a_warning(source, complete, tmp_path, caplog):
    caching = CachingSource(source, tmp_path / "cache", CELLS, **SHARD)
    for ids in blocks():
        caching.read(ids)
    caching._last_store.result()
    part = next((tmp_path / "cache" / ".jobs" / "parts").glob("*.arrow"))
    content = bytearray(part.read_bytes())
    content[len(content) // 2] ^= 1
    part.write_bytes(content)
    assert CachingSource(source, tmp_path / "cache", CELLS, **SHARD).finish()
    assert f"{part} is corrupt" in caplog.text
    assert contents(tmp_path / "cache") == complete


def test_a_complete_cache_is_read_from_the_start(source, complete, tmp_path):
    write_cache(source, tmp_path / "cache")  # with all cells, not only those of the run
    counting = Counting(source)
    caching = CachingSource(counting, tmp_path / "cache", CELLS, **SHARD)
    assert same(caching.read(CELLS[5:1:-1], ["donor_id"]), source.read(CELLS[5:1:-1], ["donor_id"]))
    assert caching.finish().read(CELLS[:2]).cell_ids.tolist() == CELLS[:2].tolist()
    assert counting.n_read == 0


def test_nothing_is_written_before_something_is_read(source, tmp_path):
    CachingSource(source, tmp_path / "cache", CELLS, **SHARD)
    assert not (tmp_path / "cache").exists()


def test_a_cache_without_the_cells_or_columns_of_the_run_raises(source, tmp_path):
    write_cache(source, tmp_path / "some", cell_ids=CELLS[:50], columns=[])
    with pytest.raises(ShardError, match="8,750 of the 8,800 cells"):
        CachingSource(source, tmp_path / "some", CELLS)
    with pytest.raises(ShardError, match=r"\['donor_id'\]"):
        CachingSource(source, tmp_path / "some", CELLS[:50], columns=["donor_id"])
    with pytest.raises(ShardError, match="gene_hash"):
        CachingSource(open_source(make_cells()[:, ::-1].copy()), tmp_path / "some", CELLS[:50])
    with pytest.raises(ValueError, match="already a cache"):
        CachingSource(open_source(tmp_path / "some"), tmp_path / "other", CELLS[:50])


def test_another_run_may_complete_the_same_cache_while_this_one_stores_cells(source, complete, tmp_path, monkeypatch):
    caching, first = CachingSource(source, tmp_path / "cache", CELLS, **SHARD), blocks()[0]
    prepare = CacheJobs.prepare_folder

    def complete_meanwhile(jobs: CacheJobs) -> None:
        prepare(jobs)
        monkeypatch.undo()
        write_cache(source, tmp_path / "cache", cell_ids=CELLS, **SHARD)

    monkeypatch.setattr(CacheJobs, "prepare_folder", complete_meanwhile)
    for ids in blocks():
        assert same(caching.read(ids), source.read(ids))
    assert same(caching.finish().read(first), source.read(first))
    assert contents(tmp_path / "cache") == complete


def test_an_error_of_writing_is_raised_by_the_next_read(source, tmp_path):
    (tmp_path / "cache").write_text("a file")
    caching = CachingSource(source, tmp_path / "cache", CELLS, **SHARD)
    caching.read(CELLS[:10])  # written while the next cells are read
    with pytest.raises(FileExistsError, match="cache"):
        caching.read(CELLS[10:20])
