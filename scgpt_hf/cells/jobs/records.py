"""Records of a folder of shards: the cells it is made of, and the hash of each file.

`shard_jobs.py` writes the records; the manifest of a complete folder lists all of them.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any

from scgpt_hf.cells.block import Int64Array

PLAN = "plan.json"  # in the folder of the records: the identity and the file names of a folder that is not complete
REMEDY = "run the command that wrote it again with --rewrite, or download it again"
# Entries of a source's description that do not change the cells: where the source is now, and how many cells match its
# filter, of which a folder may hold a part (`ShardsIdentity.cells`).
_NOT_COMPARED = ("uri", "paths", "n_cells")


class ShardError(ValueError):
    """A folder of shards is incomplete, corrupt, or made of other data than requested; the message names the file."""


@dataclass(frozen=True)
class ShardRecord:
    """The record of one shard.

    Attributes:
        file: the name of the file.
        sha256: its SHA-256, in hexadecimal digits.
        n_bytes: its size.
        n_cells: number of cells.
        first_cell: the smallest cell id.
        last_cell: the largest cell id.
    """

    file: str
    sha256: str
    n_bytes: int
    n_cells: int
    first_cell: int
    last_cell: int


@dataclass(frozen=True)
class ShardsIdentity:
    """Everything that determines the contents of a folder of shards: equal identities have equal bytes.

    Attributes:
        source: the origin of the cells, as `CellSource.describe` returns it.
        cells: number of cells.
        cells_hash: hash of the cell ids, from `hash_cells`.
        obs_columns: names of the obs columns.
        cells_per_shard: least number of cells of a shard. A chunk of ids is never split over two shards.
    """

    source: dict[str, Any]
    cells: int
    cells_hash: str
    obs_columns: list[str]
    cells_per_shard: int


def require_same_identity(folder: Path, found: ShardsIdentity, expected: ShardsIdentity) -> None:
    """Raise unless the shards in a folder have the expected contents. The current location of the source is ignored.

    Raises:
        ShardError: they have another source, filter, cells or settings; the message lists the differences.
    """
    _require_equal(folder, _comparable(found), _comparable(expected))


def require_same_source(folder: Path, found: ShardsIdentity, expected: ShardsIdentity) -> None:
    """Raise unless the shards in a folder have the expected source and filter. They may hold other cells of them.

    Raises:
        ShardError: they have another source or filter; the message lists the differences.
    """
    _require_equal(folder, _comparable_source(found), _comparable_source(expected))


def _require_equal(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    if differing := [key for key in sorted(expected | found) if expected.get(key) != found.get(key)]:
        listed = "; ".join(f"{key}: expected {expected.get(key)!r}, found {found.get(key)!r}" for key in differing)
        raise ShardError(f"{folder} holds different data ({listed}); choose another folder, or remove this one")


def hash_cells(cell_ids: Int64Array) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 over cell ids, as little-endian int64."""
    return hashlib.sha256(cell_ids.astype("<i8", copy=False).tobytes()).hexdigest()[:16]


def verify_shard(folder: Path, shard: ShardRecord) -> None:
    """Raise unless the hash of a shard is the recorded one.

    Raises:
        ShardError: the shard is missing or corrupt.
    """
    file = folder / shard.file
    try:
        found = hash_file(file)
    except FileNotFoundError as error:
        raise ShardError(f"{file} is missing; {REMEDY}") from error
    if found != shard.sha256:
        raise ShardError(f"{file} is corrupt: expected sha256 {shard.sha256[:16]}…, found {found[:16]}…; {REMEDY}")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def read_plan(records: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the entries of the identity and the file names of a folder that is not complete.

    Args:
        records: the folder of the records, within the folder of the shards.

    Raises:
        FileNotFoundError: nothing was planned there, or the folder is complete.
    """
    plan = json.loads((records / PLAN).read_text(encoding="utf-8"))
    return plan["identity"], plan["files"]


def describe_missing(folder: Path, records: Path) -> str:
    """Name the files that a folder of shards lacks, for an error.

    Args:
        folder: the folder of the shards, which is not complete.
        records: see `read_plan`.
    """
    files = read_plan(records)[1]
    missing = [name for name in files if not ((folder / name).exists() and (records / f"{name}.json").exists())]
    shown = ", ".join(missing[:8]) + (f" and {len(missing) - 8:,} more" if len(missing) > 8 else "")
    return (
        f"{folder} is not complete: it lacks {len(missing):,} of {len(files):,} files: {shown}. Job I of N "
        "(--shard I/N) writes the files I, I + N, I + 2N, …; the same command without --shard writes what is missing"
    )


def _comparable(identity: ShardsIdentity) -> dict[str, Any]:
    """Return the entries of an identity that are compared."""
    return _comparable_source(identity) | {key: value for key, value in asdict(identity).items() if key != "source"}


def _comparable_source(identity: ShardsIdentity) -> dict[str, Any]:
    """Return the entries of a source that are compared.

    The names of files are among them, because cells are numbered in the order of the files.
    """
    files = [PurePath(path).name for path in identity.source.get("paths", [])]
    return {key: value for key, value in identity.source.items() if key not in _NOT_COMPARED} | {"paths": files}
