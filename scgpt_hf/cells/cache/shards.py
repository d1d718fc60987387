"""Read cells from the shards of a cache, in any order, directly from memory-mapped files.

A shard is mapped, not loaded: only the positions of the Arrow buffers of each record batch are kept. Several threads
find the cells and bring their pages into memory. Compiled loops, which release the GIL, then copy a few cells at a
time. `format.py` describes the file format.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa

from scgpt_hf.cells.block import CHUNK_SIZE, AnyArray, CellBlock, CsrArrays, Int64Array, to_offsets
from scgpt_hf.cells.cache.format import CELL_COLUMNS, ESCAPE, cache_schema
from scgpt_hf.cells.compiled import compiled
from scgpt_hf.cells.jobs.records import REMEDY, ShardError

_CELLS, _IDS, _OFFSETS, _GENES, _COUNTS, _LARGE_OFFSETS, _LARGE = range(7)  # columns of `Shard.batches`
_PAGE = 4096  # bytes; the smallest page of memory, which the system reads from the disk at once


class Shard:
    """One memory-mapped file of cells. The file is closed after mapping, so a cache needs no open files.

    Attributes:
        path: the path of the file.
        table: the file as an Arrow table that shares its memory.
        cell_ids: the ids of its cells, ascending. Shape (cells,).
        chunks: the chunk of ids of each record batch, ascending. Shape (batches,).
        batches: number of cells of each record batch, and the offsets of its buffers in the file, in elements of their
            own types: cell ids, offsets of genes, genes, counts, offsets of large counts, large counts.
            Shape (batches, 7).
        longs, ints, genes, bytes: the content of the file as int64, uint32, the type of genes, and uint8.
    """

    def __init__(self, path: Path, n_genes: int) -> None:
        """Map a file and validate it.

        Args:
            path: the path of the file.
            n_genes: number of genes of the cache.

        Raises:
            ShardError: the file is not a complete shard.
            OSError: the file cannot be opened.
        """
        self.path = path
        with pa.memory_map(str(path)) as file:
            content = file.read_buffer()
        try:
            self.table = pa.ipc.open_stream(pa.BufferReader(content)).read_all()
            _validate_shard(self.table, content, n_genes)
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ShardError(f"{path} is not a valid shard: {error}; {REMEDY}") from error
        gene_type = self.table.schema.field("gene").type.value_type.to_pandas_dtype()
        self.longs, self.ints, self.genes, self.bytes = (
            np.frombuffer(content, kind, len(content) // np.dtype(kind).itemsize)
            for kind in (np.int64, np.uint32, gene_type, np.uint8)
        )
        places = [_find_buffers(batch, content.address) for batch in self.table.to_batches()]
        self.batches = np.array(places, np.int64).reshape(-1, 7)
        self.chunks = self.longs[self.batches[:, _IDS]] // CHUNK_SIZE

    @property
    def cell_ids(self) -> Int64Array:
        """The ids of the cells, ascending. Shape (cells,)."""
        ids: Int64Array = self.table["cell_id"].to_numpy()
        return ids

    def obs_column(self, name: str) -> pa.ChunkedArray:
        """Return an obs column. Shape (cells,).

        Raises:
            ShardError: the column does not exist, or its bytes are not valid values.
        """
        try:
            column = self.table[name]
            column.validate(full=True)  # invalid offsets of text would crash its reader
        except (pa.ArrowException, KeyError) as error:
            raise ShardError(f"{self.path} is not a valid shard: column {name!r}: {error}; {REMEDY}") from error
        return column


class MappedBlock(CellBlock):
    """A block whose counts stay in the mapped shards until its rows are needed."""

    def __init__(
        self,
        shards: Sequence[Shard],
        shard_of_cell: AnyArray,
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
            ShardError: a cell has a gene that the cache does not have.
        """
        indptr, n_genes = to_offsets(self._lengths[positions]), self.shape[1]
        genes = np.empty(indptr[-1], np.uint16 if n_genes <= 2**16 else np.int32)
        counts: AnyArray = np.empty(indptr[-1], np.uint16)
        if self._copy(positions, indptr, genes, counts):  # large counts are rare: copy the cells a second time
            counts = np.empty(indptr[-1], np.float32)
            self._copy(positions, indptr, genes, counts)
        if (largest := genes.max(initial=0)) >= n_genes:
            folder = self._shards[0].path.parent
            raise ShardError(f"{folder} has {n_genes:,} genes, but a cell has gene number {largest:,}; {REMEDY}")
        return counts, genes, indptr

    def _copy(self, positions: Int64Array, indptr: Int64Array, genes: AnyArray, counts: AnyArray) -> int:
        """Fill genes and counts; return how many counts do not fit 16 bits."""
        places, shard_of_cell = self._places[positions], self._shard_of_cell[positions]
        order = np.lexsort((places[:, 0], shard_of_cell))  # by position in the file: reading memory forwards is fastest
        return sum(
            _copy_cells(shard.genes, shard.bytes, shard.ints, part, places, indptr, genes, counts)
            for shard, part in _by_shard(order, self._shards, shard_of_cell)
        )


def find_cells(
    shards: Sequence[Shard],
    shard_of_cell: AnyArray,
    obs: pd.DataFrame,
    cell_ids: Int64Array,
    *,
    n_genes: int,
    pool: Executor,
    n_threads: int,
) -> CellBlock:
    """Find cells in their shards, bring their pages into memory, and return them as a block, in the given order.

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
    shards: Sequence[Shard], shard_of_cell: AnyArray, cell_ids: Int64Array, columns: Sequence[str]
) -> pd.DataFrame:
    """Return obs columns of cells, in the given order.

    Args:
        shards: mapped files.
        shard_of_cell: the shard of each cell. Shape (cells,).
        cell_ids: the ids of the cells; each is in its shard. Shape (cells,).
        columns: names of the columns.

    Returns:
        The columns, indexed by cell id. Shape (cells, columns).
    """
    if not columns:  # an Arrow table without columns has no rows
        return pd.DataFrame(index=pd.Index(cell_ids, name="cell_id"))
    order, tables = np.argsort(shard_of_cell, kind="stable"), []
    for shard, cells in _by_shard(order, shards, shard_of_cell):
        rows = np.searchsorted(shard.cell_ids, cell_ids[cells])
        tables.append(shard.table.select(list(columns)).take(rows).to_pandas())
    obs: pd.DataFrame = pd.concat(tables, ignore_index=True).iloc[np.argsort(order)]
    return obs.set_index(pd.Index(cell_ids, name="cell_id"))


def _by_shard(cells: Int64Array, shards: Sequence[Shard], shard_of_cell: AnyArray) -> list[tuple[Shard, Int64Array]]:
    """Split positions of cells into runs of the same shard; return each run with its shard."""
    runs = np.split(cells, np.flatnonzero(np.diff(shard_of_cell[cells])) + 1)
    return [(shards[shard_of_cell[run[0]]], run) for run in runs if len(run)]


def _validate_shard(table: pa.Table, content: pa.Buffer, n_genes: int) -> None:
    """Raise unless the buffers of a shard are as `format.py` describes them.

    This is needed for safety: neither Arrow nor the compiled loops below check offsets again. It reads the ids and
    offsets, 20 bytes for each cell. Columns of obs are validated when they are used.

    Raises:
        pyarrow.ArrowException: a buffer is invalid.
        ValueError: the schema, the ids or the offsets are not those of a shard.
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
            raise ValueError("it is compressed, or has another byte order")
        if ids.null_count or (np.diff(ids) <= 0).any() or ids[0].as_py() // CHUNK_SIZE != ids[-1].as_py() // CHUNK_SIZE:
            raise ValueError("the cell ids of a record batch do not ascend within one chunk")
        if not genes.offsets.equals(counts.offsets):
            raise ValueError("the number of genes of a cell differs from the number of its counts")


def _types(schema: pa.Schema) -> dict[str, str]:
    return {field.name: str(field.type) for field in schema}


def _find_buffers(batch: pa.RecordBatch, address: int) -> tuple[int, ...]:
    """Return the row of `Shard.batches` for a record batch.

    Args:
        batch: a record batch of the mapped file.
        address: the address of the mapped file.
    """

    def place(buffer: pa.Buffer | None, item_size: int) -> int:
        return 0 if buffer is None else (buffer.address - address) // item_size  # an empty list has no buffer

    found = [batch.num_rows, place(batch.column(0).buffers()[1], 8)]
    for column in batch.columns[1 : len(CELL_COLUMNS)]:
        _, offsets, _, values = column.buffers()
        found += [place(offsets, 4), place(values, column.type.value_type.bit_width // 8)]
    n_cells, ids, offsets, genes, _, counts, large_offsets, large = found  # genes and counts have the same offsets
    return n_cells, ids, offsets, genes, counts, large_offsets, large


@compiled
def _find_cells(longs, ints, batches, chunks, cell_ids, places, lengths):  # type: ignore[no-untyped-def]
    """Find cells of a shard; fill `places` and `lengths`.

    The record batch of a cell is found by its chunk, and its row by bisection. The first bounds of the bisection come
    from the distance to the first and the last id; if the chunk is complete they are equal, and the row is found at
    once.

    Args:
        longs: see `Shard`.
        ints: see `Shard`.
        batches: see `Shard`.
        chunks: see `Shard`.
        cell_ids: the cells, all in this shard. Shape (cells,).
        places: is filled with the positions of the first gene, of the first count and of the first large count, −1 if
            the cell has none; in elements of their types. Shape (cells, 3).
        lengths: is filled with the number of genes. Shape (cells,).
    """
    for i in range(len(cell_ids)):
        batch = batches[np.searchsorted(chunks, cell_ids[i] // CHUNK_SIZE)]
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


@compiled
def _touch_cells(all_genes, all_counts, places, lengths):  # type: ignore[no-untyped-def]
    """Read one byte of every page of the cells, so that the system loads them; return the sum of the bytes.

    Without the sum, the compiler would remove the reads.
    """
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


@compiled
def _copy_cells(all_genes, all_counts, all_large, cells, places, indptr, genes, counts):  # type: ignore[no-untyped-def]
    """Copy the genes and counts of cells into the arrays of a CSR matrix; return how many counts exceed 16 bits."""
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
