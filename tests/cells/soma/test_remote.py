"""The remote path for real: tiledbsoma's own S3 client, reading a Census from a server that fails as stores do."""

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
from scgpt_hf.cells.soma.remote import RetryPolicy, require_no_credentials
from scgpt_hf.cells.source import open_source
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from tests.support.s3_server import Faults, S3Server

ADDRESS = "s3://census/census_data/homo_sapiens"


@pytest.fixture
def server(small_census, monkeypatch):
    """A server with `small_census`, to which TileDB is led; nothing fails yet, and nobody waits between attempts."""
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


def test_with_a_fifth_of_the_requests_failing_the_batches_stay_the_same(server, small_census, monkeypatch):
    monkeypatch.setenv("TILEDB_VFS_S3_CONNECT_MAX_TRIES", "1")  # so that our own layer may have something to do
    monkeypatch.setattr(remote, "ATTEMPTS", 100)  # opening an array takes a dozen requests, each fails in a fifth
    with open_source(small_census) as local:
        expected = batches_of(local)
    server.faults = Faults(probability=0.2, kinds=("500", "503", "reset", "truncate"), seed=3)
    with open_source(ADDRESS) as source:
        assert batches_of(source) == expected
    assert {kind: server.outcomes[kind] > 0 for kind in server.faults.kinds} == dict.fromkeys(server.faults.kinds, True)
    assert 0.15 < 1 - server.outcomes["ok"] / server.outcomes.total() < 0.25


def test_what_the_client_does_not_repeat_is_read_again_and_said(server, small_census, monkeypatch, caplog):
    monkeypatch.setenv("TILEDB_VFS_S3_CONNECT_MAX_TRIES", "0")  # so that every failure reaches our own layer
    monkeypatch.setattr(remote, "ATTEMPTS", 100)  # opening and reading take some requests, of which half fail
    with open_source(small_census) as local:
        expected = batches_of(local)
    kinds, only = ("500", "reset", "truncate"), "homo_sapiens/__group|X/raw/__fragments"
    server.faults = Faults(probability=0.5, kinds=kinds, seed=3, only=only)
    with open_source(ADDRESS) as source, caplog.at_level(logging.WARNING, "scgpt_hf"):
        n_opening = source._retry_policy.n_retries
        assert batches_of(source) == expected
        n_retries = source._retry_policy.n_retries
    said = [record.getMessage() for record in caplog.records if "retries in this run so far" in record.getMessage()]
    assert 0 < n_opening < n_retries
    assert f"{n_retries} retries in this run so far" in said[-1]
    assert all(ADDRESS in line and "attempt 2 of 100 in" in line for line in said[:1])


def test_after_the_last_attempt_the_error_names_the_object_and_what_to_do(server, monkeypatch):
    monkeypatch.setenv("TILEDB_VFS_S3_CONNECT_MAX_TRIES", "0")
    with open_source(ADDRESS) as source:
        ids = source.obs().index.to_numpy()
        server.faults = Faults(probability=1, kinds=("500",), only="/X/raw/")
        with pytest.raises(ConnectionError, match=rf"{ADDRESS}/ms/RNA/X/raw failed 8 times .*500.*resume .*local copy"):
            source.read(ids)
        server.faults = Faults()
        assert len(source.read(ids)) == len(ids)


def test_a_store_that_falls_silent_is_asked_again(server, small_census, monkeypatch):
    monkeypatch.setenv("TILEDB_VFS_S3_REQUEST_TIMEOUT_MS", "500")
    with open_source(ADDRESS) as source, open_source(small_census) as local:
        ids = source.obs().index.to_numpy()
        server.faults = Faults(probability=0.1, kinds=("stall",), seed=2, only="/X/raw/__fragments", stall_s=20)
        assert (source.read(ids).counts != local.read(ids).counts).nnz == 0
        assert server.outcomes["stall"] > 0


def test_a_census_that_disappears_ends_the_run_at_once(server):
    with open_source(ADDRESS) as source:
        ids = source.obs().index.to_numpy()
        source.read(ids[:3])
        server.faults.gone = True
        with pytest.raises(FileNotFoundError, match=rf"{ADDRESS}\S+ cannot be found.*put it back and resume"):
            source.read(ids)
        assert source._retry_policy.n_retries == 0
    with pytest.raises(ValueError, match=f"cannot open '{ADDRESS}' as a SOMA"):
        open_source(ADDRESS)


def test_a_store_that_cannot_be_reached_is_not_taken_for_one_that_is_empty(server):
    server.faults = Faults(probability=1, kinds=("reset",))
    with pytest.raises(ConnectionError, match=r"s3://census/ failed 8 times"):
        open_source("s3://census/")


def failing(n_times, message="connection reset", kind=soma.SOMAError):
    """A read that fails so often, then succeeds."""
    failures = iter(range(n_times))

    def read():
        if next(failures, None) is not None:
            raise kind(message)
        return "read"

    return read


def test_waits_double_and_differ(monkeypatch):
    waits: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", waits.append)
    patience = RetryPolicy()
    assert patience.read("s3://b/k", failing(7)) == "read"
    assert all(0.5 * 2**attempt <= wait <= 1.5 * 2**attempt for attempt, wait in enumerate(waits))
    assert len({round(wait / 2**attempt, 6) for attempt, wait in enumerate(waits)}) == len(waits) == 7
    assert patience.n_retries == 7


@pytest.mark.parametrize(
    ("uri", "message", "expected", "says"),
    [
        ("s3://b/k", "[HTTP Response Code: 403] [Headers: 'x' = 'y'] : AccessDenied", PermissionError, "credentials"),
        ("s3://b/k", "[HTTP Response Code: 404]", FileNotFoundError, "put it back"),
        ("/no/such/folder", "Cannot open array", FileNotFoundError, "put it back"),
        ("/", "checksum mismatch", OSError, "is it damaged"),
        (f"file://{os.path.abspath(os.sep)}", "checksum mismatch", OSError, "is it damaged"),
    ],
)
def test_what_another_attempt_cannot_change_is_said_at_once(uri, message, expected, says):
    patience = RetryPolicy()
    with pytest.raises(expected, match=f"{re.escape(uri)}.*{says}") as raised:
        patience.read(uri, failing(1, message))
    assert type(raised.value) is expected
    assert patience.n_retries == 0
    assert "Headers" not in str(raised.value)


def test_what_cannot_be_read_of_a_damaged_store_is_named():
    # TileDB hands on the memory it got for indices of categories whose tile is damaged: whatever was there before
    codes = pa.DictionaryArray.from_arrays(pa.array([-1476393056], pa.int32()), pa.array(["a"]), safe=False)
    for read in (codes.to_pandas, failing(1, kind=RuntimeError), b"\xb6".decode):
        with pytest.raises(OSError, match=r"reading / failed: .* is it damaged"):
            RetryPolicy().read("/", read)


def test_retries_of_all_threads_are_counted(monkeypatch):
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    patience = RetryPolicy()
    threads = [threading.Thread(target=patience.read, args=("s3://b/k", failing(3))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert patience.n_retries == 24


def test_an_address_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(ValueError, match="AWS_SECRET_ACCESS_KEY") as raised:
        open_source("s3://someone:secret@bucket/census")
    assert "secret@" not in str(raised.value)
    for address in ("s3://bucket/a@b", "/home/a@b", "census://stable"):
        require_no_credentials(address)
