"""Downloading a cache by the S3 client of Arrow from a local server that simulates the faults of a store."""

import errno
import os
import shutil

import numpy as np
import pytest
from huggingface_hub import constants

from scgpt_hf.cells.cache import store
from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.jobs.records import ShardError
from scgpt_hf.cells.soma import remote
from scgpt_hf.cells.source import open_source
from tests.support.caches import SHARD, contents
from tests.support.s3_server import Faults, S3Server

ADDRESS = "s3://census/blood"


@pytest.fixture(scope="module")
def bucket(source, tmp_path_factory):
    """A folder with the cache `blood` of five shards."""
    folder = tmp_path_factory.mktemp("bucket")
    write_cache(source, folder / "blood", **SHARD)
    return folder


@pytest.fixture
def server(bucket, tmp_path, monkeypatch):
    """A server with the cache that Arrow uses as S3; without faults, and without waits between attempts."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "TILEDB_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(remote.time, "sleep", lambda _: None)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    with S3Server(shutil.copytree(bucket, tmp_path / "bucket")) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        yield server


@pytest.fixture
def downloads(tmp_path):
    return tmp_path / "hf_home" / "scgpt_hf" / "caches"


def test_a_cache_on_s3_is_downloaded_once_and_equals_the_local_one(server, bucket, downloads):
    source, local = open_source(ADDRESS), open_source(bucket / "blood")
    assert source.describe()["kind"] == "cache"
    assert source.genes.equals(local.genes)
    ids = np.random.default_rng(0).permutation(local.obs().index.to_numpy())
    block, expected = source.read(ids, ["donor_id"]), local.read(ids, ["donor_id"])
    assert (block.counts != expected.counts).nnz == 0
    assert block.obs.equals(expected.obs)
    assert np.array_equal(source.presence(ids).measured, local.presence(ids).measured)
    (folder,) = downloads.iterdir()
    assert contents(folder) == contents(bucket / "blood")
    before = server.outcomes.total()
    open_source(f"{ADDRESS}/")
    assert server.outcomes.total() - before <= 2, "only the manifest is asked for again"
    assert [*downloads.iterdir()] == [folder]


@pytest.mark.parametrize("kind", ["500", "503", "reset", "truncate"])
def test_with_a_third_of_the_requests_failing_the_files_stay_the_same(server, bucket, downloads, monkeypatch, kind):
    monkeypatch.setattr(remote, "MAX_ATTEMPTS", 100)
    server.faults = Faults(probability=0.3, kinds=(kind,), seed=3, only="data-|genes")
    open_source(ADDRESS)
    assert server.outcomes[kind]
    assert contents(*downloads.iterdir()) == contents(bucket / "blood")


def test_an_interrupted_download_is_completed_with_the_missing_files(server, bucket, downloads):
    shards = sorted(name for name in server.files if name.endswith(".arrow"))
    missing = server.files.pop(shards[1])
    with pytest.raises(FileNotFoundError, match=shards[1]):
        open_source(ADDRESS)
    (folder,) = downloads.iterdir()
    assert not (folder / "manifest.json").exists()
    server.files[shards[1]] = missing
    server.faults.n_requests.clear()
    open_source(ADDRESS)
    asked = {request.split()[1].removeprefix("/census/") for request in server.faults.n_requests}
    assert asked & set(shards) == {shards[1]}
    assert contents(folder) == contents(bucket / "blood")


def test_a_file_that_differs_from_the_manifest_is_refused(server, downloads):
    path = next(path for name, path in sorted(server.files.items()) if name.endswith(".arrow"))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(ShardError, match=f"{path.name} is not the file of manifest.json: .* upload the cache again"):
        open_source(ADDRESS)
    (folder,) = downloads.iterdir()
    assert not (folder / path.name).exists()
    assert not (folder / "manifest.json").exists()


def test_a_changed_cache_is_another_folder(server, source, tmp_path, downloads):
    open_source(ADDRESS)
    folder = tmp_path / "bucket" / "blood"
    shutil.rmtree(folder)
    write_cache(source, folder, cell_ids=np.arange(10))
    server.files = {f"blood/{path.name}": path for path in folder.iterdir()}
    assert len(open_source(ADDRESS).obs()) == 10
    assert len([*downloads.iterdir()]) == 2


def test_a_disk_that_is_too_small_is_named_before_the_download(server, monkeypatch, downloads):
    usage = shutil.disk_usage(".")._replace(free=10)
    monkeypatch.setattr(store.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"takes 0\.0 GB, but only 0\.0 GB are free .* set HF_HOME") as caught:
        open_source(ADDRESS)
    assert caught.value.errno == errno.ENOSPC
    assert not [name for name in server.faults.n_requests if ".arrow" in name]


def test_a_denied_file_is_not_asked_for_again(server):
    server.faults = Faults(probability=1, kinds=("403",), only="data-")
    with pytest.raises(PermissionError, match=r"access to s3://census/blood/data-.* was denied"):
        open_source(ADDRESS)
    assert set(server.faults.n_requests.values()) == {1}


def test_a_malformed_manifest_is_refused(server, tmp_path):
    (tmp_path / "bucket" / "blood" / "manifest.json").write_text("{}")
    with pytest.raises(ShardError, match="malformed"):
        open_source(ADDRESS)


def test_addresses_with_a_password_are_refused_before_any_request(server):
    with pytest.raises(ValueError, match="user name or password"):
        open_source("s3://key:secret@census/blood")
    assert not server.outcomes
