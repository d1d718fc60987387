"""What a cache says of itself: its source, its cells and genes, and the hash of every shard.

`manifest.json` appears when all shards are there, so a folder without one is no cache, or not yet. Beside it lie
`genes.csv` and the two files by which `datasets.load_from_disk` opens the folder.
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path, PurePath
from typing import Any, get_origin, get_type_hints
from uuid import uuid4

import pandas as pd
import pyarrow as pa

from scgpt_hf.cells.block import Int64Array, gene_hash

MANIFEST, GENES = "manifest.json", "genes.csv"
JOBS = ".jobs"  # folder within the cache in which jobs record what is finished, until all is
FORMAT = 1
REMEDY = "write it again with cache_census.py --rewrite, or fetch it again"
_WHERE = ("uri", "paths", "n_cells")  # of a source's description: where it lies now, and what `cells` says better


class CacheError(ValueError):
    """A cache is not whole, not what was asked for, or corrupt; the message names the file and what to do."""


@dataclass(frozen=True)
class ShardRecord:
    """One file of cells.

    Attributes:
        file: its name.
        sha256: of its bytes, in hexadecimal.
        n_bytes: their number.
        n_cells: cells in it.
        first_cell: the smallest of their ids.
        last_cell: the largest.
    """

    file: str
    sha256: str
    n_bytes: int
    n_cells: int
    first_cell: int
    last_cell: int


@dataclass(frozen=True)
class Identity:
    """What a cache is made of; two caches of one identity are equal, byte for byte.

    Attributes:
        source: what `CellSource.describe` says of where the cells come from.
        cells: number of cells.
        cells_hash: the first 16 hexadecimal digits of a SHA-256 over their ids.
        columns: obs columns.
        cells_per_shard: least number of cells of a shard; chunks of ids are never cut.
    """

    source: dict[str, Any]
    cells: int
    cells_hash: str
    columns: list[str]
    cells_per_shard: int


def is_cache(folder: Path) -> bool:
    """Return whether a folder is a cache, whole or begun."""
    return (folder / MANIFEST).exists() or (folder / JOBS).exists()


def require_identity(folder: Path, found: Identity, asked: Identity) -> None:
    """Raise unless a folder's cache is the one asked for; where the source lies now does not count.

    Raises:
        CacheError: it is of another source, filter or cells; the message says what differs.
    """
    _require_equal(folder, _comparable(found), _comparable(asked))


def require_same_source(folder: Path, found: Identity, asked: Identity) -> None:
    """Raise unless a folder's cache is of the source and the filter asked for, whichever cells it holds.

    Raises:
        CacheError: the message says what differs.
    """
    _require_equal(folder, _comparable_source(found), _comparable_source(asked))


def _require_equal(folder: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    if differs := [key for key in sorted(here | there) if here.get(key) != there.get(key)]:
        listed = "; ".join(f"{key}: expected {here.get(key)!r}, found {there.get(key)!r}" for key in differs)
        raise CacheError(f"{folder} holds a cache of something else ({listed}); choose another folder or remove it")


def hash_cells(cell_ids: Int64Array) -> str:
    """Return a fingerprint of the cells: the first 16 hexadecimal digits of a SHA-256 over their ids."""
    return hashlib.sha256(cell_ids.astype("<i8", copy=False).tobytes()).hexdigest()[:16]


def write_manifest(
    folder: Path, identity: Identity, shards: list[ShardRecord], genes: pd.DataFrame, schema: pa.Schema
) -> None:
    """Make a cache of a folder that holds all shards; each file appears whole, the manifest last."""
    from datasets import DatasetInfo, Features

    content = {"format": FORMAT, **asdict(identity), "shards": [asdict(shard) for shard in shards]}
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
    write_text(folder / GENES, genes[["feature_id", "feature_name"]].to_csv(index=False, lineterminator="\n"))
    write_text(folder / "dataset_info.json", json.dumps(asdict(info), indent=1, sort_keys=True) + "\n")
    write_text(folder / "state.json", json.dumps(state, indent=1, sort_keys=True) + "\n")
    write_text(folder / MANIFEST, manifest)


def read_manifest(folder: Path) -> tuple[Identity, list[ShardRecord]]:
    """Return what a cache is made of, and its shards, each of which is there and as long as it should be.

    Raises:
        CacheError: see `load_manifest`; or a shard is missing or cut off.
    """
    identity, shards = load_manifest(folder)
    for shard in shards:
        file = folder / shard.file
        found = file.stat().st_size if file.is_file() else None
        if found != shard.n_bytes:
            what = "is missing" if found is None else f"is corrupt: expected {shard.n_bytes:,} bytes, found {found:,}"
            raise CacheError(f"{file} {what}; {REMEDY}")
    return identity, shards


def load_manifest(folder: Path) -> tuple[Identity, list[ShardRecord]]:
    """Return what the manifest says; no other file is looked at.

    Raises:
        CacheError: there is none, or it is malformed or of a newer version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        begun = "; it was begun: run the same job again to complete it" if (folder / JOBS).is_dir() else ""
        raise CacheError(f"{folder} is not a cache: it has no {MANIFEST}{begun}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        shards = [ShardRecord(**shard) for shard in content.pop("shards")]
        identity = Identity(**content)
        _require_consistent(identity, shards)
        stray = [shard.file for shard in shards if PurePath(shard.file).name != shard.file]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CacheError(f"{path} is malformed ({error}); make the cache again with cache_census.py") from error
    if version != FORMAT:
        raise CacheError(f"{path} is of format {version}, expected {FORMAT}; update scgpt_hf, or make the cache again")
    if stray:
        raise CacheError(f"{path} names {stray[0]!r}, which is no file of the cache's own folder")
    return identity, shards


def _require_consistent(identity: Identity, shards: list[ShardRecord]) -> None:
    """Raise unless what is read later has the types it should, and the shards hold ascending cells, as many as said.

    Raises:
        KeyError, TypeError, ValueError: what is wrong.
    """
    for record in (identity, *shards):
        kinds = get_type_hints(type(record))
        _require_types(vars(record), {name: get_origin(kind) or kind for name, kind in kinds.items()})
    _require_types(identity.source, {"obs_filter": str | None, "layer": str, "gene_hash": str})
    _require_types(dict(enumerate(identity.columns)), dict.fromkeys(range(len(identity.columns)), str))
    edges = [0, *(cell for shard in shards for cell in (shard.first_cell, shard.last_cell + 1))]
    if edges != sorted(edges) or not 0 < identity.cells == sum(shard.n_cells for shard in shards):
        raise ValueError(f"its shards do not hold {identity.cells:,} ascending cells")


def _require_types(values: dict[Any, Any], kinds: dict[Any, Any]) -> None:
    for name, kind in kinds.items():
        if not isinstance(values[name], kind) or isinstance(values[name], bool):
            raise TypeError(f"{name!r} is {values[name]!r:.80}")


def read_genes(folder: Path, identity: Identity) -> pd.DataFrame:
    """Return the genes of a cache, row i for gene i: `feature_id`, `feature_name`.

    Raises:
        CacheError: they are missing, or not those the cells were written with.
    """
    try:
        genes = pd.read_csv(folder / GENES, dtype=str, keep_default_na=False)
        found = gene_hash(genes["feature_id"])
    except (OSError, KeyError, ValueError) as error:
        raise CacheError(f"cannot read the genes of the cache, {folder / GENES}: {error}") from error
    if found != identity.source["gene_hash"]:
        raise CacheError(
            f"{folder / GENES} has other genes than the cache: expected hash {identity.source['gene_hash']}, found "
            f"{found}; fetch it again, or make the cache again"
        )
    return genes


def check_shard(folder: Path, shard: ShardRecord) -> None:
    """Raise unless a shard has the bytes that were written.

    Raises:
        CacheError: it is missing, cut off or changed; it is named.
    """
    file = folder / shard.file
    try:
        found = hash_file(file)
    except FileNotFoundError as error:
        raise CacheError(f"{file} is missing; {REMEDY}") from error
    if found != shard.sha256:
        raise CacheError(f"{file} is corrupt: expected sha256 {shard.sha256[:16]}…, found {found[:16]}…; {REMEDY}")


def hash_file(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a file beside its place and move it there, whoever else does the same."""
    beside = path.with_name(f".{path.name}.{uuid4().hex[:8]}")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _comparable(identity: Identity) -> dict[str, Any]:
    """Return one dictionary of all that counts."""
    return _comparable_source(identity) | {key: value for key, value in asdict(identity).items() if key != "source"}


def _comparable_source(identity: Identity) -> dict[str, Any]:
    """Return what counts of a source; files keep their names, for their order numbers the cells."""
    files = [PurePath(path).name for path in identity.source.get("paths", [])]
    return {key: value for key, value in identity.source.items() if key not in _WHERE} | {"paths": files}
