"""Cells of a SOMA in the Census layout, local or remote, read fast in any order.

The Census stores X in tiles of 2,048 cells, so the natural unit of reading is an aligned chunk of 2,048 rows. A few
Python threads read one chunk each: of a local Census from its files (`tiles.py`), else through TileDB, with a context
of their own. `chunks.py` keeps it small until its cells are asked for. Which chunks are worth reading together is
decided by `plan.py`.
"""

import threading
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any, cast

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from scgpt_hf.cells.block import CellBlock, Int64Array, gene_hash, name_layers, require_cell_ids, require_counts
from scgpt_hf.cells.obs import full_filter, require_columns, select_obs
from scgpt_hf.cells.schedule.epoch import CHUNK_SIZE
from scgpt_hf.cells.soma.chunks import Chunk, ChunkedBlock, read_chunk
from scgpt_hf.cells.soma.native.fragments import PlainArray, open_plain
from scgpt_hf.cells.soma.remote import RetryPolicy, is_remote, open_context
from scgpt_hf.cells.threads import DaemonThreadPool, n_cores


class CensusSource:
    """The cells of one organism of a SOMA in the Census layout; see `CellSource` for what its members promise.

    Nothing is kept open before it is needed. `close` ends the threads and closes the arrays; the next read opens them.
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
    ) -> None:
        """Check the settings against the data.

        Args:
            uri: the SOMA experiment of one organism; `address.py` finds it.
            obs_filter: SOMA value filter.
            layer: layer of X with the raw counts; by default "raw".
            primary_only: keep only cells with `is_primary_data == True`.
            census_version: release, for the record.
            n_threads: chunks read at once; of a local Census at most one more than there are cores.

        Raises:
            OSError: it cannot be read, or a remote one not even after many attempts; every member may raise it.
            ValueError: obs, var, the measurement "RNA" or the layer is not there; or the filter is not one expression.
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
        self._remote, self._retry_policy = is_remote(uri), RetryPolicy()
        self._lock, self._local = threading.Lock(), threading.local()
        self._handles: list[soma.SparseNDArray | soma.DataFrame] = []
        self._pool: DaemonThreadPool | None = None
        self._offered: NDArray[np.bool_] | None = None
        self._uris, self.columns, self._n_rows = self._retry_policy.read(uri, self._look)
        self._filter = full_filter(obs_filter, self.columns, primary_only=primary_only)

    def _look(self) -> tuple[dict[str, str], list[str], int]:
        """Return the URIs of X, obs and var, the columns of obs, and the rows of X."""
        with self._experiment() as experiment:
            uris = _find_arrays(experiment, self._layer)
            layer: Any = experiment.ms["RNA"].X[self._layer]
            columns = [str(name) for name in experiment.obs.schema.names if name != "soma_joinid"]
            return uris, columns, layer.shape[0]

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
            self.__dict__.pop("_plain", None)
        for handle in handles:
            handle.close()

    @cached_property
    def genes(self) -> pd.DataFrame:
        """The genes of `ms/RNA/var` by joinid: columns `feature_id` and `feature_name`."""

        def read() -> pd.DataFrame:
            with soma.DataFrame.open(self._uris["var"], context=self._context(self._n_threads)) as frame:
                rows = frame.read(column_names=["soma_joinid", "feature_id", "feature_name"])
                return cast(pd.DataFrame, rows.concat().to_pandas())

        genes = self._retry_policy.read(self._uris["var"], read).sort_values("soma_joinid", ignore_index=True)
        if not len(genes) or (genes["soma_joinid"] != genes.index).any():
            raise ValueError(f"{self._uris['var']} lacks some of its genes, or all; is the copy complete?")
        return genes.drop(columns="soma_joinid").astype(str)

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return the cells that match the filter; see `CellSource.obs`."""

        def read() -> pd.DataFrame:
            with soma.DataFrame.open(self._uris["obs"], context=self._context(self._n_threads)) as frame:
                return select_obs(frame, self._filter, columns)

        obs = self._retry_policy.read(self._uris["obs"], read)
        if self._offered is None:  # once, for to go through a hundred million cells takes long
            self._offered = self._mark(obs.index.to_numpy())
        return obs

    def read(self, cell_ids: Int64Array, columns: Sequence[str] = ()) -> CellBlock:
        """Return these cells in this order; see `CellSource.read`."""
        cell_ids = require_cell_ids(cell_ids, self._all_offered())
        require_columns(columns, self.columns)
        order = np.argsort(cell_ids)
        ascending = cell_ids[order]
        edges = np.flatnonzero(np.diff(ascending // CHUNK_SIZE)) + 1
        read_one = partial(self._read_chunk, self._plain)  # found once, not by every thread
        chunks = list(self._threads().map(read_one, np.split(ascending, edges))) if len(order) else []
        places = np.split(order, edges) if chunks else []
        block = ChunkedBlock(chunks, places, self._read_obs(cell_ids, columns), cell_ids, n_genes=len(self.genes))
        if not all(chunk.raw for chunk in chunks):
            self._refuse(block.data, ascending)
        return block

    def describe(self) -> dict[str, Any]:
        """Return where the cells come from; see `CellSource.describe`."""
        return {
            "kind": "census",
            "uri": self._uri,
            "census_version": self._settings["census_version"],
            "organism": self._uri.rstrip("/").rsplit("/", 1)[-1],
            "layer": self._layer,
            "obs_filter": self._filter,
            "n_cells": int(self._all_offered().sum()),
            "n_genes": len(self.genes),
            "gene_hash": gene_hash(self.genes["feature_id"]),
        }

    @cached_property
    def _plain(self) -> PlainArray | None:
        """X, where its files are read without TileDB."""

        def look() -> PlainArray | None:
            with soma.SparseNDArray.open(self._uris["X"], context=self._context(1)) as array:
                return open_plain(array)

        return None if self._remote else self._retry_policy.read(self._uris["X"], look)

    def _all_offered(self) -> NDArray[np.bool_]:
        """Return, true at the id of each cell that matches the filter, one byte per cell of the Census."""
        if self._offered is None:
            self.obs()  # marks them
        return cast(NDArray[np.bool_], self._offered)

    def _mark(self, ids: Int64Array) -> NDArray[np.bool_]:
        if ids[-1] >= self._n_rows:
            raise ValueError(
                f"{self._uri} has a cell {ids[-1]:,} in obs, and only {self._n_rows:,} rows in layer {self._layer!r} "
                "of X; is the copy complete?"
            )
        offered = np.zeros(int(ids[-1]) + 1, dtype=np.bool_)
        offered[ids] = True
        return offered

    def _read_obs(self, cell_ids: Int64Array, columns: Sequence[str]) -> pd.DataFrame:
        if not columns or not len(cell_ids):
            return pd.DataFrame({name: [] for name in columns}, index=pd.Index(cell_ids, name="cell_id"))

        first, last = int(cell_ids.min()), int(cell_ids.max())
        gapless = last - first + 1 == len(cell_ids)  # then TileDB has no list to go through

        def read() -> pd.DataFrame:
            where = slice(first, last) if gapless else pa.array(np.sort(cell_ids))
            rows = self._handle("obs").read((where,), column_names=["soma_joinid", *columns])
            return cast(pd.DataFrame, rows.concat().to_pandas())

        obs = self._retry_policy.read(self._uris["obs"], read)
        return obs.set_index("soma_joinid").rename_axis("cell_id").loc[cell_ids]

    def _refuse(self, counts: NDArray[np.float32], cell_ids: Int64Array) -> None:
        """Raise the ValueError that says what is wrong with these counts, and which other layers look raw."""
        try:
            require_counts(counts, f"layer {self._layer!r} of {self._uri}")
        except ValueError as error:
            others = self._retry_policy.read(self._uri, lambda: self._other_layers(cell_ids))
            raise name_layers(error, others) from error

    def _other_layers(self, cell_ids: Int64Array) -> dict[str, bool]:
        """Return the other layers of X, and whether the cells of the first chunk of these ids look raw there."""
        cell_ids = cell_ids[cell_ids // CHUNK_SIZE == cell_ids[0] // CHUNK_SIZE]
        with self._experiment() as experiment:
            measurement: Any = experiment.ms["RNA"]
            others = {name: layer for name, layer in measurement.X.items() if name != self._layer}
            return {
                name: isinstance(layer, soma.SparseNDArray) and read_chunk(layer, cell_ids).raw
                for name, layer in others.items()
            }

    def _experiment(self) -> soma.Experiment:
        return soma.Experiment.open(self._uri, context=self._context(self._n_threads))

    def _context(self, n_threads: int) -> soma.SOMATileDBContext:
        return open_context(self._remote, n_threads=n_threads)

    def _threads(self) -> DaemonThreadPool:
        with self._lock:
            if self._pool is None:
                # to decode takes a core: with more threads less is read (measured); one may wait for the disk meanwhile
                n_threads = self._n_threads if self._remote else min(self._n_threads, n_cores() + 1)
                self._pool = DaemonThreadPool(n_threads, "census-chunk")
            return self._pool

    def _handle(self, name: str) -> Any:
        """Return this thread's own handle on X or obs, with its own context."""
        if not hasattr(self._local, name):
            kind: Any = soma.SparseNDArray if name == "X" else soma.DataFrame
            handle = kind.open(self._uris[name], context=self._context(1))
            setattr(self._local, name, handle)
            with self._lock:
                self._handles.append(handle)
        return getattr(self._local, name)

    def _read_chunk(self, plain: PlainArray | None, cell_ids: Int64Array) -> Chunk:
        return self._retry_policy.read(self._uris["X"], lambda: read_chunk(plain or self._handle("X"), cell_ids))


def _find_arrays(experiment: soma.Experiment, layer: str) -> dict[str, str]:
    """Return the URIs of obs, and of var and a layer of the measurement RNA; raise a ValueError that lists what is."""
    parts: Any = experiment
    for part in ("obs", "ms"):
        if part not in parts:
            raise ValueError(f"{experiment.uri} has no {part!r}, it has {sorted(parts)}; is the copy complete?")
    measurements: Any = experiment.ms
    if "RNA" not in measurements:
        raise ValueError(f"{experiment.uri} has no measurement 'RNA'; it has {sorted(measurements)}")
    measurement = measurements["RNA"]
    for part in ("var", "X"):
        if part not in measurement:
            raise ValueError(f"{measurement.uri} has no {part!r}, it has {sorted(measurement)}; is the copy complete?")
    if layer not in measurement.X:
        raise ValueError(f"{experiment.uri} has no layer {layer!r} of X; it has {sorted(measurement.X)}")
    counts = measurement.X[layer]
    if not isinstance(counts, soma.SparseNDArray):
        raise ValueError(f"{counts.uri} is a {type(counts).__name__}, expected counts as a SparseNDArray")
    return {"obs": str(experiment.obs.uri), "var": str(measurement.var.uri), "X": str(counts.uri)}
