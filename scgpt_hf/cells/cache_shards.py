"""Cells out of the shards of a cache, in any order, straight from the mapped files.

A shard is mapped, not read: of each record batch only the places of its Arrow buffers are kept. Compiled loops that
release the GIL copy the cells asked for, widened to a CSR matrix. The format is described in `cache_format.py`.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
from numba import njit
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import Int64Array, sorted_csr
from scgpt_hf.cells.cache_format import CELL_COLUMNS, ESCAPE, Array, cache_schema
from scgpt_hf.cells.cache_manifest import REMEDY, CacheError
from scgpt_hf.cells.layout import TILE

_CELLS, _IDS, _OFFSETS, _GENES, _COUNTS, _LARGE_OFFSETS, _LARGE = range(7)  # columns of `Shard.batches`


class Shard:
    """One mapped file of cells; the file itself is not kept open.

    Attributes:
        path: of the file.
        table: the file as an Arrow table, without a copy.
        cell_ids: its cells, ascending. Shape (cells,).
        bands: the band of ids of each record batch, ascending. Shape (batches,).
        batches: cells of each record batch, and where its buffers begin in the file, in elements of their own type:
            cell ids, offsets of genes, genes, counts, offsets of large counts, large counts. Shape (batches, 7).
        longs, ints, genes, bytes: the file as int64, uint32, the type of genes, uint8.
    """

    def __init__(self, path: Path, n_genes: int) -> None:
        """Map the file.

        Args:
            path: of the file.
            n_genes: of its cache.

        Raises:
            CacheError: it is no whole Arrow stream with the cells of a cache.
            OSError: it cannot be opened.
        """
        self.path = path
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
        try:
            self.table = pa.ipc.open_stream(pa.BufferReader(content)).read_all()
            _require_sound(self.table, content, n_genes)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CacheError(f"{path} is no whole shard of a cache: {error}; {REMEDY}") from error
        gene_type = self.table.schema.field("gene").type.value_type.to_pandas_dtype()
        self.longs, self.ints, self.genes, self.bytes = (
            np.frombuffer(content, kind, len(content) // np.dtype(kind).itemsize)
            for kind in (np.int64, np.uint32, gene_type, np.uint8)
        )
        places = [_find_buffers(batch, content.address) for batch in self.table.to_batches()]
        self.batches = np.array(places, np.int64).reshape(-1, 7)
        self.bands = self.longs[self.batches[:, _IDS]] // TILE

    @property
    def cell_ids(self) -> Int64Array:
        """The cells of the shard, ascending. Shape (cells,)."""
        ids: Int64Array = self.table["cell_id"].to_numpy()
        return ids

    def obs_column(self, name: str) -> pa.ChunkedArray:
        """Return a column of obs. Shape (cells,).

        Raises:
            CacheError: there is none, or its bytes are no such values, which would crash what reads them.
        """
        try:
            column = self.table[name]
            column.validate(full=True)
        except (pa.ArrowException, KeyError) as error:
            raise CacheError(f"{self.path} is no whole shard of a cache: in {name!r}: {error}; {REMEDY}") from error
        return column


Part: TypeAlias = list[tuple[Shard, Int64Array]]  # what one thread does


def gather_cells(
    shards: Sequence[Shard], shard_of_cell: Array, cell_ids: Int64Array, n_genes: int, pool: Executor, n_threads: int
) -> csr_matrix:
    """Return cells of any shards as one matrix of float32 counts, in the order given. Shape (cells, genes).

    Args:
        shards: mapped files.
        shard_of_cell: which of them holds each cell. Shape (cells,).
        cell_ids: the cells; each is in its shard. Shape (cells,).
        n_genes: columns of the matrix.
        pool: runs the copying.
        n_threads: parts that are copied at the same time.
    """
    order = np.lexsort((cell_ids, shard_of_cell))  # so that memory is walked through forwards
    parts = [_by_shard(cells, shards, shard_of_cell) for cells in np.array_split(order, n_threads)]
    places, lengths = np.empty((len(cell_ids), 3), np.int64), np.empty(len(cell_ids), np.int64)
    _all_at_once(pool, partial(_locate, cell_ids=cell_ids, places=places, lengths=lengths), parts)
    indptr = np.concatenate([[0], np.cumsum(lengths)])
    genes, counts = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    _all_at_once(pool, partial(_copy, places=places, indptr=indptr, genes=genes, counts=counts), parts)
    matrix = sorted_csr(indptr, genes, counts, n_genes)
    matrix.has_canonical_format = True  # as they were written
    return matrix


def gather_obs(
    shards: Sequence[Shard], shard_of_cell: Array, cell_ids: Int64Array, columns: Sequence[str]
) -> pd.DataFrame:
    """Return obs columns of cells of any shards, in the order given; arguments as of `gather_cells`."""
    if not columns:  # a table without columns forgets its number of rows
        return pd.DataFrame(index=pd.Index(cell_ids, name="cell_id"))
    order, tables = np.argsort(shard_of_cell, kind="stable"), []
    for shard, cells in _by_shard(order, shards, shard_of_cell):
        rows = np.searchsorted(shard.cell_ids, cell_ids[cells])
        tables.append(shard.table.select(list(columns)).take(rows).to_pandas())
    obs: pd.DataFrame = pd.concat(tables, ignore_index=True).iloc[np.argsort(order)]
    return obs.set_index(pd.Index(cell_ids, name="cell_id"))


def _by_shard(cells: Int64Array, shards: Sequence[Shard], shard_of_cell: Array) -> Part:
    """Return positions of cells with the shard they lie in, a pair for each run of cells of one shard."""
    runs = np.split(cells, np.flatnonzero(np.diff(shard_of_cell[cells])) + 1)
    return [(shards[shard_of_cell[run[0]]], run) for run in runs if len(run)]


def _all_at_once(pool: Executor, work: Callable[[Shard, Int64Array], None], parts: Sequence[Part]) -> None:
    """Do the work on every pair, each part in its own thread."""

    def work_on(part: Part) -> None:
        for shard, cells in part:
            work(shard, cells)

    for done in [pool.submit(work_on, part) for part in parts]:
        done.result()


def _require_sound(table: pa.Table, content: pa.Buffer, n_genes: int) -> None:
    """Raise unless the cells lie in the file as `cache_format.py` says: neither Arrow nor the loops below look again.

    Touches the ids and the offsets, 20 bytes of each cell; obs is looked at where it is read.

    Raises:
        ValueError, pyarrow.ArrowException: what is wrong.
    """
    table.validate()
    cells, expected = table.select(range(min(len(CELL_COLUMNS), table.num_columns))), cache_schema(n_genes, {})
    if not cells.schema.equals(expected) or not len(cells):
        raise ValueError(f"expected cells with {_types(expected)}, found {len(cells):,} with {_types(cells.schema)}")
    cells.validate(full=True)
    for batch in cells.to_batches():
        ids, genes, counts, _ = batch.columns
        buffers = [buffer for column in batch.columns for buffer in column.buffers() if buffer]
        if not all(0 <= buffer.address - content.address <= content.size - buffer.size for buffer in buffers):
            raise ValueError("it is compressed, or of another byte order")
        if ids.null_count or (np.diff(ids) <= 0).any() or ids[0].as_py() // TILE != ids[-1].as_py() // TILE:
            raise ValueError("the cells of a batch do not ascend within one band")
        if not genes.offsets.equals(counts.offsets):
            raise ValueError("the cells have not as many genes as counts")


def _types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


def _find_buffers(batch: pa.RecordBatch, address: int) -> tuple[int, ...]:
    """Return the row of `Shard.batches` of a record batch in a file mapped at an address."""

    def place(buffer: pa.Buffer | None, item_size: int) -> int:
        return 0 if buffer is None else (buffer.address - address) // item_size  # an empty list has no buffer

    found = [batch.num_rows, place(batch.column(0).buffers()[1], 8)]
    for column in batch.columns[1 : len(CELL_COLUMNS)]:
        _, offsets, _, values = column.buffers()
        found += [place(offsets, 4), place(values, column.type.value_type.bit_width // 8)]
    n_cells, ids, offsets, genes, _, counts, large_offsets, large = found  # genes and counts have the same offsets
    return n_cells, ids, offsets, genes, counts, large_offsets, large


def _locate(shard: Shard, cells: Int64Array, *, cell_ids: Int64Array, places: Array, lengths: Int64Array) -> None:
    """Fill where the cells at these positions lie in their shard: genes, counts, large counts; and their lengths."""
    found, n_entries = np.empty((len(cells), 3), np.int64), np.empty(len(cells), np.int64)
    _find_cells(shard.longs, shard.ints, shard.batches, shard.bands, cell_ids[cells], found, n_entries)
    places[cells], lengths[cells] = found, n_entries


def _copy(shard: Shard, cells: Int64Array, *, places: Array, indptr: Int64Array, genes: Array, counts: Array) -> None:
    """Copy the cells at these positions out of their shard."""
    _copy_cells(shard.genes, shard.bytes, shard.ints, cells, places, indptr, genes, counts)


@njit(nogil=True, cache=True)
def _find_cells(longs, ints, batches, bands, cell_ids, places, lengths):  # type: ignore[no-untyped-def]
    """Find each cell: its record batch by its band, its row by bisection, which in a whole band is one look."""
    for i in range(len(cell_ids)):
        batch = batches[np.searchsorted(bands, cell_ids[i] // TILE)]
        ids = longs[batch[_IDS] : batch[_IDS] + batch[_CELLS]]
        last = len(ids) - 1
        low, high = max(0, last - (ids[last] - cell_ids[i])), min(last, cell_ids[i] - ids[0])
        while low < high:
            middle = (low + high) // 2
            if ids[middle] < cell_ids[i]:
                low = middle + 1
            else:
                high = middle
        start, stop = ints[batch[_OFFSETS] + low], ints[batch[_OFFSETS] + low + 1]
        large, no_large = ints[batch[_LARGE_OFFSETS] + low], ints[batch[_LARGE_OFFSETS] + low + 1]
        lengths[i] = stop - start
        places[i, 0], places[i, 1] = batch[_GENES] + start, batch[_COUNTS] + start
        places[i, 2] = -1 if large == no_large else batch[_LARGE] + large


@njit(nogil=True, cache=True)
def _copy_cells(all_genes, all_counts, all_large, cells, places, indptr, genes, counts):  # type: ignore[no-untyped-def]
    """Copy and widen each cell to its place in the matrix."""
    for cell in cells:
        n = indptr[cell + 1] - indptr[cell]
        gene, count, large = places[cell]
        from_genes, to_genes = all_genes[gene : gene + n], genes[indptr[cell] : indptr[cell + 1]]
        from_counts, to_counts = all_counts[count : count + n], counts[indptr[cell] : indptr[cell + 1]]
        for entry in range(n):
            to_genes[entry] = from_genes[entry]
        for entry in range(n):
            to_counts[entry] = from_counts[entry]
        if large >= 0:
            for entry in range(n):
                if from_counts[entry] == ESCAPE:
                    to_counts[entry] = all_large[large]
                    large += 1
