"""Cells out of the shards of a cache, in any order, straight from the mapped files.

A shard is mapped, not read: of each record batch only the places of its Arrow buffers are kept. Cells are found, and
brought into memory, by several threads; compiled loops that release the GIL copy a few at a time. The format is
described in `cache_format.py`.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
from numba import njit

from scgpt_hf.cells.block import CellBlock, CsrArrays, Int64Array
from scgpt_hf.cells.cache.format import CELL_COLUMNS, ESCAPE, Array, cache_schema
from scgpt_hf.cells.cache.manifest import REMEDY, CacheError
from scgpt_hf.cells.soma.layout import TILE

_CELLS, _IDS, _OFFSETS, _GENES, _COUNTS, _LARGE_OFFSETS, _LARGE = range(7)  # columns of `Shard.batches`
_PAGE = 4096  # bytes that the system reads at once, at least


class Shard:
    """One mapped file of cells; the file itself is not kept open.

    Attributes:
        path: of the file.
        table: the file as an Arrow table, without a copy.
        cell_ids: its cells, ascending. Shape (cells,).
        chunks: the chunk of ids of each record batch, ascending. Shape (batches,).
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
            _validate_shard(self.table, content, n_genes)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise CacheError(f"{path} is no whole shard of a cache: {error}; {REMEDY}") from error
        gene_type = self.table.schema.field("gene").type.value_type.to_pandas_dtype()
        self.longs, self.ints, self.genes, self.bytes = (
            np.frombuffer(content, kind, len(content) // np.dtype(kind).itemsize)
            for kind in (np.int64, np.uint32, gene_type, np.uint8)
        )
        places = [_find_buffers(batch, content.address) for batch in self.table.to_batches()]
        self.batches = np.array(places, np.int64).reshape(-1, 7)
        self.chunks = self.longs[self.batches[:, _IDS]] // TILE

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


class MappedBlock(CellBlock):
    """A block whose counts stay in the mapped shards until its rows are needed."""

    def __init__(
        self,
        shards: Sequence[Shard],
        shard_of_cell: Array,
        places: tuple[Int64Array, Int64Array],
        obs: pd.DataFrame,
        cell_ids: Int64Array,
        *,
        n_genes: int,
    ) -> None:
        """Create a block of cells in any order.

        Args:
            shards: mapped files.
            shard_of_cell: the shard of each cell. Shape (cells,).
            places: the position of each cell in its shard as `_find_cells` fills it, shape (cells, 3), and its number
                of genes, shape (cells,).
            obs: obs columns of the block, indexed by cell id. Shape (cells, columns).
            cell_ids: the ids of the cells. Shape (cells,).
            n_genes: number of genes of the cache.
        """
        super().__init__(None, obs, cell_ids, n_genes=n_genes)
        self._shards, self._shard_of_cell = shards, shard_of_cell
        self._places, self._lengths = places

    def _gather(self, positions: Int64Array) -> CsrArrays:
        """Copy the cells at the given positions from the shards.

        Raises:
            CacheError: a cell has a gene that the cache does not have.
        """
        indptr, n_genes = np.concatenate([[0], np.cumsum(self._lengths[positions])]), self.shape[1]
        genes = np.empty(indptr[-1], np.uint16 if n_genes <= 2**16 else np.int32)
        counts: Array = np.empty(indptr[-1], np.uint16)
        if self._copy(positions, indptr, genes, counts):  # large counts are rare: copy the cells a second time
            counts = np.empty(indptr[-1], np.float32)
            self._copy(positions, indptr, genes, counts)
        if (largest := genes.max(initial=0)) >= n_genes:
            folder = self._shards[0].path.parent
            raise CacheError(f"{folder} has {n_genes:,} genes, and cells with gene {largest:,}; {REMEDY}")
        return counts, genes, indptr

    def _copy(self, positions: Int64Array, indptr: Int64Array, genes: Array, counts: Array) -> int:
        """Fill genes and counts; return how many counts do not fit 16 bits."""
        places, shard_of_cell = self._places[positions], self._shard_of_cell[positions]
        order = np.lexsort((places[:, 0], shard_of_cell))  # so that memory is walked through forwards
        return sum(
            _copy_cells(shard.genes, shard.bytes, shard.ints, part, places, indptr, genes, counts)
            for shard, part in _by_shard(order, self._shards, shard_of_cell)
        )


def find_cells(
    shards: Sequence[Shard],
    shard_of_cell: Array,
    obs: pd.DataFrame,
    cell_ids: Int64Array,
    *,
    n_genes: int,
    pool: Executor,
    n_threads: int,
) -> CellBlock:
    """Find cells in their shards, bring their bytes into memory, and return them as a block, in the order given.

    Args:
        shards: mapped files.
        shard_of_cell: the shard of each cell. Shape (cells,).
        obs: obs columns of the block, indexed by cell id. Shape (cells, columns).
        cell_ids: the ids of the cells; each is in its shard. Shape (cells,).
        n_genes: number of genes of the cache.
        pool: executor that runs the search.
        n_threads: number of parts that are searched at the same time.
    """
    order = np.lexsort((cell_ids, shard_of_cell))
    places, lengths = np.empty((len(cell_ids), 3), np.int64), np.empty(len(cell_ids), np.int64)

    def find(cells: Int64Array) -> None:
        for shard, part in _by_shard(cells, shards, shard_of_cell):
            found, n_entries = np.empty((len(part), 3), np.int64), np.empty(len(part), np.int64)
            _find_cells(shard.longs, shard.ints, shard.batches, shard.chunks, cell_ids[part], found, n_entries)
            _touch_cells(shard.genes, shard.bytes, found, n_entries)
            places[part], lengths[part] = found, n_entries

    for done in [pool.submit(find, part) for part in np.array_split(order, n_threads)]:
        done.result()
    return MappedBlock(shards, shard_of_cell, (places, lengths), obs, cell_ids, n_genes=n_genes)


def gather_obs(
    shards: Sequence[Shard], shard_of_cell: Array, cell_ids: Int64Array, columns: Sequence[str]
) -> pd.DataFrame:
    """Return obs columns of cells of any shards, in the order given; arguments as of `find_cells`."""
    if not columns:  # a table without columns forgets its number of rows
        return pd.DataFrame(index=pd.Index(cell_ids, name="cell_id"))
    order, tables = np.argsort(shard_of_cell, kind="stable"), []
    for shard, cells in _by_shard(order, shards, shard_of_cell):
        rows = np.searchsorted(shard.cell_ids, cell_ids[cells])
        tables.append(shard.table.select(list(columns)).take(rows).to_pandas())
    obs: pd.DataFrame = pd.concat(tables, ignore_index=True).iloc[np.argsort(order)]
    return obs.set_index(pd.Index(cell_ids, name="cell_id"))


def _by_shard(cells: Int64Array, shards: Sequence[Shard], shard_of_cell: Array) -> list[tuple[Shard, Int64Array]]:
    """Return positions of cells with the shard they lie in, a pair for each run of cells of one shard."""
    runs = np.split(cells, np.flatnonzero(np.diff(shard_of_cell[cells])) + 1)
    return [(shards[shard_of_cell[run[0]]], run) for run in runs if len(run)]


def _validate_shard(table: pa.Table, content: pa.Buffer, n_genes: int) -> None:
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
            raise ValueError("the cells of a batch do not ascend within one chunk")
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


@njit(nogil=True, cache=True)
def _find_cells(longs, ints, batches, chunks, cell_ids, places, lengths):  # type: ignore[no-untyped-def]
    """Fill where each cell lies, in elements: genes, counts, large counts or −1; and its number of genes.

    Its record batch is found by its chunk, its row by bisection, which in a whole chunk is one look.
    """
    for i in range(len(cell_ids)):
        batch = batches[np.searchsorted(chunks, cell_ids[i] // TILE)]
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
def _touch_cells(all_genes, all_counts, places, lengths):  # type: ignore[no-untyped-def]
    """Read a byte of every page of the cells, and return the sum: the system then has them in memory."""
    total = 0
    for cell in range(len(lengths)):
        gene, count, n = places[cell, 0], places[cell, 1], lengths[cell]
        for entry in range(0, n, _PAGE // 4):  # a gene takes four bytes at most
            total += all_genes[gene + entry]
        for entry in range(0, n, _PAGE):
            total += all_counts[count + entry]
        if n:
            total += all_genes[gene + n - 1] + all_counts[count + n - 1]
    return total


@njit(nogil=True, cache=True)
def _copy_cells(all_genes, all_counts, all_large, cells, places, indptr, genes, counts):  # type: ignore[no-untyped-def]
    """Copy each cell to its place in the matrix; return how many counts do not fit 16 bits."""
    n_misfits = 0
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
                    n_misfits += all_large[large] >= 2**16
                    large += 1
    return n_misfits
