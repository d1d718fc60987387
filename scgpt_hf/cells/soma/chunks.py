"""Read the cells of one chunk of a SOMA sparse array, and keep them packed until their rows are needed.

A chunk is an aligned range of 2,048 neighbouring cells, one row of tiles of a Census. TileDB returns an entry as 20
bytes: cell id, gene and count. A shuffle window of 65,536 cells with 1,500 entries each would take 2 GB. Each entry
therefore becomes one word of 4 bytes, or of 8 where they do not suffice, and the cell id becomes an offset:

                upper half                      lower half
    uint32      count, whole, 1 to 65,535       gene, below 65,536      where all entries of the chunk fit
    uint64      the bits of a float32 count     gene                    otherwise

`read_chunk` works in five steps:

1. Read the entries in parts of some tiles each, natively or through TileDB.
2. Pack each part as soon as it is read, so that the memory of its 20-byte entries is used again for the next part. This
   drops zeros and the entries of cells that are not wanted.
3. Count the entries of each cell over all parts; their running sum is `indptr`.
4. Copy the words of each cell behind one another. They are in several runs, usually one for each tile with the cell.
5. Sort, if genes do not ascend within a cell. That happens only if fragments overlap.

`ChunkedBlock` is the block that `CensusSource.read` returns: it keeps the chunks and unpacks the rows that are taken.

The loops over entries are compiled and release the GIL, so that threads read at the same time.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from scgpt_hf.cells.block import CellBlock, CsrArrays, Int64Array, to_offsets
from scgpt_hf.cells.compiled import compiled
from scgpt_hf.cells.soma.layout import TILE
from scgpt_hf.cells.soma.native import NativeArray

# If at least this share of the cells in a range is wanted, TileDB reads the complete range faster than a list of cells
# (measured).
MIN_RANGE_DENSITY = 1 / 64

# `_pack_words` goes over its entries twice: up to this many (32 KiB) stay in the L1 cache in between.
_ENTRIES_PER_PASS = 2048

_COUNT_SHIFT, _GENE_MASK, _MAX_COUNT = 16, 2**16 - 1, 2**16 - 1  # of a word of 32 bits

Array: TypeAlias = NDArray[Any]
Entries: TypeAlias = tuple[Array, Array, Array]  # cell ids, genes and counts, shape (entries,) each


class Chunk(NamedTuple):
    """Packed counts of some cells of one chunk, by ascending id: cell i has words `indptr[i]:indptr[i + 1]`.

    Attributes:
        indptr: offsets of the cells, int64. Shape (cells + 1,).
        words: gene and count of each entry, genes ascending within a cell, counts not 0. Shape (entries,). uint32 or
            uint64; see the module's docstring.
    """

    indptr: Int64Array
    words: Array

    @property
    def has_raw_counts(self) -> bool:
        """Return whether all counts are finite integers above 0."""
        if self.words.dtype == np.uint32:  # only such counts fit 16 bits
            return True
        counts = (self.words >> np.uint64(32)).astype(np.uint32).view(np.float32)
        return bool((np.isfinite(counts) & (counts > 0) & (counts == np.floor(counts))).all())


class ChunkedBlock(CellBlock):
    """A block that keeps its counts packed in chunks, and unpacks only the rows that are taken."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        positions: Sequence[Int64Array],
        obs: pd.DataFrame,
        cell_ids: Int64Array,
        *,
        n_genes: int,
    ) -> None:
        """Create a block; see `CellBlock` for `obs`, `cell_ids` and `n_genes`.

        Args:
            chunks: the packed cells.
            positions: for each chunk, the positions of its cells in the block; together each position once.
            obs: shape (cells, columns).
            cell_ids: shape (cells,).
            n_genes: number of columns of the matrix.
        """
        super().__init__(None, obs, cell_ids, n_genes=n_genes)
        self._chunks = chunks
        narrow = all(chunk.words.dtype == np.uint32 for chunk in chunks)
        self._dtypes = (np.uint16, np.uint16) if narrow else (np.float32, np.int32)  # of counts and of genes
        # for each cell of the block: the index of its chunk, its row there, its number of entries
        self._chunk_of_cell, self._row, self._length = (np.empty(len(cell_ids), np.int64) for _ in range(3))
        for index, (chunk, cells) in enumerate(zip(chunks, positions, strict=True)):
            self._chunk_of_cell[cells], self._row[cells] = index, range(len(cells))
            self._length[cells] = np.diff(chunk.indptr)

    def _gather(self, positions: Int64Array) -> CsrArrays:
        """Unpack the cells at the given positions, chunk by chunk; see `CellBlock._gather`."""
        indptr = to_offsets(self._length[positions])
        counts, genes = (np.empty(indptr[-1], dtype) for dtype in self._dtypes)
        chunk_of_cell = self._chunk_of_cell[positions]
        by_chunk = np.argsort(chunk_of_cell, kind="stable")
        edges = np.flatnonzero(np.diff(chunk_of_cell[by_chunk])) + 1
        for cells in np.split(by_chunk, edges) if len(by_chunk) else []:
            chunk = self._chunks[chunk_of_cell[cells[0]]]
            rows, starts = self._row[positions[cells]], indptr[cells]
            if chunk.words.dtype == np.uint32:
                _unpack_words(chunk.indptr, chunk.words, rows, starts, genes, counts)
            else:
                _unpack_wide_words(chunk.indptr, chunk.words, rows, starts, genes, counts.view(np.uint32))
        return counts, genes, indptr


def read_chunk(array: soma.SparseNDArray | NativeArray, cell_ids: Int64Array) -> Chunk:
    """Read cells of one chunk and pack their counts.

    Args:
        array: cells by genes.
        cell_ids: cells of one chunk, ascending. Shape (cells,).
    """
    # The row of each cell id, or -1 if the cell is not wanted. The table has one more place at each end, with -1: ids
    # outside the range are clipped to these places, so that every lookup is valid.
    first_id = int(cell_ids[0]) - 1
    row_of_id = np.full(int(cell_ids[-1]) - first_id + 2, -1, dtype=np.int32)
    row_of_id[cell_ids - first_id] = np.arange(len(cell_ids), dtype=np.int32)
    genes_fit = array.shape[1] <= 2**16
    if isinstance(array, NativeArray):
        entries = array.read_entries(int(cell_ids[0]), int(cell_ids[-1]))
    else:
        entries = _read_through_tiledb(array, cell_ids)
    parts = [_pack_part(part, row_of_id, first_id, genes_fit) for part in entries]

    indptr = np.zeros(len(cell_ids) + 1, np.int64)
    for part in parts:
        indptr[1:] += np.bincount(part.rows, part.lengths, len(cell_ids)).astype(np.int64)
    np.cumsum(indptr, out=indptr)
    # one part with wide words makes all wide
    dtype = np.result_type(np.uint32 if genes_fit else np.uint64, *(part.words for part in parts))
    words: Array = np.empty(indptr[-1], dtype)
    next_place, gene_mask = indptr[:-1].copy(), words.dtype.type(2 ** (4 * words.itemsize) - 1)
    unsorted = False
    for part in parts:
        part_words = part.words if part.words.dtype == dtype else _widen_words(part.words)
        unsorted |= _place_runs(part_words, part.rows, part.lengths, indptr, next_place, words, gene_mask)
    if unsorted:
        cell_of_word = np.repeat(np.arange(len(cell_ids)), np.diff(indptr))
        words = words[np.lexsort((words & gene_mask, cell_of_word))]
    return Chunk(indptr, words)


def _read_through_tiledb(array: soma.SparseNDArray, cell_ids: Int64Array) -> Iterator[Entries]:
    """Yield the entries of these cells of a chunk, and of some others, in the parts in which TileDB returns them."""
    first, last = int(cell_ids[0]), int(cell_ids[-1])
    coordinates: slice | pa.Array = pa.array(cell_ids)
    if len(cell_ids) >= MIN_RANGE_DENSITY * (last - first + 1):
        if last - first >= TILE // 2:
            # Widen the range to the edges of the tile: TileDB copies complete tiles, but tests every entry of a tile
            # that it needs only in part (measured).
            first = first // TILE * TILE
            last = max(last, min(first + TILE, array.shape[0]) - 1)
        coordinates = slice(first, last)
    for table in array.read((coordinates,)).tables():
        for batch in table.to_batches():
            ids, genes, counts = (column.to_numpy() for column in batch.columns)
            yield ids, genes, counts


class _Part(NamedTuple):
    """Packed entries of a part of a chunk, in the order in which they were read.

    A run is a sequence of neighbouring entries of one cell, usually its entries of one tile.

    Attributes:
        words: see `Chunk.words`; genes may descend. Shape (entries,).
        rows: the row of the cell of each run. Shape (runs,).
        lengths: the number of words of each run. Shape (runs,).
    """

    words: Array
    rows: Array
    lengths: Array


def _pack_part(entries: Entries, row_of_id: Array, first_id: int, genes_fit: bool) -> _Part:
    """Pack the entries of the wanted cells, without zeros.

    Args:
        entries: cell ids, genes and counts. Shape (entries,) each.
        row_of_id: row of each cell id from `first_id` on, −1 if it is not wanted, as at both ends.
        first_id: cell id of the first place of `row_of_id`.
        genes_fit: whether all genes of the array fit 16 bits.
    """
    ids, genes, values = entries
    counts = values.astype(np.float32, copy=False)
    rows, starts, stops = (np.empty(len(ids), np.int32) for _ in range(3))
    n_runs = _find_runs(ids, row_of_id, first_id, rows, starts, stops)
    rows, starts, stops = rows[:n_runs].copy(), starts[:n_runs], stops[:n_runs]
    lengths = stops - starts
    words: Array = np.empty(lengths.sum(), np.uint32)
    n_zeros, n_misfits = _pack_words(genes, counts, starts, stops, words)
    if n_zeros:  # rare: a Census stores none, so they are only looked for while packing
        ids, genes, counts = (column[counts != 0] for column in (ids, genes, counts))
        return _pack_part((ids, genes, counts), row_of_id, first_id, genes_fit)
    if n_misfits or not genes_fit:  # rare, too: discard the words and pack again
        wanted = row_of_id[(ids - first_id).clip(0, len(row_of_id) - 1)] >= 0
        words = _pack_wide_words(genes[wanted], counts[wanted])
    return _Part(words, rows, lengths)


def _pack_wide_words(genes: Array, counts: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Return words of 64 bits."""
    return genes.astype(np.uint64) | (counts.view(np.uint32).astype(np.uint64) << np.uint64(32))


def _widen_words(words: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return words of 32 bits as words of 64 bits."""
    return _pack_wide_words(words & _GENE_MASK, (words >> _COUNT_SHIFT).astype(np.float32))


# The inner loops below are short and run over slices from 0 to their length. The compiler vectorises such loops; one
# loop that does several things at once, or one with offsets in its indices, stays scalar and is slower.


@compiled
def _find_runs(ids, row_of_id, first_id, rows, starts, stops):  # type: ignore[no-untyped-def]
    """Fill the row, start and stop of each run of entries of a wanted cell; return the number of runs."""
    n_runs = entry = 0
    while entry < len(ids):
        start, cell = entry, ids[entry]
        while entry < len(ids) and ids[entry] == cell:
            entry += 1
        row = row_of_id[min(max(cell - first_id, 0), len(row_of_id) - 1)]
        if row >= 0:
            rows[n_runs], starts[n_runs], stops[n_runs] = row, start, entry
            n_runs += 1
    return n_runs


@compiled
def _pack_words(genes, counts, starts, stops, words):  # type: ignore[no-untyped-def]
    """Fill words of 32 bits; return the number of counts that are 0, and of those that do not fit 16 bits.

    Neighbouring runs are packed together, as long as their entries stay in the L1 cache for the second pass.
    """
    n_zeros = n_misfits = place = run = 0
    while run < len(starts):
        start = starts[run]
        while run + 1 < len(starts) and starts[run + 1] == stops[run] and stops[run] - start < _ENTRIES_PER_PASS:
            run += 1
        some_genes, some_counts = genes[start : stops[run]], counts[start : stops[run]]
        some_words = words[place : place + len(some_genes)]
        for i in range(len(some_genes)):
            some_words[i] = (np.int32(some_counts[i]) << _COUNT_SHIFT) | np.int32(some_genes[i])
        for i in range(len(some_counts)):
            n_zeros += some_counts[i] == 0
            # every comparison with NaN is false, so NaN is a misfit
            n_misfits += not (
                (some_counts[i] >= 0) & (some_counts[i] <= _MAX_COUNT) & (some_counts[i] == np.floor(some_counts[i]))
            )
        place += len(some_genes)
        run += 1
    return n_zeros, n_misfits


@compiled
def _place_runs(part, rows, lengths, indptr, next_place, words, gene_mask):  # type: ignore[no-untyped-def]
    """Copy each run of a part behind the last one of its cell; return whether genes of a cell do not ascend.

    `next_place` is the place in `words` of the next run of each cell; it is moved on.
    """
    unsorted, start = False, 0
    for run in range(len(rows)):
        run_words, place = part[start : start + lengths[run]], next_place[rows[run]]
        target = words[place : place + len(run_words)]
        target[0] = run_words[0]
        for i in range(1, len(run_words)):
            target[i] = run_words[i]
            unsorted |= (run_words[i] & gene_mask) < (run_words[i - 1] & gene_mask)
        unsorted |= place > indptr[rows[run]] and (run_words[0] & gene_mask) < (words[place - 1] & gene_mask)
        next_place[rows[run]] = place + len(run_words)
        start += len(run_words)
    return unsorted


@compiled
def _unpack_words(indptr, words, rows, starts, genes, counts):  # type: ignore[no-untyped-def]
    """Fill genes and counts of these rows of a chunk, each from its start on, from words of 32 bits."""
    for cell in range(len(rows)):
        row_words, start = words[indptr[rows[cell]] : indptr[rows[cell] + 1]], starts[cell]
        row_genes, row_counts = genes[start : start + len(row_words)], counts[start : start + len(row_words)]
        for i in range(len(row_words)):
            row_genes[i] = row_words[i] & _GENE_MASK
        for i in range(len(row_words)):
            row_counts[i] = row_words[i] >> _COUNT_SHIFT


@compiled
def _unpack_wide_words(indptr, words, rows, starts, genes, counts):  # type: ignore[no-untyped-def]
    """Fill genes and the bits of counts of these rows of a chunk, each from its start on, from words of 64 bits."""
    for cell in range(len(rows)):
        first, start = indptr[rows[cell]], starts[cell]
        for i in range(indptr[rows[cell] + 1] - first):
            genes[start + i] = np.int32(words[first + i] & np.uint64(2**32 - 1))
            counts[start + i] = np.uint32(words[first + i] >> np.uint64(32))
