"""Download a cache from the Hub: `hf://datasets/OWNER/NAME`.

`publishing/publish_cache.py` publishes a cache; `reader.py` reads the downloaded one and verifies its hashes.
"""

import logging
import re
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from scgpt_hf.cells.cache.manifest import MANIFEST

logger = logging.getLogger(__name__)

_ADDRESS = re.compile(r"hf://datasets/(?P<repo_id>[^/@]+/[^/@]+)(@(?P<revision>[^/]+))?/?")


def download_cache(address: str) -> Path:
    """Download a cache from the Hub and return its folder.

    Files that an earlier call has downloaded are not downloaded again. They are stored in the cache of
    `huggingface_hub`, below HF_HOME. Private datasets need a token; run `hf auth login`.

    Args:
        address: `hf://datasets/OWNER/NAME`, or `hf://datasets/OWNER/NAME@REVISION` for a branch, tag or commit.

    Raises:
        ConnectionError: the Hub cannot be reached, and the cache was not downloaded before.
        FileNotFoundError: the dataset does not exist, or you have no access to it.
        ValueError: the address is malformed, or the dataset is not a cache.
    """
    if not (parts := _ADDRESS.fullmatch(address)):
        raise ValueError(f"expected the address of a cache such as hf://datasets/my-lab/blood, found {address!r}")
    repo_id, revision = parts["repo_id"], parts["revision"]
    try:
        # First the manifest alone: if there is none, the gigabytes of this dataset are not those of a cache.
        hf_hub_download(repo_id, MANIFEST, repo_type="dataset", revision=revision)
        folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
    except HFValidationError as error:
        raise ValueError(f"{address} is not a valid address on the Hub: {error}") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"cannot download {address}: the Hub cannot be reached, and the cache was not downloaded before; check the "
            "network and HF_HUB_OFFLINE, or pass the folder of a local copy"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"{address} does not exist on the Hub, or you have no access to it; check owner, name and revision, and "
            "for a private dataset run `hf auth login`"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"{address} is not a cache of cells, because it has no {MANIFEST}; publish one with "
            "scgpt-hf cache --push_to_hub"
        ) from error
    logger.info("downloaded %s to %s", address, folder)
    return folder
