"""The manifest of a cache: its source, its cells and genes, and the hash of every shard.

`manifest.json` is written last, when all shards are complete. So a folder without one is not a cache, or not a complete
one. The other files are `genes.csv`, `presence.safetensors` (see `presence.py`), and two by which
`datasets.load_from_disk` opens the folder.
"""

import hashlib
import json
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any, get_origin, get_type_hints

import pandas as pd
import pyarrow as pa

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.block import gene_hash
from scgpt_hf.cells.jobs.records import REMEDY, ShardError, ShardRecord, ShardsIdentity, describe_missing

MANIFEST, GENES = "manifest.json", "genes.csv"
DATASET_FILES = ("dataset_info.json", "state.json")  # by which `datasets` opens the folder
JOBS = ".jobs"  # folder within the cache where jobs record finished shards; removed when the cache is complete
FORMAT = 1


def is_cache(folder: Path) -> bool:
    """Return whether a folder is a cache, complete or not."""
    return (folder / MANIFEST).exists() or (folder / JOBS).exists()


def write_manifest(
    folder: Path,
    identity: ShardsIdentity,
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
    texts = {
        GENES: genes[["feature_id", "feature_name"]].to_csv(index=False, lineterminator="\n"),
        **{
            name: json.dumps(value, indent=1, sort_keys=True) + "\n"
            for name, value in zip(DATASET_FILES, (asdict(info), state), strict=True)
        },
        MANIFEST: manifest,
    }
    for name, text in texts.items():
        write_atomically(folder / name, text, temporary_folder=folder / JOBS)


def read_manifest(folder: Path) -> tuple[ShardsIdentity, list[ShardRecord]]:
    """Read the manifest and check that all shards exist and have the recorded size.

    Returns:
        What the cache was made of, and its shards.

    Raises:
        ShardError: see `load_manifest`; or a shard is missing or incomplete.
    """
    identity, shards = load_manifest(folder)
    for shard in shards:
        file = folder / shard.file
        found = file.stat().st_size if file.is_file() else None
        if found != shard.n_bytes:
            problem = "missing" if found is None else f"corrupt: expected {shard.n_bytes:,} bytes, found {found:,}"
            raise ShardError(f"{file} is {problem}; {REMEDY}")
    return identity, shards


def load_manifest(folder: Path) -> tuple[ShardsIdentity, list[ShardRecord]]:
    """Read the manifest without looking at any other file.

    Returns:
        What the cache was made of, and its shards.

    Raises:
        ShardError: the manifest does not exist, is malformed, or has another format version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        with suppress(FileNotFoundError):
            raise ShardError(describe_missing(folder, folder / JOBS))
        raise ShardError(f"{folder} is not a cache, because it has no {MANIFEST}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("format")
        content.pop("presence", None)  # see `read_presence`
        shards = [ShardRecord(**shard) for shard in content.pop("shards")]
        identity = ShardsIdentity(**content)
        _require_consistent(identity, shards)
        # A manifest from elsewhere must not make us read files outside of the folder.
        outside = [shard.file for shard in shards if PurePath(shard.file).name != shard.file]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ShardError(f"{path} is malformed ({error}); write the cache again with scgpt-hf cache") from error
    if version != FORMAT:
        raise ShardError(f"{path} has format {version}, expected {FORMAT}; update scgpt_hf, or write the cache again")
    if outside:
        raise ShardError(f"{path} names the shard {outside[0]!r}, which is not in the folder of the cache")
    return identity, shards


def _require_consistent(identity: ShardsIdentity, shards: list[ShardRecord]) -> None:
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


def read_genes(folder: Path, identity: ShardsIdentity) -> pd.DataFrame:
    """Read the genes of a cache: `feature_id` and `feature_name`, row i for gene i of the shards.

    Raises:
        ShardError: the file is missing or malformed, or has other genes than the cells were written with.
    """
    try:
        genes = pd.read_csv(folder / GENES, dtype=str, keep_default_na=False)
        found = gene_hash(genes["feature_id"])
    except (OSError, KeyError, ValueError) as error:
        raise ShardError(f"cannot read the genes of the cache, {folder / GENES}: {error}") from error
    if found != identity.source["gene_hash"]:
        raise ShardError(
            f"{folder / GENES} has other genes than the cache: expected hash {identity.source['gene_hash']}, found "
            f"{found}; download it again, or write the cache again"
        )
    return genes
