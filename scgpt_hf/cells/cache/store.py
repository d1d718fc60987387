"""Download a cache from a store, such as S3: `s3://BUCKET/FOLDER`. `hub.py` downloads one from the Hub.

A cache is read one cell at a time, in random order, and a store needs 30 ms or more for an answer. So the files are
downloaded once to each machine, and `reader.py` maps them from its disk. They are stored below HF_HOME, in a folder
named by the hash of the manifest: a cache that has changed in the store is another folder.

Arrow reads the store. It finds credentials as other clients of AWS do, and the store at `AWS_ENDPOINT_URL`, if set.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from urllib.parse import urlencode

import pyarrow as pa
from huggingface_hub import constants
from pyarrow.fs import FileSystem

from scgpt_hf.cells.cache.manifest import DATASET_FILES, GENES, JOBS, MANIFEST, load_manifest
from scgpt_hf.cells.cache.presence import PRESENCE
from scgpt_hf.cells.jobs.hashed_file import HashedFile, WrittenFile, write_hashed
from scgpt_hf.cells.jobs.records import ShardError, ShardRecord
from scgpt_hf.cells.locking import exclusive
from scgpt_hf.cells.soma.remote import RetryPolicy, require_no_credentials
from scgpt_hf.cells.threads import DaemonThreadPool
from scgpt_hf.progress_bar import progress_bar

logger = logging.getLogger(__name__)

# Files that are downloaded at the same time, and bytes of one request: together they take 256 MB, and 16 requests of
# 16 MB keep a line of 10 Gbit/s busy while each waits 150 ms for its first byte.
_N_THREADS = 16
_REQUEST_BYTES = 2**24


def download_from_store(address: str) -> Path | None:
    """Download a cache from a store and return its folder; None if there is no cache at this address.

    Files that an earlier call has downloaded are not downloaded again.

    Args:
        address: the URI of the folder, of a store that Arrow can read, e.g. `s3://my-bucket/blood`.

    Raises:
        ValueError: the address contains a password.
        ConnectionError: the store fails in every attempt.
        FileNotFoundError: a file of the cache is missing in the store.
        PermissionError: the store denies access to a file.
        OSError: the disk has too little space.
        ShardError: the manifest is malformed, or a file differs from it.
    """
    require_no_credentials(address)
    try:
        files, path = _open_store(address)
        manifest = files.open_input_stream(f"{path}/{MANIFEST}").readall()
    except (OSError, pa.ArrowInvalid) as error:
        # Most often it is a SOMA. If the store cannot be reached, reading that will say so, after more attempts.
        level = logging.DEBUG if isinstance(error, FileNotFoundError) else logging.WARNING
        logger.log(level, "%s is not read as a cache, because its %s cannot be read: %s", address, MANIFEST, error)
        return None
    version = hashlib.sha256(manifest).hexdigest()[:16]
    folder = Path(constants.HF_HOME) / "scgpt_hf" / "caches" / f"{path.rsplit('/', 1)[-1]}-{version}"
    with exclusive(folder, wait=True):  # of several processes of a machine, one downloads
        if not (folder / MANIFEST).exists():
            logger.info("downloading %s to %s", address, folder)
            _download(files, path, manifest, folder)
    return folder


def _open_store(address: str) -> tuple[FileSystem, str]:
    """Return the file system of an address and the path there.

    Endpoint, scheme and region that the environment sets for TileDB apply to Arrow too: one setting serves both.
    """
    settings = {
        "endpoint_override": os.environ.get("TILEDB_VFS_S3_ENDPOINT_OVERRIDE"),
        "scheme": os.environ.get("TILEDB_VFS_S3_SCHEME"),
        "region": os.environ.get("TILEDB_VFS_S3_REGION"),
    }
    known = {name: value for name, value in settings.items() if value} if address.startswith("s3://") else {}
    files, path = FileSystem.from_uri(f"{address.rstrip('/')}{'?' if known else ''}{urlencode(known)}")
    return files, path.rstrip("/")


def _download(files: FileSystem, path: str, manifest: bytes, folder: Path) -> None:
    """Download a cache from a path of a store; the manifest is written last and makes the folder complete."""
    unfinished = folder / JOBS
    unfinished.mkdir(parents=True, exist_ok=True)
    (unfinished / MANIFEST).write_bytes(manifest)
    identity, shards = load_manifest(unfinished)
    # A shard gets its name after its hash was verified, so that of one that is there only the size is compared.
    found = {path.name: path.stat().st_size for path in folder.iterdir()}
    missing = [shard for shard in shards if found.get(shard.file) != shard.n_bytes]
    n_bytes = sum(shard.n_bytes for shard in missing)
    if n_bytes > (free := shutil.disk_usage(folder).free):
        raise OSError(
            errno.ENOSPC,
            f"the cache {path} takes {n_bytes / 1e9:.1f} GB, but only {free / 1e9:.1f} GB are free at {folder}; set "
            "HF_HOME to a folder on a larger disk",
        )
    small = [GENES, *DATASET_FILES, *([PRESENCE] if "presence" in json.loads(manifest) else [])]
    policy, threads = RetryPolicy(), DaemonThreadPool(_N_THREADS, "cache-download")

    def download(name: str, check: Callable[[WrittenFile], object] = lambda written: None) -> None:
        fill = partial(_copy, policy, files, f"{path}/{name}")
        write_hashed(folder / name, fill, temporary_folder=unfinished, before_rename=check)

    def download_shard(shard: ShardRecord) -> int:
        download(shard.file, partial(_require_recorded, f"{path}/{shard.file}", shard))
        return shard.n_cells

    bar = progress_bar(description="downloading", unit="cells", total=identity.cells)
    try:
        with bar:
            bar.update(identity.cells - sum(shard.n_cells for shard in missing))
            list(threads.map(download, small))
            for n_cells in threads.map(download_shard, missing):
                bar.update(n_cells)
    finally:
        threads.shutdown()
    (unfinished / MANIFEST).rename(folder / MANIFEST)
    shutil.rmtree(unfinished)


def _copy(policy: RetryPolicy, files: FileSystem, path: str, target: HashedFile) -> None:
    """Write the contents of an object of a store to a file, one request after the other."""
    uri = f"{files.type_name}://{path}"
    source = policy.read(uri, lambda: files.open_input_file(path))
    for start in range(0, source.size(), _REQUEST_BYTES):
        target.write(policy.read(uri, partial(source.read_at, _REQUEST_BYTES, start)))


def _require_recorded(path: str, shard: ShardRecord, written: WrittenFile) -> None:
    """Raise unless the downloaded shard is the one of the manifest."""
    if written != (shard.sha256, shard.n_bytes):
        raise ShardError(
            f"{path} is not the file of {MANIFEST}: expected {shard.n_bytes:,} bytes with sha256 {shard.sha256[:16]}…, "
            f"found {written.n_bytes:,} bytes with {written.sha256[:16]}…; upload the cache again"
        )
