"""Open the SOMA of an address: a release of the Census, a folder, or one organism.

`census.py` reads its cells.
"""

from pathlib import Path
from typing import Any

import tiledbsoma as soma

from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.cells.soma.context import open_context
from scgpt_hf.cells.soma.remote import RetryPolicy, is_remote, require_no_credentials


def open_census(
    address: str,
    *,
    obs_filter: str | None = None,
    layer: str | None = None,
    primary_only: bool = True,
    native: bool = True,
) -> CensusSource:
    """Open the public Census, a SOMA in the Census layout, or one organism of either.

    Args:
        address: `census://VERSION/ORGANISM`, or the path or URI of a SOMA in the Census layout or of one of its
            organisms.
        obs_filter: SOMA value filter, e.g. `tissue_general == 'blood'`.
        layer: layer of X with the raw counts; "raw" by default.
        primary_only: whether to keep only cells with `is_primary_data == True`.
        native: whether to use the native reader where it supports the array; see `CensusSource`.

    Raises:
        ConnectionError: the Census, or another remote store, cannot be reached.
        ValueError: the version or the organism is unknown, the address is not a SOMA, or it contains a password.

    Example:
        >>> source = open_census("census://2025-11-08/homo_sapiens", obs_filter="tissue == 'blood'")  # doctest: +SKIP
    """
    require_no_credentials(address)
    release_date = None
    if address.startswith("census://"):
        version, _, organism = address.removeprefix("census://").strip("/").partition("/")
        release_date, address = _find_release(version)
        uri = _find_organism(address, organism or None)
    else:
        uri = _find_organism(address, None)
    return CensusSource(
        uri, obs_filter=obs_filter, layer=layer, primary_only=primary_only, census_version=release_date, native=native
    )


def _find_release(version: str) -> tuple[str, str]:
    """Return the date and the URI of a release of the Census; aliases such as `stable` are resolved."""
    import cellxgene_census
    from requests.exceptions import RequestException

    advice = (
        "check the network, or train on a local copy: aws s3 sync --no-sign-request "
        f"s3://cellxgene-census-public-us-west-2/cell-census/{version}/soma/ DIR, then pass DIR as the address"
    )
    try:
        releases = cellxgene_census.get_census_version_directory()
        if version not in releases:
            raise ValueError(f"unknown Census version {version!r}; available versions: {list(releases)}")
        date = str(releases[version]["release_build"])
        with cellxgene_census.open_soma(census_version=date) as census:
            return date, str(census.uri)
    except (RequestException, soma.SOMAError) as error:
        raise ConnectionError(f"cannot reach Census release {version!r} ({error}); {advice}") from error


def _find_organism(uri: str, organism: str | None) -> str:
    """Return the URI of an organism's experiment in a SOMA; without `organism`, of its only one."""
    try:
        found = RetryPolicy().read(uri, lambda: _list_organisms(uri))
    except OSError as error:
        if is_remote(uri) and not isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"cannot open {uri!r} as a SOMA in the Census layout: {_explain(uri, error)}") from error
    if organism is None and len(found) == 1:
        return next(iter(found.values()))
    if organism not in found:
        problem = "more than one organism" if organism is None else f"no organism {organism!r}"
        raise ValueError(f"{uri!r} has {problem}; pass the address of one of {found}")
    return found[organism]


def _explain(uri: str, error: OSError) -> str:
    """Return why a local folder is no SOMA: most often it is a folder of another kind, and not damaged."""
    folder = Path(uri.removeprefix("file://"))
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    # Every SOMA is a TileDB group, with one of these folders. Without them nothing is damaged: it never was a SOMA.
    if is_remote(uri) or {"__group", "__meta", "__tiledb_group.tdb", "__schema"} & set(names):
        return str(error)
    files = [name for name in names if name.lower().endswith((".h5ad", ".h5ad.gz", ".h5"))]
    advice = f"; to train on its files, pass their paths, e.g. {folder / files[0]}" if files else ""
    return f"it has none of the files of a SOMA, but {names[:5] or 'nothing'}{advice}"


def _list_organisms(uri: str) -> dict[str, str]:
    """Return the URI of each organism of a SOMA by its name, also if it is the SOMA of one organism."""
    root: Any = soma.open(uri, context=open_context(is_remote(uri), n_threads=1))
    with root:
        if isinstance(root, soma.Experiment):
            organism = str(root.uri).rstrip("/").rsplit("/", 1)[-1]
            return {organism: str(root.uri)}
        if "census_data" not in root:
            raise ValueError(f"{uri!r} is a SOMA but not in the Census layout: no 'census_data' among {sorted(root)}")
        return {name: str(root["census_data"][name].uri) for name in root["census_data"]}
