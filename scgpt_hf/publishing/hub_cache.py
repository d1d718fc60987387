"""Publishes a cache as a dataset on the Hub, which `datasets` data_module and `open_source` opens after a download.

The shards go up as they are; of the manifest, what only holds on this machine is left out. Models are published by
`hub.py`, whose words for what the Hub refuses are used here too.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi

from scgpt_hf.cells.cache.manifest import GENES, MANIFEST, Identity, ShardRecord, check_shard, read_manifest
from scgpt_hf.publishing.hub import HubError, plain_words, require_repo_id
from scgpt_hf.publishing.record import portable

logger = logging.getLogger(__name__)

_AS_THEY_ARE = (GENES, "dataset_info.json", "state.json")
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
_SIZES |= {10**8: "10M<n<100M", 10**9: "100M<n<1B"}


def publish_cache(folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Put a cache on the Hub as a dataset, in one commit, and return its address.

    Doing it again changes only what changed; after an interruption only what is missing is sent.

    Args:
        folder: of the cache.
        repo_id: ORGANISATION/NAME; made if it does not exist.
        private: whether a new repository is private; by default as its owner has set.
        token: that may write there; the one of `hf auth login` when not given.

    Raises:
        CacheError: the cache is not whole, or a shard is corrupt.
        HubError: the Hub refuses, cannot be reached, or holds something else under this id.
        ValueError: the id is malformed.
    """
    folder = Path(folder)
    require_repo_id(repo_id)
    shards = read_manifest(folder)[1]
    for shard in shards:
        check_shard(folder, shard)
    files: dict[str, str | bytes] = {name: str(folder / name) for name in (*_AS_THEY_ARE, *(s.file for s in shards))}
    files[MANIFEST] = json.dumps(portable(json.loads((folder / MANIFEST).read_bytes())), indent=1).encode()
    files["README.md"] = str(cache_card(folder, repo_id)).encode()
    api = HfApi(token=token)
    with plain_words(repo_id, api.endpoint):
        there = _claim(api, repo_id, private)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content) for name, content in files.items()
        ]
        stale = [name for name in there if name.endswith(".arrow") and name not in files]
        operations += [CommitOperationDelete(name) for name in stale]
        api.create_commit(repo_id, operations, commit_message="Publish a cache of cells", repo_type="dataset")
    logger.info("published %d files of %s", len(files), folder)
    return f"{api.endpoint}/datasets/{repo_id}"


def check_dataset(repo_id: str, *, private: bool | None = None, token: str | None = None) -> None:
    """Raise unless a cache can be published there; to be asked before it is written. Arguments as of `publish_cache`.

    A repository that does not exist is made, as the only sure way to know that it can be.

    Raises:
        HubError, ValueError: as `publish_cache`.
    """
    require_repo_id(repo_id)
    api = HfApi(token=token)
    with plain_words(repo_id, api.endpoint):
        _claim(api, repo_id, private)


def cache_card(folder: Path, repo_id: str) -> DatasetCard:
    """Return the dataset card of a cache: where its cells come from, what a row is, and how to read it.

    Raises:
        CacheError: the cache is not whole.
    """
    identity, shards = read_manifest(folder)
    source: dict[str, Any] = portable(identity.source)
    census = source.get("census_version")
    metadata = DatasetCardData(
        license="cc-by-4.0" if census else "other",
        license_name=None if census else "see-the-sources",
        tags=["single-cell", "biology", "transcriptomics", "gene-expression", "scgpt_hf"],
        size_categories=[next((name for most, name in _SIZES.items() if identity.cells < most), "n>1T")],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data-*.arrow"}]}],
    )
    text = _CARD.format(
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        table=_facts(identity, shards, source),
        columns=", ".join(f"`{name}`" for name in identity.columns) or "none",
        gene=pa.ipc.open_stream(folder / shards[0].file).schema.field("gene").type.value_type,
    )
    return DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _facts(identity: Identity, shards: list[ShardRecord], source: dict[str, Any]) -> str:
    census = source.get("census_version")
    origin = ", ".join(source.get("paths", [])) or source.get("uri", "not recorded")
    rows = {
        "Cells": f"{identity.cells:,}, in {len(shards):,} files of {sum(s.n_bytes for s in shards) / 1e9:,.2f} GB",
        "Source": f"CELLxGENE Census, {source['organism']}" if census else origin,
        "Census version": census or "none: not read from a release of the Census",
        "Layer": f"`{source['layer']}`, raw counts",
        "Filter": f"`{source['obs_filter']}`" if source.get("obs_filter") else "none",
        "Genes": f"{source['n_genes']:,}, hash {source['gene_hash']}",
        "Licence": "CC BY 4.0, as all of the Census" if census else "see the sources",
    }
    return "\n".join(f"| {name} | {str(value).replace('|', chr(92) + '|')} |" for name, value in rows.items())


def _claim(api: HfApi, repo_id: str, private: bool | None) -> list[str]:
    """Return the files of the dataset's repository, made if it does not exist, after checking that it can be used."""
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.auth_check(repo_id, repo_type="dataset", write=True)
    found = api.dataset_info(repo_id)
    if private and not found.private:
        raise HubError(f"asked for a private repository, but {repo_id} exists and is public; choose another name")
    there = [sibling.rfilename for sibling in found.siblings or []]
    if set(there) - {".gitattributes", "README.md"} and MANIFEST not in there:
        raise HubError(f"{repo_id} already holds a dataset that is no cache of cells; choose another name")
    return there


_CARD = """# {title}

Raw counts of single cells, written by scgpt_hf for training: any cells in any order, straight from the Arrow files.

| | |
| --- | --- |
{table}

## A row is a cell

| column | type | meaning |
| --- | --- | --- |
| `cell_id` | int64 | the cell's id in its source (`soma_joinid` of the Census) |
| `gene` | list of {gene} | its expressed genes: rows of `genes.csv`, counted from 0, ascending |
| `count` | list of uint8 | their raw counts; 255 stands for the next entry of `large_count` |
| `large_count` | list of uint32 | the counts of 255 and more |

From the source's obs: {columns}.

## How to load

```python
import pandas
from datasets import load_dataset
genes = pandas.read_csv("hf://datasets/{repo_id}/genes.csv")
for cell in load_dataset("{repo_id}", split="train", streaming=True):
    large = iter(cell["large_count"])
    counts = [next(large) if count == 255 else count for count in cell["count"]]
    names = genes.feature_id[cell["gene"]]
    break
```

```python
import scgpt_hf
source = scgpt_hf.open_source("hf://datasets/{repo_id}")  # downloaded once
block = source.read(source.obs().index.to_numpy()[:100])  # block.counts: (cells, genes), sparse
```

`accelerate launch scripts/pretrain.py --data hf://datasets/{repo_id}` trains on it. `manifest.json` holds the sha256 of
every file of cells, by which what arrived is checked (up to 64 GiB).
"""
