"""Reading a remote Census by the S3 client of tiledbsoma from a local server that simulates the faults of a store."""

import logging
import os
import re
import threading

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma

from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.soma import remote
from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.cells.soma.remote import MAX_THREADS, RetryPolicy, require_no_credentials, threads_to_read
from scgpt_hf.cells.source import open_source
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from tests.support.s3_server import Faults, S3Server

ADDRESS = "s3://census/census_data/homo_sapiens"


@pytest.fixture
def server(small_census, monkeypatch):
    """A server with `small_census` that TileDB uses as S3; without faults, and without waits between attempts."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "TILEDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    with S3Server(small_census) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


def batches_of(source):
    """The batches of two epochs, every array of them as a list."""
    processor = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist())
    ids = source.obs().index.to_numpy()
    plans = [plan_epoch(ids, seed=0, epoch=epoch, batch_size=30, chunk_size=64) for epoch in range(2)]
    stream = stream_cells(source, plans, processor, StreamConfig(seed=0, mask_ratios=(0.5,)))
    return [{name: np.asarray(value).tolist() for name, value in batch.items()} for batch in stream]


def test_cells_read_from_s3_equal_the_local_ones(server, small_census):
    with open_source("s3://census/") as source, open_source(small_census) as local:
        assert source.describe()["uri"] == ADDRESS
        assert source.genes.equals(local.genes)
        ids = np.random.default_rng(0).permutation(local.obs().index.to_numpy())[:100]
        block, expected = source.read(ids, ["donor_id"]), local.read(ids, ["donor_id"])
        assert (block.counts != expected.counts).nnz == 0
        assert block.obs.equals(expected.obs)


def test_a_slow_store_is_read_by_more_threads_with_the_same_result(server, small_census):
    server.faults = Faults(latency_s=0.02)
    with CensusSource(ADDRESS, n_threads=1) as source, open_source(small_census) as local:
        ids = local.obs().index.to_numpy()
        for _ in range(2):  # the second time with the further threads
            assert (source.read(ids).counts != local.read(ids).counts).nnz == 0
        assert 1 < len(source._pool) <= MAX_THREADS


@pytest.mark.parametrize(
    ("busy_s", "cpu_s", "n_cores", "expected"),
    [(1, 1, 2, 2), (10, 1, 2, 20), (1000, 1, 2, MAX_THREADS), (0, 0, 4, 1), (3, 0, 1, MAX_THREADS)],
)
def test_as_many_threads_read_as_keep_the_cores_busy(busy_s, cpu_s, n_cores, expected):
    assert threads_to_read(busy_s, cpu_s, n_cores) == expected


def test_with_a_fifth_of_the_requests_failing_the_batches_stay_the_same(server, small_census, monkeypatch):
    monkeypatch.setenv("TILEDB_VFS_S3_CONNECT_MAX_TRIES", "1")  # so that some failures reach our retries
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 100)  # opening an array takes a dozen requests, each fails in a fifth
    with open_source(small_census) as local:
        expected = batches_of(local)
    server.faults = Faults(probability=0.2, kinds=("500", "503", "reset", "truncate"), seed=3)
    with open_source(ADDRESS) as source:
        assert batches_of(source) == expected
    assert {kind: server.outcomes[kind] > 0 for kind in server.faults.kinds} == dict.fromkeys(server.faults.kinds, True)
    assert 0.15 < 1 - server.outcomes["ok"] / server.outcomes.total() < 0.25


def test_reads_that_the_client_does_not_repeat_are_repeated_and_logged(server, small_census, monkeypatch, caplog):
    monkeypatch.setenv("TILEDB_VFS_S3_CONNECT_MAX_TRIES", "0")  # so that every failure reaches our retries
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 100)  # opening and reading take some requests, of which half fail
    with open_source(small_census) as local:
        expected = batches_of(local)
    kinds, only = ("500", "reset", "truncate"), "homo_sapiens/__group|X/raw/__fragments"
    server.faults = Faults(probability=0.5, kinds=kinds, seed=3, only=only)
    with open_source(ADDRESS) as source, caplog.at_level(logging.WARNING, "scgpt_hf"):
        n_opening = source._retry_policy.n_retries
        assert batches_of(source) == expected
        n_retries = source._retry_policy.n_retries
    lines = [record.getMessage() for record in caplog.records if "retries so far" in record.getMessage()]
    assert 0 < n_opening < n_retries
    assert f"{n_retries} retries so far" in lines[-1]
    assert all(ADDRESS in line and "attempt 2 of 100 in" in line for line in lines[:1])


def test_after_the_last_attempt_the_error_names_the_object_and_suggests_a_local_copy(server, monkeypatch):
    monkeypatch.setenv("TILEDB_VFS_S3_CONNECT_MAX_TRIES", "0")
    with open_source(ADDRESS) as source:
        ids = source.obs().index.to_numpy()
        server.faults = Faults(probability=1, kinds=("500",), only="/X/raw/")
        with pytest.raises(ConnectionError, match=rf"{ADDRESS}/ms/RNA/X/raw failed 8 times .*500.*local copy"):
            source.read(ids)
        server.faults = Faults()
        assert len(source.read(ids)) == len(ids)


def test_a_request_without_an_answer_is_repeated(server, small_census, monkeypatch):
    monkeypatch.setenv("TILEDB_VFS_S3_REQUEST_TIMEOUT_MS", "500")
    with open_source(ADDRESS) as source, open_source(small_census) as local:
        ids = source.obs().index.to_numpy()
        server.faults = Faults(probability=0.1, kinds=("stall",), seed=2, only="/X/raw/__fragments", stall_s=20)
        assert (source.read(ids).counts != local.read(ids).counts).nnz == 0
        assert server.outcomes["stall"] > 0


def test_a_census_that_disappears_raises_without_retries(server):
    with open_source(ADDRESS) as source:
        ids = source.obs().index.to_numpy()
        source.read(ids[:3])
        server.faults.gone = True
        with pytest.raises(FileNotFoundError, match=ADDRESS):
            source.read(ids)
        assert source._retry_policy.n_retries == 0
    with pytest.raises(ValueError, match=ADDRESS):
        open_source(ADDRESS)


def test_a_store_that_cannot_be_reached_raises_a_connection_error_on_opening(server):
    server.faults = Faults(probability=1, kinds=("reset",))
    with pytest.raises(ConnectionError, match=r"s3://census/ failed 8 times"):
        open_source("s3://census/")


def failing(n_times, message="connection reset", kind=soma.SOMAError):
    """Return a function that raises `n_times`, and succeeds from then on."""
    failures = iter(range(n_times))

    def read():
        if next(failures, None) is not None:
            raise kind(message)
        return "read"

    return read


def test_waits_double_and_are_random(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    policy = RetryPolicy()
    assert policy.read("s3://b/k", failing(7)) == "read"
    assert all(0.5 * 2**attempt <= wait <= 1.5 * 2**attempt for attempt, wait in enumerate(waits))
    assert len({round(wait / 2**attempt, 6) for attempt, wait in enumerate(waits)}) == len(waits) == 7
    assert policy.n_retries == 7


@pytest.mark.parametrize(
    ("uri", "message", "expected", "advice"),
    [
        ("s3://b/k", "[HTTP Response Code: 403] [Headers: 'x' = 'y'] : AccessDenied", PermissionError, "credentials"),
        ("s3://b/k", "[HTTP Response Code: 404]", FileNotFoundError, "restore it"),
        ("/no/such/folder", "Cannot open array", FileNotFoundError, "restore it"),
        ("/", "checksum mismatch", OSError, "may be damaged"),
        (f"file://{os.path.abspath(os.sep)}", "checksum mismatch", OSError, "may be damaged"),
    ],
)
def test_permanent_failures_and_failures_of_local_files_raise_without_retries(uri, message, expected, advice):
    policy = RetryPolicy()
    with pytest.raises(expected, match=f"{re.escape(uri)}.*{advice}") as raised:
        policy.read(uri, failing(1, message))
    assert type(raised.value) is expected
    assert policy.n_retries == 0
    assert "Headers" not in str(raised.value)


def test_errors_of_damaged_contents_name_the_object():
    # TileDB returns uninitialized memory as the indices of a dictionary column whose tile is damaged
    codes = pa.DictionaryArray.from_arrays(pa.array([-1476393056], pa.int32()), pa.array(["a"]), safe=False)
    for read in (codes.to_pandas, failing(1, kind=RuntimeError), b"\xb6".decode):
        with pytest.raises(OSError, match="reading / failed"):
            RetryPolicy().read("/", read)


def test_retries_of_all_threads_are_counted(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    policy = RetryPolicy()
    threads = [threading.Thread(target=policy.read, args=("s3://b/k", failing(3))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert policy.n_retries == 24


def test_an_address_with_a_password_raises_an_error_without_it():
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as raised:
        open_source("s3://someone:secret@bucket/census")
    assert "secret@" not in str(raised.value)
    for address in ("s3://bucket/a@b", "/home/a@b", "census://stable"):
        require_no_credentials(address)
