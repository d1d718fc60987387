"""`CellSource`, the interface of all sources of cells, and `open_source`, which opens the source of an address.

The sources are in the packages `soma` (the Census and local SOMAs), `files` (files and AnnData) and `cache` (caches of
either). They are imported when they are needed, because importing tiledbsoma and anndata is slow.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

import pandas as pd

from scgpt_hf.cells.block import CellBlock, Int64Array
from scgpt_hf.cells.files.formats import SUPPORTED, find_format
from scgpt_hf.cells.presence import Presence

if TYPE_CHECKING:
    from anndata import AnnData

Address: TypeAlias = "str | Path | Sequence[str | Path] | AnnData"


class CellSource(Protocol):
    """Cells with raw counts that can be read in any order.

    Several threads may use a source at the same time. A source can be pickled; the copy opens its files itself.
    `tests/support/source_contract.py` tests every source against this interface.
    """

    @property
    def genes(self) -> pd.DataFrame:
        """The genes of the columns of the counts, in their order.

        Columns: `feature_id`, unique, the Ensembl id if known; `feature_name`. Shape (genes, 2).
        """

    @property
    def obs_columns(self) -> list[str]:
        """The names of the obs columns; no column is read for them."""

    @property
    def chunk_size(self) -> int:
        """Number of neighboring cell ids, aligned to its multiples, to read together; 1 if any order is as fast."""

    @property
    def cells_at_once(self) -> int:
        """Number of cells that the threads of the source read at the same time; 0 if reading needs no threads.

        It may grow while a remote store is read. A stream reads at least as many cells ahead.
        """

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return obs of the cells that match the filters.

        Args:
            columns: obs columns to return.

        Returns:
            The columns; index `cell_id`, int64, ascending. Shape (cells, columns).

        Raises:
            ValueError: a column does not exist, the filter cannot be applied, or no cell matches it.
        """

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Read cells by their ids.

        Args:
            cell_ids: ids from the index of `obs()`, each once, in any order. Shape (cells,).
            columns: obs columns to return with the counts.

        Returns:
            The cells in the order of `cell_ids`.

        Raises:
            OSError: the data cannot be read.
            ValueError: an id is unknown or repeated, a column does not exist, or the counts are not raw.
        """

    def presence(self, cell_ids: Int64Array) -> Presence | None:
        """Return the genes that the data set of each cell measured, or None if the source does not know them.

        Args:
            cell_ids: ids from the index of `obs()`, ascending. Shape (cells,).

        Raises:
            OSError: the data cannot be read.
            ValueError: the stored presence does not fit the cells or genes.
        """

    def describe(self) -> dict[str, Any]:
        """Return the origin of the cells as JSON: kind, address, filter, number of cells, hash of the genes."""


def open_source(
    address: Address,
    *,
    obs_filter: str | None = None,
    layer: str | None = None,
    primary_only: bool = True,
    round_counts: bool = False,
) -> CellSource:
    """Open the source of cells at an address.

    Args:
        address: one of

            - `census://VERSION/ORGANISM`: a release of the public Census;
            - a folder: a SOMA in the Census layout, one organism of it, or a cache;
            - `hf://datasets/OWNER/NAME`: a cache on the Hub, which is downloaded once;
            - `s3://BUCKET/FOLDER`: a SOMA, which is streamed, or a cache, which is downloaded once to each machine;
            - one or several files: `.h5ad` (also `.gz`), `.zarr`, `.h5` of 10x, folders of 10x with `matrix.mtx`,
              `.loom`, tables of counts as `.csv` or `.tsv`;
            - an AnnData, which is not copied.
        obs_filter: SOMA value filter, e.g. `tissue_general == 'blood' and disease == 'normal'`.
        layer: layer with the raw counts; `.raw` for that of an AnnData. By default "raw" of a Census. Of a file or an
            AnnData it is `X`, or, if `X` does not hold raw counts, the only one of `.raw`, "counts", "raw_counts" and
            the like that does.
        primary_only: whether to keep only cells with `is_primary_data == True`; ignored if obs has no such column.
        round_counts: round fractional counts of files and AnnData, instead of raising. The counts of a Census and of a
            cache are integers.

    Raises:
        FileNotFoundError: the path does not exist.
        ConnectionError: the Census or the Hub cannot be reached.
        ValueError: the kind of the address, the version or the organism is unknown, the data have no raw counts, or the
            filter is not valid.

    Example:
        >>> source = open_source("my_census", obs_filter="tissue_general == 'blood'")  # doctest: +SKIP
        >>> cell_ids = source.obs().index.to_numpy()  # doctest: +SKIP
        >>> block = source.read(cell_ids[:100], ["cell_type"])  # doctest: +SKIP
    """
    settings: dict[str, Any] = {"obs_filter": obs_filter, "layer": layer, "primary_only": primary_only}
    if isinstance(address, Sequence) and not isinstance(address, str) and len(address) == 1:
        address = address[0]
    if isinstance(address, str) and address.startswith("hf://"):
        from scgpt_hf.cells.cache.hub import download_cache

        address = download_cache(address)
    if isinstance(address, str) and "://" in address:
        from scgpt_hf.cells.cache.store import download_from_store
        from scgpt_hf.cells.soma.address import open_census

        cache = None if address.startswith(("census://", "file://")) else download_from_store(address)
        if cache is None:
            return open_census(address, **settings)
        address = cache
    if not isinstance(address, str | Path | Sequence):
        from scgpt_hf.cells.files.reader import AnnDataSource

        return AnnDataSource(address, **settings, round_counts=round_counts)
    paths = [Path(path) for path in ([address] if isinstance(address, str | Path) else address)]
    return _open_paths(paths, settings, round_counts)


def _open_paths(paths: Sequence[Path], settings: dict[str, Any], round_counts: bool) -> CellSource:
    """Return the source of one folder or of one or several files."""
    if not paths:
        raise ValueError("no address given; expected one or several files, or the folder of a SOMA or of a cache")
    if absent := [str(path) for path in paths if not path.exists()]:
        raise FileNotFoundError(
            f"{len(absent)} of {len(paths)} paths do not exist, e.g. {absent[0]!r}; only a shell expands patterns such "
            "as *.h5ad. The public Census is census://VERSION/ORGANISM, a cache on the Hub hf://datasets/OWNER/NAME"
        )
    wrong = [str(path) for path in paths if find_format(path) is None]
    if not wrong:
        from scgpt_hf.cells.files.reader import AnnDataSource

        return AnnDataSource(paths, **settings, round_counts=round_counts)
    if len(paths) == 1 and paths[0].is_dir():
        from scgpt_hf.cells.cache.manifest import is_cache
        from scgpt_hf.cells.cache.reader import CacheSource

        if is_cache(paths[0]):
            return CacheSource(paths[0], **settings)
        from scgpt_hf.cells.soma.address import open_census

        return open_census(str(paths[0]), **settings)
    raise ValueError(
        f"cannot open {wrong[0]!r}; expected files ({SUPPORTED}), or one folder with a SOMA in the Census layout "
        "(scgpt-hf build-census builds one from files) or with a cache (scgpt-hf cache)"
    )
