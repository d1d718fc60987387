"""Any number of jobs writes the same cache; finished shards are verified, and corrupt ones raise."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.cache.jobs import plan_cache, write_cache
from scgpt_hf.cells.jobs import hashed_file, shard_jobs
from scgpt_hf.cells.jobs.records import ShardError
from scgpt_hf.cells.jobs.shard_jobs import write_shards
from scgpt_hf.cells.source import CellSource, open_source
from tests.support import ROOT
from tests.support.caches import SHARD, contents, make_cells, write_job
from tests.support.killed_jobs import write_with_killed_jobs


@pytest.fixture(scope="module")
def complete(source: CellSource, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The content of each file of the cache that one job writes."""
    folder = tmp_path_factory.mktemp("cache") / "one"
    assert write_cache(source, folder, **SHARD)
    return contents(folder)


def test_a_complete_cache_holds_shards_genes_presence_the_manifest_and_two_files_for_datasets(complete):
    shards = {f"data-{shard:05d}-of-00005.arrow" for shard in range(5)}
    others = {"manifest.json", "genes.csv", "presence.safetensors", "dataset_info.json", "state.json"}
    assert set(complete) == shards | others


@pytest.mark.parametrize("n_jobs", [2, 3, 7])
def test_any_number_of_jobs_in_any_order_writes_the_same_bytes(source, complete, tmp_path, n_jobs):
    order = np.random.default_rng(n_jobs).permutation(n_jobs).tolist()
    done = [write_cache(source, tmp_path / "many", job=(job, n_jobs), **SHARD) for job in order]
    assert done == [set(order[: ended + 1]) >= set(range(min(n_jobs, 5))) for ended in range(n_jobs)]
    assert contents(tmp_path / "many") == complete


def test_jobs_may_start_at_the_same_time(source, complete, tmp_path):
    for attempt in range(10):
        folder = tmp_path / str(attempt)
        with ThreadPoolExecutor(8) as pool:
            done = list(
                pool.map(lambda job, folder=folder: write_cache(source, folder, job=(job, 8), **SHARD), range(8))
            )
        assert any(done)
        assert contents(folder) == complete


@given(st.sets(st.integers(0, 8999), min_size=1, max_size=400), st.integers(2048, 5000))
@settings(deadline=None, max_examples=30)
def test_shards_are_ranges_of_cells_that_do_not_split_chunks(source, chosen, cells_per_shard):
    cell_ids = np.array(sorted(chosen)) * 30
    plan = plan_cache(_Renumbered(source), "nowhere", cell_ids=cell_ids, columns=[], cells_per_shard=cells_per_shard)
    ranges = [cell_ids[start:stop] for start, stop in zip(plan.bounds[:-1], plan.bounds[1:], strict=True)]
    assert np.concatenate(ranges).tolist() == cell_ids.tolist()
    chunks = [set(ids // 2048) for ids in ranges]
    assert all(chunks)
    assert sum(map(len, chunks)) == len(set.union(*chunks))


class _Renumbered:
    """Stand-in for a source with more cells. Planning a cache reads no cells."""

    obs_columns = ()

    def __init__(self, source: CellSource) -> None:
        self.describe = source.describe


def test_a_finished_shard_is_verified_and_not_written_again(source, complete, tmp_path):
    folder = tmp_path / "cache"
    write_cache(source, folder, **SHARD)
    before = {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")}
    assert write_cache(source, folder, **SHARD)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.arrow")} == before
    assert contents(folder) == complete


@pytest.mark.parametrize("finished", [True, False])
def test_a_corrupt_shard_raises_and_is_rewritten_if_requested(source, complete, tmp_path, finished):
    folder, name = tmp_path / "cache", "data-00001-of-00005.arrow"
    write_cache(source, folder, job=(0, 1) if finished else (1, 2), **SHARD)
    content = bytearray(complete[name])
    content[1000] ^= 4
    (folder / name).write_bytes(content)
    with pytest.raises(ShardError, match=rf"{name} is corrupt.*--rewrite"):
        write_cache(source, folder, **SHARD)
    assert write_cache(source, folder, rewrite=True, **SHARD)
    assert contents(folder) == complete


def test_a_removed_shard_is_written_again(source, complete, tmp_path):
    write_cache(source, tmp_path / "cache", **SHARD)
    (tmp_path / "cache" / "data-00003-of-00005.arrow").unlink()
    write_cache(source, tmp_path / "cache", **SHARD)
    assert contents(tmp_path / "cache") == complete


def test_a_shard_is_not_replaced_if_the_counts_of_the_source_have_changed(source, tmp_path):
    write_cache(source, tmp_path / "cache", **SHARD)
    (tmp_path / "cache" / "data-00003-of-00005.arrow").unlink()
    other = make_cells()
    other.X.data[:] = 7
    with pytest.raises(ShardError, match=r"data-00003.*source"):
        write_cache(open_source(other), tmp_path / "cache", **SHARD)


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"cell_ids": np.arange(5000)}, "cells: expected 5000, found 9000"),
        ({"columns": []}, r"obs_columns: expected \[\], found \['donor_id'\]"),
        ({"cells_per_shard": 4096}, "cells_per_shard: expected 4096, found 2048"),
    ],
)
def test_a_different_cache_in_the_folder_raises_and_is_left_alone(source, tmp_path, finished, keywords, message):
    write_cache(source, tmp_path / "cache", job=(0, 1) if finished else (0, 2), **SHARD)
    before = contents(tmp_path / "cache") if finished else None
    with pytest.raises(ShardError, match=message):
        write_cache(source, tmp_path / "cache", **SHARD | keywords)
    assert before is None or contents(tmp_path / "cache") == before


def test_a_cache_with_another_filter_is_a_different_cache(source, tmp_path):
    write_cache(source, tmp_path / "cache", **SHARD)
    with pytest.raises(ShardError, match=r"obs_filter: .*donor_id == '1'"):
        write_cache(open_source(make_cells(), obs_filter="donor_id == '1'"), tmp_path / "cache", **SHARD)


def test_a_folder_or_file_that_is_not_a_cache_raises_and_is_left_alone(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for path in (tmp_path, tmp_path / "notes.txt"):
        with pytest.raises(FileExistsError, match=re.escape(str(path))):
            write_cache(source, path)
    assert contents(tmp_path) == {"notes.txt": b"mine"}


def test_an_incomplete_cache_cannot_be_opened_or_finished_and_the_error_names_the_missing_files(source, tmp_path):
    folder = tmp_path / "cache"
    write_cache(source, folder, job=(1, 2), **SHARD)
    message = "lacks 3 of 5 files: data-00000-of-00005.arrow, data-00002-of-00005.arrow, data-00004-of-00005.arrow"
    with pytest.raises(ShardError, match=message):
        open_source(folder)
    jobs = plan_cache(source, folder, **SHARD)
    with pytest.raises(ShardError, match=message):
        jobs.require_finished()


def test_records_without_a_manifest_are_finished_without_reading_any_cell(source, complete, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    with monkeypatch.context() as patch:
        patch.setattr(shard_jobs.ShardJobs, "finish", lambda jobs: False)
        assert not write_cache(source, folder, **SHARD)
    jobs = plan_cache(source, folder, **SHARD)
    monkeypatch.setattr(type(jobs), "write", None)
    jobs.require_finished()
    assert contents(folder) == complete


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"cell_ids": np.array([3, 3])}, r"ascending.*\[3 3\]"),
        ({"cell_ids": np.array([], dtype=np.int64)}, "at least one.*found 0"),
        ({"columns": ["organ"]}, "organ"),
        ({"cells_per_shard": 2000}, "2,048.*2,000"),
        ({"job": (2, 2)}, "2/2"),
        ({"cell_ids": np.array([9000])}, r"9,000 cells.*\[9000\]"),
    ],
)
def test_arguments_that_do_not_fit_the_source_raise(source, tmp_path, keywords, message):
    with pytest.raises(ValueError, match=message):
        write_cache(source, tmp_path / "cache", **keywords)


def test_counts_and_columns_that_do_not_fit_the_format_raise(tmp_path):
    huge, clash = make_cells(n_cells=10), make_cells(n_cells=10)
    huge.X.data[5] = 2.0**33
    with pytest.raises(ValueError, match="8,589,934,592"):
        write_cache(open_source(huge), tmp_path / "huge")
    clash.obs["count"] = 1
    with pytest.raises(ValueError, match=r"\['count'\]"):
        write_cache(open_source(clash), tmp_path / "clash", columns=["count"])


def test_a_job_does_not_change_a_cache_that_another_job_has_completed_meanwhile(
    source, complete, tmp_path, monkeypatch
):
    folder = tmp_path / "cache"
    jobs = plan_cache(source, folder, **SHARD)

    def complete_first(path: Path, fill: object, *, temporary_folder: Path, **_: object) -> None:
        monkeypatch.undo()
        assert write_cache(source, folder, **SHARD)
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(temporary_folder / path.name))

    monkeypatch.setattr(shard_jobs, "write_hashed", complete_first)
    assert write_shards(jobs)
    assert contents(folder) == complete


def test_a_missing_file_of_the_source_raises_even_if_the_cache_is_complete(source, complete, tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    assert write_cache(source, folder, **SHARD)
    (folder / "data-00001-of-00005.arrow").unlink()

    def gone(cell_ids: np.ndarray, columns: object = ()) -> None:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "cells.h5ad")

    jobs = plan_cache(source, folder, **SHARD)
    assert jobs.schema
    monkeypatch.setattr(source, "read", gone)
    with pytest.raises(FileNotFoundError, match=r"cells\.h5ad"):
        write_shards(jobs, rewrite=True)
    assert sorted(path.name for path in folder.glob("data-*")) == [f"data-0000{n}-of-00005.arrow" for n in (0, 2, 3, 4)]


def test_a_full_disk_raises_and_leaves_the_finished_shards(source, complete, tmp_path, monkeypatch):
    free = sum(len(complete[f"data-{shard:05d}-of-00005.arrow"]) for shard in range(2)) + 5000

    class SmallDisk(hashed_file.HashedFile):
        def write(self, content: bytes) -> int:
            nonlocal free
            free -= len(content)
            if free < 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(content)

    with monkeypatch.context() as patch:
        patch.setattr(hashed_file, "HashedFile", SmallDisk)
        with pytest.raises(OSError, match=r"disk is full.*data-00002"):
            write_cache(source, tmp_path / "cache", **SHARD)
    assert sorted(path.name for path in (tmp_path / "cache").glob("data*")) == sorted(complete)[:2]
    assert write_cache(source, tmp_path / "cache", **SHARD)
    assert contents(tmp_path / "cache") == complete


KILLED = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from tests.support.caches import SHARD, make_cells
from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.source import open_source
source, read, reads = open_source(make_cells()), None, []
def slow(ids, columns):
    reads.append(ids)
    if len(reads) == 6:  # the first is for the schema, and four are started before a shard is complete
        import os, signal
        os.kill(os.getpid(), signal.SIGKILL)
    return read(ids, columns)
read, source.read = source.read, slow
write_cache(source, sys.argv[1], **SHARD)
"""


def test_a_killed_job_is_completed_by_the_same_job(source, complete, tmp_path):
    folder = tmp_path / "cache"
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder), str(ROOT)], check=False)
    assert done.returncode == -signal.SIGKILL
    finished = [json.loads(path.read_text())["file"] for path in (folder / ".jobs").glob("data*.json")]
    assert 0 < len(finished) < 5
    assert write_cache(source, folder, **SHARD)
    assert contents(folder) == complete


@pytest.mark.parametrize("seed", [0, 4])
def test_jobs_that_are_killed_while_they_write_flush_and_rename_write_the_same_bytes(complete, tmp_path, seed):
    assert write_with_killed_jobs(write_job, tmp_path / "cache", seed=seed, last_event=60) >= 3
    assert contents(tmp_path / "cache") == complete
