"""The remote path for real: tiledbsoma's own S3 client, reading a Census from an S3 server on this machine."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

READ = """
import sys
import numpy as np
from scgpt_hf.cells.source import open_source

remote, local = open_source(sys.argv[1]), open_source(sys.argv[2])
assert remote.genes.equals(local.genes)
ids = np.random.default_rng(0).permutation(local.obs().index.to_numpy())[:100]
one, other = remote.read(ids, ["donor_id"]), local.read(ids, ["donor_id"])
assert (one.counts != other.counts).nnz == 0
assert one.obs.equals(other.obs)
print(remote.describe()["uri"])
"""


@pytest.fixture
def bucket(small_census, monkeypatch):
    """The address of a public bucket with `small_census`, and the environment that leads TileDB to it."""
    boto3 = pytest.importorskip(
        "boto3", reason="needs `pip install moto[server]`, kept out of the extras for its pins of botocore"
    )
    server = pytest.importorskip(
        "moto.server", reason="needs `pip install moto[server]`, kept out of the extras for its pins of botocore"
    )
    running = server.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    running.start()
    host, port = running.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "test")
    client = boto3.client("s3", endpoint_url=f"http://{host}:{port}", region_name="us-west-2")
    client.create_bucket(Bucket="census", CreateBucketConfiguration={"LocationConstraint": "us-west-2"})
    for path in Path(small_census).rglob("*"):
        if path.is_file():
            key = f"small/{path.relative_to(small_census)}"
            client.upload_file(str(path), "census", key, ExtraArgs={"ACL": "public-read"})
    yield (
        "s3://census/small",
        {
            "TILEDB_VFS_S3_ENDPOINT_OVERRIDE": f"{host}:{port}",
            "TILEDB_VFS_S3_SCHEME": "http",
            "TILEDB_VFS_S3_USE_VIRTUAL_ADDRESSING": "false",
        },
    )
    running.stop()


# boto3 and the server keep sockets until they are collected
@pytest.mark.filterwarnings(
    "ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::DeprecationWarning"
)
def test_cells_read_from_s3_equal_the_local_ones(bucket, small_census):
    address, environment = bucket
    done = subprocess.run(
        [sys.executable, "-c", READ, address, str(small_census)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip() == "s3://census/small/census_data/homo_sapiens"
