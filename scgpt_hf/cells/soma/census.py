"""`CensusSource`: cells of a SOMA in the Census layout, local or remote, read in any order.

A Census stores X in tiles of 2,048 cells, so the cheapest unit to read is a chunk: an aligned range of 2,048 cells.
Reading a shuffle window takes these steps:

1. `read` receives cell ids in any order, sorts them and splits them by chunk.
2. A few threads read one chunk each (`_read_chunk_with_retries`): of a local Census by the native reader (package
   `native`), else through TileDB, with a separate context and handles for each thread. `remote.py` retries reads of a
   remote Census.
3. `chunks.py` packs the entries of a chunk into words of 4 bytes.
4. `totals.py` compares the counts of each cell with the totals in obs, if obs has them.
5. `read` checks that the counts are raw and adds the requested obs columns.
6. It returns a `ChunkedBlock`. Its counts stay packed until the pipeline takes a few hundred cells at a time.

`address.py` finds the SOMA of an address; `schedule/epoch.py` decides which chunks are read together.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from scgpt_hf.cells.block import (
    CHUNK_SIZE,
    CellBlock,
    Int64Array,
    gene_hash,
    name_layers,
    require_cell_ids,
    require_counts,
)
from scgpt_hf.cells.missing import number_texts
from scgpt_hf.cells.obs import add_primary_filter, read_matching_obs, require_columns, take_cells
from scgpt_hf.cells.presence import Presence
from scgpt_hf.cells.soma.chunks import Chunk, ChunkedBlock, read_chunk
from scgpt_hf.cells.soma.context import open_context
from scgpt_hf.cells.soma.native import NativeArray, open_native
from scgpt_hf.cells.soma.presence import read_presence
from scgpt_hf.cells.soma.remote import RetryPolicy, is_remote, threads_to_read
from scgpt_hf.cells.soma.totals import ObsTotals, has_totals
from scgpt_hf.cells.threads import DaemonThreadPool, n_cores

logger = logging.getLogger(__name__)


class CensusSource:
    """The cells of one organism of a SOMA in the Census layout; see `CellSource` for the interface.

    Threads start and arrays open at the first read. `close` ends the threads and closes the arrays; the next read opens
    them again. Every method may raise an OSError if the SOMA cannot be read, of a remote one after several attempts.

    Example:
        >>> with CensusSource("census_folder/census_data/homo_sapiens") as source:  # doctest: +SKIP
        ...     cell_ids = source.obs().index.to_numpy()
        ...     block = source.read(cell_ids[:100], ["cell_type"])
    """

    chunk_size = CHUNK_SIZE

    def __init__(
        self,
        uri: str,
        *,
        obs_filter: str | None = None,
        layer: str | None = None,
        primary_only: bool = True,
        census_version: str | None = None,
        n_threads: int = 4,
        native: bool = True,
    ) -> None:
        """Check that the SOMA has the arrays of a Census and the requested layer.

        Args:
            uri: the SOMA experiment of one organism; `open_census` finds it from an address.
            obs_filter: SOMA value filter, e.g. `tissue_general == 'blood'`.
            layer: layer of X with the raw counts; "raw" by default.
            primary_only: whether to keep only cells with `is_primary_data == True`.
            census_version: release of the Census, for `describe`.
            n_threads: number of chunks read at the same time; of a local Census at most one more than there are cores.
                Of a remote Census, more are read as soon as threads wait for the network; see `threads_to_read`.
            native: whether to use the native reader where it supports the array; see `open_native`. False, or
                `SCGPT_HF_NATIVE_READER=0` in the environment, has TileDB read everything.

        Raises:
            OSError: the SOMA cannot be read.
            ValueError: obs, var, the measurement "RNA" or the layer is missing; or the filter is not one expression.
        """
        self._settings: dict[str, Any] = {
            "uri": uri,
            "obs_filter": obs_filter,
            "layer": layer,
            "primary_only": primary_only,
            "census_version": census_version,
            "n_threads": n_threads,
            "native": native,
        }
        self._uri, self._layer, self._n_threads = uri, layer or "raw", n_threads
        self._remote, self._retry_policy = is_remote(uri), RetryPolicy()
        self._lock, self._local = threading.Lock(), threading.local()
        self._handles: list[soma.SparseNDArray | soma.DataFrame] = []
        self._pool: DaemonThreadPool | None = None
        self._selected: NDArray[np.bool_] | None = None
        self._warned_of_repeats = False
        self._uris, self.obs_columns, self._n_rows, self._has_totals = self._retry_policy.read(uri, self._inspect)
        self._filter = add_primary_filter(obs_filter, self.obs_columns, primary_only=primary_only)

    def _inspect(self) -> tuple[dict[str, str], list[str], int, bool]:
        """Return the URIs of X, obs and var, the obs columns, the number of rows of X, and if obs has its totals."""
        with self._experiment() as experiment:
            uris = _find_arrays(experiment, self._layer)
            layer: Any = experiment.ms["RNA"].X[self._layer]
            columns = [str(name) for name in experiment.obs.schema.names if name != "soma_joinid"]
            return uris, columns, layer.shape[0], has_totals(experiment.obs.schema, self._layer)

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
            handles, self._handles, self._local = self._handles, [], threading.local()
            for name in ("_native_array", "_totals"):  # the files may change while the source is closed
                self.__dict__.pop(name, None)
        for handle in handles:
            handle.close()

    @property
    def cells_at_once(self) -> int:
        """Number of cells that are read at the same time: a chunk by each thread."""
        return len(self._threads()) * CHUNK_SIZE

    @cached_property
    def genes(self) -> pd.DataFrame:
        """The genes of `ms/RNA/var` in the order of their joinids: columns `feature_id` and `feature_name`."""

        def read() -> pd.DataFrame:
            with soma.DataFrame.open(self._uris["var"], context=self._context(self._n_threads)) as frame:
                rows = frame.read(column_names=["soma_joinid", "feature_id", "feature_name"])
                return cast(pd.DataFrame, rows.concat().to_pandas())

        genes = self._retry_policy.read(self._uris["var"], read).sort_values("soma_joinid", ignore_index=True)
        if not len(genes) or (genes["soma_joinid"] != genes.index).any():
            raise ValueError(
                f"{self._uris['var']} has {len(genes):,} genes; expected at least one, with joinids 0, 1, 2, … without "
                "gaps; is the copy complete?"
            )
        return genes.drop(columns="soma_joinid").astype(str)

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the cells that match the filters; see `CellSource.obs`."""

        def read() -> pd.DataFrame:
            with soma.DataFrame.open(self._uris["obs"], context=self._context(self._n_threads)) as frame:
                return read_matching_obs(frame, self._filter, columns)

        obs = self._retry_policy.read(self._uris["obs"], read)
        if self._selected is None:  # computed once, because scanning 100 million ids is slow
            self._selected = self._mark_cells(obs.index.to_numpy())
        return obs

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Return these cells in this order; see `CellSource.read`."""
        cell_ids = require_cell_ids(cell_ids, self._selected_cells())
        require_columns(columns, self.obs_columns)
        order = np.argsort(cell_ids)
        ascending = cell_ids[order]
        edges = np.flatnonzero(np.diff(ascending // CHUNK_SIZE)) + 1  # where the next chunk begins
        chunks = self._read_chunks(np.split(ascending, edges)) if len(order) else []
        positions = np.split(order, edges) if chunks else []
        obs = self._read_obs(cell_ids, columns)
        block = ChunkedBlock(chunks, positions, obs, cell_ids, n_genes=len(self.genes))
        if not all(chunk.has_raw_counts for chunk in chunks):
            self._raise_not_raw(block, ascending)
        n_repeated = sum(chunk.n_repeated for chunk in chunks)
        if n_repeated and not self._warned_of_repeats:
            self._warned_of_repeats = True
            logger.warning(
                "%s has repeated entries, %d in the %d cells read now: counts of the same cell and gene are added up, "
                "as by SciPy and tiledbsoma; this is logged once",
                *(self._uris["X"], n_repeated, len(cell_ids)),
            )
        return block

    def presence(self, cell_ids: Int64Array) -> Presence | None:
        """Return the genes that the data set of each cell measured, from the presence matrix of the Census.

        See `CellSource.presence`. It is None if the SOMA has no such matrix, or obs no column `dataset_id`.
        """
        if "dataset_id" not in self.obs_columns:
            return None
        n_genes, context = len(self.genes), self._context(self._n_threads)
        measured = self._retry_policy.read(self._uri, lambda: read_presence(self._uri, n_genes, context))
        if measured is None:
            return None
        dataset_of_cell, names = number_texts(take_cells(self.obs(["dataset_id"])["dataset_id"], cell_ids))
        if unknown := sorted(set(names) - set(measured.index)):
            logger.warning("%s has no row in the table of data sets for %s", self._uri, unknown[:5])
        return Presence(dataset_of_cell.astype(np.int64), measured.reindex(names, fill_value=False).to_numpy())

    def describe(self) -> dict[str, Any]:
        """Return the origin of the cells; see `CellSource.describe`."""
        return {
            "kind": "census",
            "uri": self._uri,
            "census_version": self._settings["census_version"],
            "organism": self._uri.rstrip("/").rsplit("/", 1)[-1],
            "layer": self._layer,
            "obs_filter": self._filter,
            "n_cells": int(self._selected_cells().sum()),
            "n_genes": len(self.genes),
            "gene_hash": gene_hash(self.genes["feature_id"]),
        }

    @cached_property
    def _native_array(self) -> NativeArray | None:
        """X for the native reader; None if TileDB reads it."""
        if self._remote:
            return None

        def open_x() -> NativeArray | None:
            with soma.SparseNDArray.open(self._uris["X"], context=self._context(1)) as array:
                return open_native(array, enabled=self._settings["native"])

        return self._retry_policy.read(self._uris["X"], open_x)

    @cached_property
    def _totals(self) -> ObsTotals:
        """The totals in obs of the cells up to the last selected one."""
        return ObsTotals(self._read_rows, len(self._selected_cells()))

    def _selected_cells(self) -> NDArray[np.bool_]:
        """Return a mask by cell id of the cells that match the filters; one byte for each id up to the largest."""
        if self._selected is None:
            self.obs()  # sets it
        return cast(NDArray[np.bool_], self._selected)

    def _mark_cells(self, ids: Int64Array) -> NDArray[np.bool_]:
        """Return the mask of these ascending ids; see `_selected_cells`."""
        if ids[-1] >= self._n_rows:
            raise ValueError(
                f"{self._uri}: obs has cell {ids[-1]:,}, but layer {self._layer!r} of X has only {self._n_rows:,} "
                "rows; is the copy complete?"
            )
        selected = np.zeros(int(ids[-1]) + 1, dtype=np.bool_)
        selected[ids] = True
        return selected

    def _read_obs(self, cell_ids: Int64Array, columns: Sequence[str]) -> pd.DataFrame:
        """Return these obs columns of these cells, in the order given."""
        if not columns or not len(cell_ids):
            return pd.DataFrame({name: [] for name in columns}, index=pd.Index(cell_ids, name="cell_id"))

        first, last = int(cell_ids.min()), int(cell_ids.max())
        gapless = last - first + 1 == len(cell_ids)  # a range is faster for TileDB than a list of ids
        return self._read_rows(slice(first, last) if gapless else pa.array(np.sort(cell_ids)), columns).loc[cell_ids]

    def _read_rows(self, coordinates: slice | pa.Array, columns: Sequence[str]) -> pd.DataFrame:
        """Return these obs columns of a range or a list of cells, indexed by cell id."""

        def read() -> pd.DataFrame:
            rows = self._handle("obs").read((coordinates,), column_names=["soma_joinid", *columns])
            return cast(pd.DataFrame, rows.concat().to_pandas())

        obs = self._retry_policy.read(self._uris["obs"], read)
        return obs.set_index("soma_joinid").rename_axis("cell_id")

    def _raise_not_raw(self, block: CellBlock, cell_ids: Int64Array) -> None:
        """Raise the ValueError of counts that are not raw, with the other layers and which of them look raw."""
        try:
            require_counts(block.data, f"layer {self._layer!r} of {self._uri}")
        except ValueError as error:
            others = self._retry_policy.read(self._uri, lambda: self._other_layers(cell_ids))
            raise name_layers(error, others) from error

    def _other_layers(self, cell_ids: Int64Array) -> dict[str, bool]:
        """Return the name of each other layer of X, and whether the first chunk of these ids looks raw there."""
        cell_ids = cell_ids[cell_ids // CHUNK_SIZE == cell_ids[0] // CHUNK_SIZE]
        with self._experiment() as experiment:
            measurement: Any = experiment.ms["RNA"]
            others = {name: layer for name, layer in measurement.X.items() if name != self._layer}
            return {
                name: isinstance(layer, soma.SparseNDArray) and _looks_raw(layer, cell_ids)
                for name, layer in others.items()
            }

    def _experiment(self) -> soma.Experiment:
        return soma.Experiment.open(self._uri, context=self._context(self._n_threads))

    def _context(self, n_threads: int) -> soma.SOMATileDBContext:
        return open_context(self._remote, n_threads=n_threads)

    def _threads(self) -> DaemonThreadPool:
        with self._lock:
            if self._pool is None:
                # Decoding keeps a core busy, and more threads than cores read less (measured). One more than there are
                # cores makes up for threads that wait for the disk; a remote store is waited for most of the time.
                n_threads = self._n_threads if self._remote else min(self._n_threads, n_cores() + 1)
                self._pool = DaemonThreadPool(n_threads, "census-chunk")
            return self._pool

    def _handle(self, name: str) -> Any:
        """Return this thread's handle of X or obs.

        Each thread has a separate context, which is faster than one for all threads (measured).
        """
        if not hasattr(self._local, name):
            kind: Any = soma.SparseNDArray if name == "X" else soma.DataFrame
            handle = kind.open(self._uris[name], context=self._context(1))
            setattr(self._local, name, handle)
            with self._lock:
                self._handles.append(handle)
        return getattr(self._local, name)

    def _read_chunks(self, cell_ids: Sequence[Int64Array]) -> list[Chunk]:
        """Read ascending cells of several chunks, in several threads."""
        threads = self._threads()
        if self._has_totals:
            list(threads.map(self._totals.load, self._totals.missing_blocks(np.concatenate(cell_ids))))
        # Genes and the native array are opened here: the threads would each open them, or wait for each other.
        read = partial(self._read_chunk_with_retries, self._native_array, len(self.genes))
        if not self._remote:
            return list(threads.map(read, cell_ids))
        # The slower the network answers, the more chunks are requested at the same time from now on.
        chunks, busy_s, cpu_s = zip(*threads.map(partial(_timed, read), cell_ids), strict=True)
        threads.grow(threads_to_read(sum(busy_s), sum(cpu_s), n_cores()))
        return list(chunks)

    def _read_chunk_with_retries(self, native: NativeArray | None, n_genes: int, cell_ids: Int64Array) -> Chunk:
        """Read ascending cells of one chunk, natively if possible, and compare them with their totals in obs."""
        chunk = self._retry_policy.read(
            self._uris["X"], lambda: read_chunk(native or self._handle("X"), cell_ids, n_genes=n_genes)
        )
        # counts that are not raw have other totals; `read` raises the error for them
        if self._has_totals and chunk.has_raw_counts and len(wrong := self._totals.find_wrong(chunk, cell_ids)):
            self._raise_wrong_totals(chunk, cell_ids, wrong)
        return chunk

    def _raise_wrong_totals(self, chunk: Chunk, cell_ids: Int64Array, wrong: Int64Array) -> None:
        """Raise the OSError of cells with other counts than obs states, unless obs describes more genes than var."""
        if "n_measured_vars" in self.obs_columns:
            n_measured = int(self._read_rows(pa.array(cell_ids[wrong]), ["n_measured_vars"]).max().iloc[0])
            if n_measured > len(self.genes):
                self._has_totals = False
                logger.info(
                    "obs of %s describes %d genes (n_measured_vars), but var has only %d of them; counts are not "
                    "compared with nnz and raw_sum",
                    *(self._uri, n_measured, len(self.genes)),
                )
                return
        raise OSError(
            errno.EIO,
            f"{self._uris['X']}: {self._totals.explain(chunk, cell_ids, wrong)}; X is damaged or incomplete: copy it "
            "again. If obs describes other counts than X, remove its columns nnz and raw_sum",
        )


def _timed(read: Callable[[Int64Array], Chunk], cell_ids: Int64Array) -> tuple[Chunk, float, float]:
    """Return a chunk, and the seconds and the processor time of this thread that reading it took."""
    started, cpu = time.perf_counter(), time.thread_time()
    return read(cell_ids), time.perf_counter() - started, time.thread_time() - cpu


def _looks_raw(layer: soma.SparseNDArray, cell_ids: Int64Array) -> bool:
    """Return whether a layer can be suggested in the error for one that does not hold raw counts."""
    try:
        return read_chunk(layer, cell_ids).has_raw_counts
    except ValueError:
        return False


def _find_arrays(experiment: soma.Experiment, layer: str) -> dict[str, str]:
    """Return the URIs of obs, and of var and the layer of X in the measurement "RNA".

    Raises:
        ValueError: one of them is missing; the message lists what is there.
    """
    parts: Any = experiment
    for part in ("obs", "ms"):
        if part not in parts:
            raise ValueError(f"{experiment.uri} has no {part!r}; it has {sorted(parts)}; is the copy complete?")
    measurements: Any = experiment.ms
    if "RNA" not in measurements:
        raise ValueError(f"{experiment.uri} has no measurement 'RNA'; it has {sorted(measurements)}")
    measurement = measurements["RNA"]
    for part in ("var", "X"):
        if part not in measurement:
            raise ValueError(f"{measurement.uri} has no {part!r}; it has {sorted(measurement)}; is the copy complete?")
    if layer not in measurement.X:
        raise ValueError(f"{experiment.uri} has no layer {layer!r} of X; it has {sorted(measurement.X)}")
    counts = measurement.X[layer]
    if not isinstance(counts, soma.SparseNDArray):
        raise ValueError(f"{counts.uri} is a {type(counts).__name__}; expected counts in a SparseNDArray")
    return {"obs": str(experiment.obs.uri), "var": str(measurement.var.uri), "X": str(counts.uri)}
