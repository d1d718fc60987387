"""Publish a cache as a dataset on the Hub, which `datasets` can stream and `open_source` can download and open.

The shards are uploaded unchanged. The manifest is published without local paths. `publish_run.py` publishes models.
"""

import json
import logging
from pathlib import Path
from typing import Any

import pyarrow as pa
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCard, DatasetCardData, HfApi

from scgpt_hf.cells.cache.manifest import DATASET_FILES, GENES, MANIFEST, read_manifest
from scgpt_hf.cells.cache.presence import PRESENCE
from scgpt_hf.cells.jobs.records import ShardRecord, ShardsIdentity, verify_shard
from scgpt_hf.publishing.card import markdown_table
from scgpt_hf.publishing.hub import HubError, require_repo_id, translate_hub_errors
from scgpt_hf.publishing.record import UNKNOWN, strip_private
from scgpt_hf.publishing.run_summary import Code, Rows

logger = logging.getLogger(__name__)

_UNCHANGED = (GENES, *DATASET_FILES)
# The Hub's names for sizes of data sets: fewer rows than the key.
_SIZES = {10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M", 10**7: "1M<n<10M"}
_SIZES |= {10**8: "10M<n<100M", 10**9: "100M<n<1B"}


def publish_cache(folder: str | Path, repo_id: str, *, private: bool | None = None, token: str | None = None) -> str:
    """Publish a cache as a dataset on the Hub, in one commit, and return its address.

    Publishing again sends only what changed. After an interruption, only the missing files are sent.

    Args:
        folder: the folder of the cache.
        repo_id: ORGANISATION/NAME; created if it does not exist.
        private: whether a new repository is private; the owner's default when not given.
        token: token with write access; that of `hf auth login` when not given.

    Returns:
        The address of the dataset.

    Raises:
        ShardError: the cache is incomplete, or a shard is corrupt.
        HubError: the Hub cannot be reached, rejects the upload, or holds something else under this id.
        ValueError: the id is malformed.

    Example:
        >>> publish_cache("blood_cache", "my-lab/blood")  # doctest: +SKIP
        'https://huggingface.co/datasets/my-lab/blood'
    """
    folder = Path(folder)
    require_repo_id(repo_id)
    shards = read_manifest(folder)[1]
    for shard in shards:
        verify_shard(folder, shard)
    files: dict[str, str | bytes] = {name: str(folder / name) for name in (*_UNCHANGED, *(s.file for s in shards))}
    if (folder / PRESENCE).exists():
        files[PRESENCE] = str(folder / PRESENCE)
    files[MANIFEST] = json.dumps(strip_private(json.loads((folder / MANIFEST).read_bytes())), indent=1).encode()
    files["README.md"] = str(cache_card(folder, repo_id)).encode()
    api = HfApi(token=token)
    with translate_hub_errors(repo_id, api.endpoint):
        published = _prepare_repository(api, repo_id, private)
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(name, content) for name, content in files.items()
        ]
        stale = [name for name in published if name.endswith(".arrow") and name not in files]
        operations += [CommitOperationDelete(name) for name in stale]
        api.create_commit(repo_id, operations, commit_message="Publish a cache of cells", repo_type="dataset")
    logger.info("published %d files of %s", len(files), folder)
    return f"{api.endpoint}/datasets/{repo_id}"


def check_dataset(repo_id: str, *, private: bool | None = None, token: str | None = None) -> None:
    """Check that a cache can be published, before it is written.

    Creates the repository if it does not exist: only that shows that it can be created.

    Args:
        repo_id: see `publish_cache`.
        private: see `publish_cache`.
        token: see `publish_cache`.

    Raises:
        HubError: the Hub cannot be reached, or would not accept the cache.
        ValueError: the id is malformed.
    """
    require_repo_id(repo_id)
    api = HfApi(token=token)
    with translate_hub_errors(repo_id, api.endpoint):
        _prepare_repository(api, repo_id, private)


def cache_card(folder: Path, repo_id: str) -> DatasetCard:
    """Return the dataset card of a cache: the origin of its cells, the columns, and how to load it.

    Args:
        folder: the folder of the cache.
        repo_id: repository that the card's code loads.

    Raises:
        ShardError: the cache is incomplete.
    """
    identity, shards = read_manifest(folder)
    source: dict[str, Any] = strip_private(identity.source)
    census = source.get("census_version")
    metadata = DatasetCardData(
        license="cc-by-4.0" if census else "other",
        license_name=None if census else "see-the-sources",
        tags=["single-cell", "biology", "transcriptomics", "gene-expression", "scgpt_hf"],
        size_categories=[next((name for limit, name in _SIZES.items() if identity.cells < limit), "n>1T")],
        configs=[{"config_name": "default", "data_files": [{"split": "train", "path": "data-*.arrow"}]}],
    )
    text = _CARD.format(
        title=repo_id.split("/")[-1],
        repo_id=repo_id,
        table=markdown_table(_facts(identity, shards, source)),
        columns=", ".join(f"`{name}`" for name in identity.obs_columns) or "none",
        gene=pa.ipc.open_stream(folder / shards[0].file).schema.field("gene").type.value_type,
    )
    return DatasetCard(f"---\n{metadata.to_yaml()}\n---\n\n{text}")


def _facts(identity: ShardsIdentity, shards: list[ShardRecord], source: dict[str, Any]) -> Rows:
    census = source.get("census_version")
    origin = ", ".join(source.get("paths", [])) or source.get("uri", UNKNOWN)
    return {
        "Cells": f"{identity.cells:,}, in {len(shards):,} files of {sum(s.n_bytes for s in shards) / 1e9:,.2f} GB",
        "Source": f"CELLxGENE Census, {source['organism']}" if census else origin,
        "Census version": census or "none: the cells are not from a release of the Census",
        "Layer of the raw counts": Code(source["layer"]),
        "Filter": Code(source["obs_filter"]) if source.get("obs_filter") else "none",
        "Genes": f"{source['n_genes']:,}, hash {source['gene_hash']}",
        "License": "CC BY 4.0, as for all of the Census" if census else "see the sources",
    }


def _prepare_repository(api: HfApi, repo_id: str, private: bool | None) -> list[str]:
    """Create the dataset's repository if needed, check that it can be used, and return the names of its files."""
    api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True)
    api.auth_check(repo_id, repo_type="dataset", write=True)
    found = api.dataset_info(repo_id)
    if private and not found.private:
        raise HubError(
            f"requested a private repository, but {repo_id} exists and is public; make it private in its settings on "
            "the Hub, or choose another repository id"
        )
    published = [sibling.rfilename for sibling in found.siblings or []]
    if set(published) - {".gitattributes", "README.md"} and MANIFEST not in published:
        raise HubError(
            f"{repo_id} already holds a dataset that is not a cache of cells (it has no {MANIFEST}); choose another "
            "repository id"
        )
    return published


_CARD = """# {title}

Raw counts of single cells in Arrow files, written by scgpt_hf. Training reads any cells in any order directly from
these files.

{table}

## Columns

Each row is a cell.

| column | type | meaning |
| --- | --- | --- |
| `cell_id` | int64 | id of the cell in its source (`soma_joinid` of the Census) |
| `gene` | list of {gene} | expressed genes: row numbers of `genes.csv`, starting at 0, ascending |
| `count` | list of uint8 | raw counts of these genes; 255 means that the count is the next entry of `large_count` |
| `large_count` | list of uint32 | counts of 255 and more, in order |

Columns from the source's obs: {columns}.

## How to load

Stream the cells with `datasets`:

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

Or read them with scgpt_hf, which downloads the dataset once:

```python
import scgpt_hf
source = scgpt_hf.open_source("hf://datasets/{repo_id}")
block = source.read(source.obs().index.to_numpy()[:100])  # block.counts: (cells, genes), sparse
```

To pretrain on it, run `scgpt-hf pretrain --data hf://datasets/{repo_id}`. `manifest.json` holds
the sha256 of every file of cells. Downloads of up to 64 GiB are verified with it.
"""
