"""Cells of a SOMA in the Census layout, local or remote, read fast in any order.

The Census stores X in tiles of 2,048 cells, so the natural unit of reading is an aligned band of 2,048 rows. A few
Python threads, each with its own TileDB context, read one band each; numba turns it into rows and copies them to where
they were asked for. Which bands are worth reading together is decided by `plan.py`.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias, TypeVar, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import CellBlock, Int64Array, gene_hash, require_cell_ids, require_counts
from scgpt_hf.cells.obs import full_filter, require_columns, select_obs

logger = logging.getLogger(__name__)

BAND = 2048  # cells of a tile. Source: chanzuckerberg/cellxgene-census, cellxgene_census_builder/build_soma/globals.py
DENSE = (
    1 / 64
)  # wanted cells per cell of the range they span, from which on reading the whole range is faster (measured)
BUFFER_BYTES = 8 * 2**20  # of each column of a query; larger ones were slower
ATTEMPTS = 5  # reads of a remote array before its error is passed on

Float32Array: TypeAlias = NDArray[np.float32]
Int32Array: TypeAlias = NDArray[np.int32]
Result = TypeVar("Result")


class _Band(NamedTuple):
    """Some cells of one band, by ascending id: cell i holds entries `indptr[i]:indptr[i + 1]`."""

    indptr: Int64Array
    genes: Int32Array
    counts: Float32Array


class CensusSource:
    """The cells of one organism of a SOMA in the Census layout; see `CellSource` for what its members promise.

    Nothing is kept open before it is needed. `close` ends the threads and closes the arrays; the next read opens them.
    """

    def __init__(
        self,
        uri: str,
        *,
        obs_filter: str | None = None,
        layer: str | None = None,
        primary_only: bool = True,
        census_version: str | None = None,
        n_threads: int = 4,
    ) -> None:
        """Check the settings against the data.

        Args:
            uri: the SOMA experiment of one organism; `open_census` finds it.
            obs_filter: SOMA value filter.
            layer: layer of X with the raw counts; by default "raw".
            primary_only: keep only cells with `is_primary_data == True`.
            census_version: release, for the record.
            n_threads: bands read at once.

        Raises:
            ValueError: no measurement "RNA" or no such layer; or the filter is not one expression.
        """
        self._settings: dict[str, Any] = {
            "uri": uri,
            "obs_filter": obs_filter,
            "layer": layer,
            "primary_only": primary_only,
            "census_version": census_version,
            "n_threads": n_threads,
        }
        self._uri, self._layer, self._n_threads = uri, layer or "raw", n_threads
        self._remote = "://" in uri and not uri.startswith("file://")
        self._lock, self._local = threading.Lock(), threading.local()
        self._arrays: list[soma.SparseNDArray] = []
        self._pool: ThreadPoolExecutor | None = None
        self._checked = False
        with self._experiment() as experiment:
            self._x_uri = _find_layer(experiment, self._layer)
            self._obs_columns = [name for name in experiment.obs.schema.names if name != "soma_joinid"]
        self._filter = full_filter(obs_filter, self._obs_columns, primary_only=primary_only)

    def __getstate__(self) -> dict[str, Any]:
        return self._settings

    def __setstate__(self, settings: dict[str, Any]) -> None:
        self.__init__(**settings)  # type: ignore[misc]

    def __enter__(self) -> "CensusSource":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the threads and close the arrays they opened."""
        with self._lock:
            pool, self._pool = self._pool, None
        if pool is not None:
            pool.shutdown()
        with self._lock:
            arrays, self._arrays, self._local = self._arrays, [], threading.local()
        for array in arrays:
            array.close()

    @cached_property
    def genes(self) -> pd.DataFrame:
        """The genes of `ms/RNA/var` by joinid: columns `feature_id` and `feature_name`."""

        def read() -> pd.DataFrame:
            with self._experiment() as experiment:
                rows = experiment.ms["RNA"].var.read(column_names=["soma_joinid", "feature_id", "feature_name"])
                return cast(pd.DataFrame, rows.concat().to_pandas())

        genes = self._retried(read).sort_values("soma_joinid", ignore_index=True)
        return genes.drop(columns="soma_joinid").astype(str)

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the cells that match the filter; see `CellSource.obs`."""

        def read() -> pd.DataFrame:
            with self._experiment() as experiment:
                return select_obs(experiment.obs, self._filter, columns)

        return self._retried(read)

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Return these cells in this order; see `CellSource.read`."""
        cell_ids = require_cell_ids(cell_ids, self._offered)
        require_columns(columns, self._obs_columns)
        order = np.argsort(cell_ids)
        ascending = cell_ids[order]
        edges = np.flatnonzero(np.diff(ascending // BAND)) + 1
        pool = self._threads()
        bands = list(pool.map(self._read_band, np.split(ascending, edges))) if len(order) else []
        counts = _gather_rows(bands, np.split(order, edges), len(self.genes), pool)
        if not self._checked and len(cell_ids):
            require_counts(counts, f"layer {self._layer!r} of {self._uri}")
            self._checked = True
        return CellBlock(counts, self._read_obs(cell_ids, columns), cell_ids)

    def describe(self) -> dict[str, Any]:
        """Return where the cells come from; see `CellSource.describe`."""
        return {
            "kind": "census",
            "uri": self._uri,
            "census_version": self._settings["census_version"],
            "organism": self._uri.rstrip("/").rsplit("/", 1)[-1],
            "layer": self._layer,
            "obs_filter": self._filter,
            "n_cells": int(self._offered.sum()),
            "n_genes": len(self.genes),
            "gene_hash": gene_hash(self.genes["feature_id"]),
        }

    @cached_property
    def _offered(self) -> NDArray[np.bool_]:
        """True at the id of each cell that matches the filter; one byte per cell of the Census."""
        ids = self.obs().index.to_numpy()
        offered = np.zeros(int(ids[-1]) + 1, dtype=np.bool_)
        offered[ids] = True
        return offered

    def _read_obs(self, cell_ids: Int64Array, columns: Sequence[str]) -> pd.DataFrame:
        if not columns or not len(cell_ids):
            return pd.DataFrame({name: [] for name in columns}, index=pd.Index(cell_ids, name="cell_id"))

        def read() -> pd.DataFrame:
            with self._experiment() as experiment:
                names = ["soma_joinid", *columns]
                rows = experiment.obs.read((pa.array(np.sort(cell_ids)),), column_names=names)
                return cast(pd.DataFrame, rows.concat().to_pandas())

        return self._retried(read).set_index("soma_joinid").rename_axis("cell_id").loc[cell_ids]

    def _experiment(self) -> soma.Experiment:
        return soma.Experiment.open(self._uri, context=_context(self._remote, n_threads=self._n_threads))

    def _threads(self) -> ThreadPoolExecutor:
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(self._n_threads, thread_name_prefix="census-band")
            return self._pool

    def _array(self) -> soma.SparseNDArray:
        """Return this thread's own handle on X, with its own context."""
        if not hasattr(self._local, "array"):
            self._local.array = soma.SparseNDArray.open(self._x_uri, context=_context(self._remote, n_threads=1))
            with self._lock:
                self._arrays.append(self._local.array)
        return cast(soma.SparseNDArray, self._local.array)

    def _read_band(self, cell_ids: Int64Array) -> _Band:
        return self._retried(lambda: _read_rows(self._array(), cell_ids))

    def _retried(self, read: Callable[[], Result]) -> Result:
        """Return what `read` returns; on a remote store, try again after 1, 2, 4 and 8 s when it fails."""
        for attempt in range(ATTEMPTS - 1 if self._remote else 0):
            try:
                return read()
            except soma.SOMAError as error:
                logger.warning("reading %s failed (%s); trying again in %d s", self._uri, error, 2**attempt)
                time.sleep(2**attempt)
        return read()


def open_census(
    address: str, *, obs_filter: str | None = None, layer: str | None = None, primary_only: bool = True
) -> CensusSource:
    """Return the source of `census://VERSION/ORGANISM`, of a SOMA in the Census layout, or of one of its organisms.

    Raises:
        ConnectionError: the Census cannot be reached.
        ValueError: the version or the organism is unknown, or the address is not a SOMA.
    """
    version = None
    if address.startswith("census://"):
        version, _, organism = address.removeprefix("census://").strip("/").partition("/")
        version, address = _find_release(version)
        uri = _find_organism(address, organism or None)
    else:
        uri = _find_organism(address, None)
    return CensusSource(uri, obs_filter=obs_filter, layer=layer, primary_only=primary_only, census_version=version)


def _find_release(version: str) -> tuple[str, str]:
    """Return the date and the URI of a release of the Census, following aliases such as `stable`."""
    import cellxgene_census
    from requests.exceptions import RequestException

    advice = (
        "check the network, or train on a local copy: aws s3 sync --no-sign-request "
        f"s3://cellxgene-census-public-us-west-2/cell-census/{version}/soma/ DIR, then give DIR instead"
    )
    try:
        releases = cellxgene_census.get_census_version_directory()
        if version not in releases:
            raise ValueError(f"unknown Census version {version!r}; available are {list(releases)}")
        date = str(releases[version]["release_build"])
        with cellxgene_census.open_soma(census_version=date) as census:
            return date, str(census.uri)
    except (RequestException, soma.SOMAError) as error:
        raise ConnectionError(f"cannot reach the Census release {version!r} ({error}); {advice}") from error


def _find_organism(uri: str, organism: str | None) -> str:
    """Return the URI of an organism's experiment below a SOMA's root; by default, of its only organism."""
    remote = "://" in uri and not uri.startswith("file://")
    try:
        root: Any = soma.open(uri, context=_context(remote, n_threads=1))
    except soma.SOMAError as error:
        raise ValueError(f"cannot open {uri!r} as a SOMA in the Census layout: {error}") from error
    with root:
        if isinstance(root, soma.Experiment):
            return str(root.uri)
        if "census_data" not in root:
            raise ValueError(f"{uri!r} is a SOMA but not in the Census layout: no 'census_data' among {sorted(root)}")
        found = {name: str(root["census_data"][name].uri) for name in root["census_data"]}
    if organism is None and len(found) == 1:
        return next(iter(found.values()))
    if organism not in found:
        wanted = "more than one organism" if organism is None else f"no organism {organism!r}"
        raise ValueError(f"{uri!r} holds {wanted}: {found}; give the address of one of them")
    return found[organism]


def _find_layer(experiment: soma.Experiment, layer: str) -> str:
    """Return the URI of a layer of the measurement RNA, or raise a ValueError that lists what there is."""
    measurements: Any = experiment.ms
    if "RNA" not in measurements:
        raise ValueError(f"{experiment.uri} has no measurement 'RNA'; it has {sorted(measurements)}")
    layers: Any = measurements["RNA"].X
    if layer not in layers:
        raise ValueError(f"{experiment.uri} has no layer {layer!r} of X; it has {sorted(layers)}")
    return str(layers[layer].uri)


def _context(remote: bool, *, n_threads: int) -> soma.SOMATileDBContext:
    """Return a fresh context with few threads and small buffers; a remote store is asked for 16 ranges at once."""
    config: dict[str, str | float] = {
        "soma.init_buffer_bytes": BUFFER_BYTES,
        "sm.compute_concurrency_level": n_threads,
        "sm.io_concurrency_level": 16 if remote else n_threads,
    }
    if not remote:
        return soma.SOMATileDBContext(tiledb_config=config)
    from cellxgene_census import get_default_soma_context

    return get_default_soma_context(tiledb_config=config)


def _read_rows(array: soma.SparseNDArray, cell_ids: Int64Array) -> _Band:
    """Return cells of one band, given by ascending id."""
    first, last = int(cell_ids[0]), int(cell_ids[-1])
    whole = len(cell_ids) >= DENSE * (last - first + 1)
    tables = list(array.read((slice(first, last) if whole else pa.array(cell_ids),)).tables())
    row_of_id = np.full(last - first + 1, -1, dtype=np.int32)
    row_of_id[cell_ids - first] = np.arange(len(cell_ids), dtype=np.int32)
    entries = [[column.to_numpy() for column in batch.columns] for table in tables for batch in table.to_batches()]
    indptr = np.zeros(len(cell_ids) + 1, dtype=np.int64)
    for ids, _, counts in entries:
        _count_entries(ids, counts, first, row_of_id, indptr[1:])
    np.cumsum(indptr, out=indptr)
    genes, values, cursor = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32), indptr[:-1].copy()
    for ids, columns, counts in entries:
        _scatter_entries(ids, columns, counts, first, row_of_id, cursor, genes, values)
    return _Band(indptr, genes, values)


def _gather_rows(
    bands: Sequence[_Band], places: Sequence[Int64Array], n_genes: int, pool: ThreadPoolExecutor
) -> csr_matrix:
    """Return the cells of all bands as one matrix; cell i of band b becomes row `places[b][i]`."""
    indptr = np.zeros(sum(map(len, places)) + 1, dtype=np.int64)
    for band, rows in zip(bands, places, strict=False):
        indptr[rows + 1] = np.diff(band.indptr)
    np.cumsum(indptr, out=indptr)
    genes, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    copies = [
        pool.submit(_copy_rows, *band, rows, indptr, genes, values) for band, rows in zip(bands, places, strict=False)
    ]
    for copy in copies:
        copy.result()
    if indptr[-1] <= np.iinfo(np.int32).max:  # scipy wants both index arrays of one type
        indptr = indptr.astype(np.int32)
    counts = csr_matrix((values, genes, indptr), shape=(len(indptr) - 1, n_genes), copy=False)
    counts.sort_indices()  # looks first, and sorts only if the fragments came out of order
    return counts


@njit(nogil=True, cache=True)
def _count_entries(ids, counts, first, row_of_id, lengths):  # type: ignore[no-untyped-def]
    """Add to each wanted cell's length the number of its entries."""
    for entry in range(len(ids)):
        row = row_of_id[ids[entry] - first]
        if row >= 0 and counts[entry] != 0:
            lengths[row] += 1


@njit(nogil=True, cache=True)
def _scatter_entries(ids, columns, counts, first, row_of_id, cursor, genes, values):  # type: ignore[no-untyped-def]
    """Write each wanted entry behind the last one of its cell; the order within a cell is kept."""
    for entry in range(len(ids)):
        row = row_of_id[ids[entry] - first]
        if row >= 0 and counts[entry] != 0:
            place = cursor[row]
            genes[place], values[place] = columns[entry], counts[entry]
            cursor[row] = place + 1


@njit(nogil=True, cache=True)
def _copy_rows(from_indptr, from_genes, from_values, rows, indptr, genes, values):  # type: ignore[no-untyped-def]
    """Copy each cell of a band to its row of the result."""
    for cell in range(len(rows)):
        start, stop, place = from_indptr[cell], from_indptr[cell + 1], indptr[rows[cell]]
        for entry in range(start, stop):
            genes[place + entry - start] = from_genes[entry]
            values[place + entry - start] = from_values[entry]
