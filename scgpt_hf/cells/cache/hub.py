"""A cache that was published on the Hub, brought to this machine: `hf://datasets/OWNER/NAME`.

Publishing is `publishing/publish_cache.py`'s; reading what was brought is `cache.py`'s, hashes included.
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
    """Return the folder of a cache of the Hub; what an earlier download has brought is not brought again.

    It lies where the client of the Hub keeps its files, below HF_HOME. A token is that of `hf auth login`.

    Args:
        address: `hf://datasets/OWNER/NAME`, or `hf://datasets/OWNER/NAME@REVISION` for a branch, tag or commit.

    Raises:
        ConnectionError: the Hub cannot be reached, and the cache is not here.
        FileNotFoundError: there is no such dataset, or none that one may see.
        ValueError: the address is malformed, or the dataset is no cache.
    """
    if not (parts := _ADDRESS.fullmatch(address)):
        raise ValueError(f"expected the address of a cache like hf://datasets/my-lab/blood, found {address!r}")
    repo_id, revision = parts["repo_id"], parts["revision"]
    try:
        hf_hub_download(repo_id, MANIFEST, repo_type="dataset", revision=revision)  # before gigabytes of something else
        folder = Path(snapshot_download(repo_id, repo_type="dataset", revision=revision))
    except HFValidationError as error:
        raise ValueError(f"{address} is no address of the Hub: {error}") from error
    except LocalEntryNotFoundError as error:
        raise ConnectionError(
            f"cannot bring {address}: the Hub cannot be reached, and it is not here; check the network and "
            "HF_HUB_OFFLINE, or give the folder of a copy"
        ) from error
    except (RepositoryNotFoundError, RevisionNotFoundError) as error:
        raise FileNotFoundError(
            f"the Hub has no {address} that you may see; check owner, name and revision, and for a private one run "
            "`hf auth login`"
        ) from error
    except EntryNotFoundError as error:
        raise ValueError(
            f"{address} is no cache of cells, it has no {MANIFEST}; scripts/cache_census.py --push_to_hub makes one"
        ) from error
    logger.info("the cells of %s are in %s", address, folder)
    return folder
