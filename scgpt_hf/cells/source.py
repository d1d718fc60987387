"""What a source of cells promises, and which source answers to which address.

Reading is done next door: `census.py` for SOMA, local or remote, `h5ad.py` for files and AnnData, `cache.py` for a
cache of either.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pandas as pd

from scgpt_hf.cells.block import CellBlock, Int64Array

if TYPE_CHECKING:
    from anndata import AnnData

Address: TypeAlias = "str | Path | Sequence[str | Path] | AnnData"


class CellSource(Protocol):
    """Cells with raw counts that can be read in any order; every member may be used from several threads."""

    @property
    def genes(self) -> pd.DataFrame:
        """The genes, row i for column i of the counts: `feature_id` (unique; Ensembl where known), `feature_name`."""

    @property
    def columns(self) -> list[str]:
        """The names of the obs columns that there are; known without reading any."""

    @property
    def chunk_size(self) -> int:
        """Cells of an aligned range of ids that are best read together; 1 where any order is as fast."""

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the cells that match the filter: index `cell_id`, int64, ascending, and the columns asked for."""

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Return these cells in this order; raise for an id that `obs` does not list or that is asked twice."""

    def describe(self) -> dict[str, Any]:
        """Return where the cells come from, as JSON: kind, address, filter, number of cells, hash of the genes."""


def open_source(
    address: Address, *, obs_filter: str | None = None, layer: str | None = None, primary_only: bool = True
) -> CellSource:
    """Return the source at an address.

    Args:
        address: `census://VERSION/ORGANISM`, e.g. `census://2025-11-08/homo_sapiens`; the folder of a SOMA in the
            Census layout, of one of its organisms, or of a cache; `hf://datasets/OWNER/NAME`, a cache on the Hub,
            downloaded once; one or many `.h5ad` files; or an AnnData, taken by reference.
        obs_filter: SOMA value filter, e.g. `tissue_general == 'blood' and disease == 'normal'`.
        layer: where the raw counts are: a layer by name; of a file also `.raw`. By default `raw` of the Census, `X`
            of a file.
        primary_only: keep only cells with `is_primary_data == True`; ignored where obs has no such column.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ConnectionError: the Census, or the Hub, cannot be reached.
        ValueError: the address is of no known kind, the Census version or organism is unknown, or the data or the
            filter are not usable; the message says what is there.
    """
    settings: dict[str, Any] = {"obs_filter": obs_filter, "layer": layer, "primary_only": primary_only}
    if isinstance(address, Sequence) and not isinstance(address, str) and len(address) == 1:
        address = address[0]
    if isinstance(address, str) and address.startswith("hf://"):
        from scgpt_hf.cells.cache.hub import download_cache

        address = download_cache(address)
    if isinstance(address, str) and "://" in address:
        from scgpt_hf.cells.soma.address import open_census

        return open_census(address, **settings)
    if not isinstance(address, str | Path | Sequence):
        from scgpt_hf.cells.h5ad.reader import H5adSource

        return H5adSource(address, **settings)
    paths = [Path(path) for path in ([address] if isinstance(address, str | Path) else address)]
    return _open_paths(paths, settings)


def _open_paths(paths: Sequence[Path], settings: dict[str, Any]) -> CellSource:
    """Return the source at one SOMA folder or at one or many h5ad files."""
    if not paths:
        raise ValueError("no file given; expected one or many .h5ad files, or the folder of a SOMA")
    if absent := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(
            f"{len(absent)} of {len(paths)} paths do not exist, e.g. {absent[0]!r}; patterns such as *.h5ad are "
            "expanded by the shell only, the Census itself is census://VERSION/ORGANISM, and a cache on the Hub "
            "hf://datasets/OWNER/NAME"
        )
    if all(path.suffix == ".h5ad" and path.is_file() for path in paths):
        from scgpt_hf.cells.h5ad.reader import H5adSource

        return H5adSource(paths, **settings)
    if len(paths) == 1 and paths[0].is_dir():
        from scgpt_hf.cells.cache.manifest import is_cache
        from scgpt_hf.cells.cache.reader import CacheSource
        from scgpt_hf.cells.soma.address import open_census

        if is_cache(paths[0]):
            return CacheSource(paths[0], **settings)
        return open_census(str(paths[0]), **settings)
    wrong = [str(path) for path in paths if path.is_dir() or path.suffix != ".h5ad"]
    raise ValueError(
        f"cannot tell what {wrong[0]!r} is; expected .h5ad files, or one folder with a SOMA in the Census layout "
        "(scripts/build_census.py makes one from .h5ad files) or a cache (scripts/cache_census.py)"
    )
