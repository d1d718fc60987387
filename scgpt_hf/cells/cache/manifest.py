"""The manifest of a cache: its source, its cells and genes, and the hash of every shard.

`manifest.json` is written last, when all shards are complete. So a folder without one is not a cache, or not a complete
one. The other files are `genes.csv`, `presence.safetensors` (see `presence.py`), and two by which
`datasets.load_from_disk` opens the folder.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, get_origin, get_type_hints

import pandas as pd
import pyarrow as pa

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.block import Int64Array, gene_hash

MANIFEST, GENES = "manifest.json", "genes.csv"
JOBS = ".jobs"  # folder within the cache where jobs record finished shards; removed when the cache is complete
FORMAT = 1
REMEDY = "write it again with cache_census.py --rewrite, or download it again"
# Entries of a source's description that do not change the cells: where the source is now, and how many cells match its
# filter, of which a cache may hold a part (`CacheIdentity.cells`).
_NOT_COMPARED = ("uri", "paths", "n_cells")


class CacheError(ValueError):
    """A cache is incomplete, corrupt, or made of other cells than requested; the message names the file."""


@dataclass(frozen=True)
class ShardRecord:
    """The manifest's entry for one shard.

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
class CacheIdentity:
    """Everything that determines the contents of a cache: two caches with equal identities have equal bytes.

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


def is_cache(folder: Path) -> bool:
    """Return whether a folder is a cache, complete or not."""
    return (folder / MANIFEST).exists() or (folder / JOBS).exists()


def require_same_identity(folder: Path, found: CacheIdentity, expected: CacheIdentity) -> None:
    """Raise unless the cache in a folder has the expected contents. The current location of the source is ignored.

    Raises:
        CacheError: it has another source, filter or cells; the message lists the differences.
    """
    _require_equal(folder, _comparable(found), _comparable(expected))


def require_same_source(folder: Path, found: CacheIdentity, expected: CacheIdentity) -> None:
    """Raise unless the cache in a folder has the expected source and filter. It may hold other cells of them.

    Raises:
        CacheError: it has another source or filter; the message lists the differences.
    """
    _require_equal(folder, _comparable_source(found), _comparable_source(expected))


def _require_equal(folder: Path, found: dict[str, Any], expected: dict[str, Any]) -> None:
    if differing := [key for key in sorted(expected | found) if expected.get(key) != found.get(key)]:
        listed = "; ".join(f"{key}: expected {expected.get(key)!r}, found {found.get(key)!r}" for key in differing)
        raise CacheError(f"{folder} holds a different cache ({listed}); choose another folder, or remove this one")


def hash_cells(cell_ids: Int64Array) -> str:
    """Return the first 16 hexadecimal digits of a SHA-256 over cell ids, as little-endian int64."""
    return hashlib.sha256(cell_ids.astype("<i8", copy=False).tobytes()).hexdigest()[:16]


def write_manifest(
    folder: Path,
    identity: CacheIdentity,
    shards: list[ShardRecord],
    genes: pd.DataFrame,
    schema: pa.Schema,
    presence: str | None,
) -> None:
    """Complete a cache whose shards are all written: write the genes, the files of `datasets`, and the manifest.

    Args:
        folder: the folder of the cache.
        identity: what the cache was made of.
        shards: all shards, by ascending cell id.
        genes: `feature_id` and `feature_name`, row i for gene i of the shards.
        schema: the schema of the shards.
        presence: SHA-256 of the file that `write_presence` wrote; None without one.
    """
    from datasets import DatasetInfo, Features

    content = {"format": FORMAT, **asdict(identity), "shards": [asdict(shard) for shard in shards]}
    if presence is not None:
        content["presence"] = presence
    manifest = json.dumps(content, indent=1) + "\n"
    info = DatasetInfo(features=Features.from_arrow_schema(schema))
    state: dict[str, Any] = {
        "_data_files": [{"filename": shard.file} for shard in shards],
        "_fingerprint": hashlib.sha256(manifest.encode()).hexdigest()[:16],
        "_format_columns": None,
        "_format_kwargs": {},
        "_format_type": None,
        "_output_all_columns": False,
        "_split": "train",
    }
    write_atomically(folder / GENES, genes[["feature_id", "feature_name"]].to_csv(index=False, lineterminator="\n"))
    write_atomically(folder / "dataset_info.json", json.dumps(asdict(info), indent=1, sort_keys=True) + "\n")
    write_atomically(folder / "state.json", json.dumps(state, indent=1, sort_keys=True) + "\n")
    write_atomically(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> tuple[CacheIdentity, list[ShardRecord]]:
    """Read the manifest and check that all shards exist and have the recorded size.

    Returns:
        What the cache was made of, and its shards.

    Raises:
        CacheError: see `load_manifest`; or a shard is missing or incomplete.
    """
    identity, shards = load_manifest(folder)
    for shard in shards:
        file = folder / shard.file
        found = file.stat().st_size if file.is_file() else None
        if found != shard.n_bytes:
            problem = "missing" if found is None else f"corrupt: expected {shard.n_bytes:,} bytes, found {found:,}"
            raise CacheError(f"{file} is {problem}; {REMEDY}")
    return identity, shards


def load_manifest(folder: Path) -> tuple[CacheIdentity, list[ShardRecord]]:
    """Read the manifest without looking at any other file.

    Returns:
        What the cache was made of, and its shards.

    Raises:
        CacheError: the manifest does not exist, is malformed, or has another format version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        advice = "; it is incomplete: run the same command again to complete it" if (folder / JOBS).is_dir() else ""
        raise CacheError(f"{folder} is not a cache, because it has no {MANIFEST}{advice}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        content.pop("presence", None)  # see `read_presence`
        shards = [ShardRecord(**shard) for shard in content.pop("shards")]
        identity = CacheIdentity(**content)
        _require_consistent(identity, shards)
        # A manifest from elsewhere must not make us read files outside of the folder.
        outside = [shard.file for shard in shards if PurePath(shard.file).name != shard.file]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CacheError(f"{path} is malformed ({error}); write the cache again with cache_census.py") from error
    if version != FORMAT:
        raise CacheError(f"{path} has format {version}, expected {FORMAT}; update scgpt_hf, or write the cache again")
    if outside:
        raise CacheError(f"{path} names the shard {outside[0]!r}, which is not in the folder of the cache")
    return identity, shards


def _require_consistent(identity: CacheIdentity, shards: list[ShardRecord]) -> None:
    """Raise unless all values have the right types and the shards hold the recorded number of ascending cells.

    Raises:
        KeyError: an entry is missing.
        TypeError: an entry has another type.
        ValueError: the cell ids or numbers of cells of the shards are inconsistent.
    """
    for record in (identity, *shards):
        kinds = get_type_hints(type(record))
        _require_types(vars(record), {name: get_origin(kind) or kind for name, kind in kinds.items()})
    _require_types(identity.source, {"obs_filter": str | None, "layer": str, "gene_hash": str})
    _require_types(dict(enumerate(identity.obs_columns)), dict.fromkeys(range(len(identity.obs_columns)), str))
    edges = [0, *(cell for shard in shards for cell in (shard.first_cell, shard.last_cell + 1))]
    if edges != sorted(edges) or not 0 < identity.cells == sum(shard.n_cells for shard in shards):
        raise ValueError(f"the shards do not hold {identity.cells:,} cells by ascending id")


def _require_types(values: dict[Any, Any], kinds: dict[Any, Any]) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise TypeError(f"{name!r} is {values[name]!r:.80}")


def read_genes(folder: Path, identity: CacheIdentity) -> pd.DataFrame:
    """Read the genes of a cache: `feature_id` and `feature_name`, row i for gene i of the shards.

    Raises:
        CacheError: the file is missing or malformed, or has other genes than the cells were written with.
    """
    try:
        genes = pd.read_csv(folder / GENES, dtype=str, keep_default_na=False)
        found = gene_hash(genes["feature_id"])
    except (OSError, KeyError, ValueError) as error:
        raise CacheError(f"cannot read the genes of the cache, {folder / GENES}: {error}") from error
    if found != identity.source["gene_hash"]:
        raise CacheError(
            f"{folder / GENES} has other genes than the cache: expected hash {identity.source['gene_hash']}, found "
            f"{found}; download it again, or write the cache again"
        )
    return genes


def verify_shard(folder: Path, shard: ShardRecord) -> None:
    """Raise unless the hash of a shard is the recorded one.

    Raises:
        CacheError: the shard is missing or corrupt.
    """
    file = folder / shard.file
    try:
        found = hash_file(file)
    except FileNotFoundError as error:
        raise CacheError(f"{file} is missing; {REMEDY}") from error
    if found != shard.sha256:
        raise CacheError(f"{file} is corrupt: expected sha256 {shard.sha256[:16]}…, found {found[:16]}…; {REMEDY}")


def hash_file(path: Path) -> str:
    """Return the SHA-256 of a file in hexadecimal digits."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _comparable(identity: CacheIdentity) -> dict[str, Any]:
    """Return the entries of an identity that are compared."""
    return _comparable_source(identity) | {key: value for key, value in asdict(identity).items() if key != "source"}


def _comparable_source(identity: CacheIdentity) -> dict[str, Any]:
    """Return the entries of a source that are compared.

    The names of files are among them, because cells are numbered in the order of the files.
    """
    files = [PurePath(path).name for path in identity.source.get("paths", [])]
    return {key: value for key, value in identity.source.items() if key not in _NOT_COMPARED} | {"paths": files}
