"""Rows of a SOMA sparse array, a chunk of 2,048 at a time, kept small until they are asked for.

Decides how the entries of a chunk are read, put into order and kept: in one word each, of four bytes where they fit.
`ChunkedBlock` keeps its chunks and unpacks the rows of a few of its cells. `census.py` says which thread reads a chunk.
The loops over entries are compiled and release the GIL, so that threads read at the same time.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pandas as pd
import pyarrow as pa
import tiledbsoma as soma
from numba import njit
from numpy.typing import NDArray

from scgpt_hf.cells.block import CellBlock, CsrArrays, Int64Array
from scgpt_hf.cells.soma.layout import TILE
from scgpt_hf.cells.soma.native.fragments import PlainArray
from scgpt_hf.cells.soma.native.tiles import read_entries

# Wanted cells per cell of the range they span, from which on reading the whole range is faster (measured).
DENSE = 1 / 64

_LOOKED_AT_TWICE = 2048  # entries, 32 KiB: more of them would leave the nearest cache between the two looks

_HALF, _LOW = 16, 2**16 - 1  # of a word of 32 bits: where the count begins; what masks the gene

Array: TypeAlias = NDArray[Any]


class Chunk(NamedTuple):
    """Some cells of one chunk, by ascending id: cell i holds entries `indptr[i]:indptr[i + 1]`.

    Attributes:
        indptr: int64 (cells + 1,).
        words: of each entry, its gene in the lower half and its count, which is not 0, in the upper one (entries,).
            uint32 where all are whole and fit 16 bits; else uint64, and counts are the bits of a float32.
    """

    indptr: Int64Array
    words: Array

    @property
    def raw(self) -> bool:
        """Whether all counts are whole, finite and > 0."""
        if self.words.dtype == np.uint32:
            return True
        counts = (self.words >> np.uint64(32)).astype(np.uint32).view(np.float32)
        return bool((np.isfinite(counts) & (counts > 0) & (counts == np.floor(counts))).all())


class ChunkedBlock(CellBlock):
    """A block whose counts stay packed in chunks until its rows are needed."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        places: Sequence[Int64Array],
        obs: pd.DataFrame,
        cell_ids: Int64Array,
        *,
        n_genes: int,
    ) -> None:
        """Create a block of cells in any order.

        Args:
            chunks: as read.
            places: for each chunk, the position in the block of each of its cells.
            obs: obs columns of the block, indexed by cell id. Shape (cells, columns).
            cell_ids: the ids of the cells. Shape (cells,).
            n_genes: number of columns of the matrix.
        """
        super().__init__(None, obs, cell_ids, n_genes=n_genes)
        n_cells, self._chunks = len(cell_ids), chunks
        narrow = all(chunk.words.dtype == np.uint32 for chunk in chunks)
        self._kinds = (np.uint16, np.uint16) if narrow else (np.int32, np.float32)
        self._chunk_of_cell, self._row, self._length = (np.empty(n_cells, np.int64) for _ in range(3))
        for number, (chunk, cells) in enumerate(zip(chunks, places, strict=True)):
            self._chunk_of_cell[cells], self._row[cells] = number, range(len(cells))
            self._length[cells] = np.diff(chunk.indptr)

    def _gather(self, positions: Int64Array) -> CsrArrays:
        indptr = np.concatenate([[0], np.cumsum(self._length[positions])])
        genes, counts = (np.empty(indptr[-1], kind) for kind in self._kinds)
        chunk_of_cell = self._chunk_of_cell[positions]
        order = np.argsort(chunk_of_cell, kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(chunk_of_cell[order])) + 1) if len(order) else []:
            chunk = self._chunks[chunk_of_cell[part[0]]]
            unpack, into = (
                (_unpack, counts) if chunk.words.dtype == np.uint32 else (_unpack_wide, counts.view(np.uint32))
            )
            unpack(chunk.indptr, chunk.words, self._row[positions[part]], indptr[part], genes, into)
        return counts, genes, indptr


def read_chunk(array: soma.SparseNDArray | PlainArray, cell_ids: Int64Array) -> Chunk:
    """Return cells of one chunk, given by ascending id."""
    first, last = int(cell_ids[0]) - 1, int(cell_ids[-1]) + 1  # not wanted; they stand for all cells beyond, too
    row_of_id = np.full(last - first + 1, -1, dtype=np.int32)
    row_of_id[cell_ids - first] = np.arange(len(cell_ids), dtype=np.int32)
    narrow, indptr = array.shape[1] <= 2**16, np.zeros(len(cell_ids) + 1, np.int64)
    entries = read_entries(array, first + 1, last - 1) if isinstance(array, PlainArray) else _ask(array, cell_ids)
    # each part is made small at once, so that its memory serves for the next
    parts = [_shrink(some, row_of_id, first, narrow) for some in entries]
    for _, rows, lengths in parts:
        indptr[1:] += np.bincount(rows, lengths, len(cell_ids)).astype(np.int64)
    np.cumsum(indptr, out=indptr)
    kind = np.result_type(np.uint32 if narrow else np.uint64, *(part for part, _, _ in parts))
    words: Array = np.empty(indptr[-1], kind)
    cursor, low = indptr[:-1].copy(), words.dtype.type(2 ** (4 * words.itemsize) - 1)
    descends = False
    for part, rows, lengths in parts:
        same = part if part.dtype == words.dtype else _widen(part & _LOW, (part >> _HALF).astype(np.float32))
        descends |= _place_runs(same, rows, lengths, indptr, cursor, words, low)
    if descends:  # the fragments of the array came out of order
        words = words[np.lexsort((words & low, np.repeat(np.arange(len(cell_ids)), np.diff(indptr))))]
    return Chunk(indptr, words)


def _ask(array: soma.SparseNDArray, cell_ids: Int64Array) -> Iterator[list[Array]]:
    """Yield cell ids, genes and counts of these cells of a chunk and of some others, as TileDB has them ready."""
    first, last = int(cell_ids[0]), int(cell_ids[-1])
    whole = len(cell_ids) >= DENSE * (last - first + 1)
    if whole and last - first >= TILE // 2:  # to the edges: of a tile in part TileDB looks at every entry (measured)
        first = first // TILE * TILE
        last = max(last, min(first + TILE, array.shape[0]) - 1)
    for table in array.read((slice(first, last) if whole else pa.array(cell_ids),)).tables():
        for batch in table.to_batches():
            yield [column.to_numpy() for column in batch.columns]


def _shrink(entries: Sequence[Array], row_of_id: Array, first: int, narrow: bool) -> tuple[Array, Array, Array]:
    """Return the words of the wanted cells of a part of a chunk as they lie there, and the runs that they are in.

    Args:
        entries: cell ids, genes and counts. Shape (entries,) each.
        row_of_id: the row of each cell of the chunk, −1 if it is not wanted. Shape (last id − first + 1,). The first
            and the last are not wanted, and stand for all cells beyond.
        first: id of the first cell.
        narrow: whether genes fit 16 bits.

    Returns:
        Words, see `Chunk.words`; the row and the number of words of each run, shape (runs,).
    """
    ids, genes, values = entries
    counts = values.astype(np.float32, copy=False)
    rows, begins, ends = (np.empty(len(ids), np.int32) for _ in range(3))
    n_runs = _find_runs(ids, row_of_id, first, rows, begins, ends)
    rows, begins, ends = rows[:n_runs].copy(), begins[:n_runs], ends[:n_runs]
    lengths = ends - begins
    words: Array = np.empty(lengths.sum(), np.uint32)
    n_zeros, n_misfits = _pack(genes, counts, begins, ends, words)
    if n_zeros:
        return _shrink([column[counts != 0] for column in entries], row_of_id, first, narrow)
    if n_misfits or not narrow:
        wanted = row_of_id[(ids - first).clip(0, len(row_of_id) - 1)] >= 0
        words = _widen(genes[wanted], counts[wanted])
    return words, rows, lengths


def _widen(genes: Array, counts: Array) -> Array:
    """Return words of 64 bits; see `Chunk`."""
    return genes.astype(np.uint64) | (counts.view(np.uint32).astype(np.uint64) << np.uint64(32))


@njit(nogil=True, cache=True)
def _find_runs(ids, row_of_id, first, rows, begins, ends):  # type: ignore[no-untyped-def]
    """Fill the row, begin and end of each run of entries of one wanted cell, a tile's worth; return how many."""
    n_runs = entry = 0
    while entry < len(ids):
        begin, cell = entry, ids[entry]
        while entry < len(ids) and ids[entry] == cell:
            entry += 1
        row = row_of_id[min(max(cell - first, 0), len(row_of_id) - 1)]
        if row >= 0:
            rows[n_runs], begins[n_runs], ends[n_runs] = row, begin, entry
            n_runs += 1
    return n_runs


@njit(nogil=True, cache=True)
def _pack(genes, counts, begins, ends, words):  # type: ignore[no-untyped-def]
    """Fill words of 32 bits; return how many counts are 0, and how many do not fit. Of NaN, every comparison is false.

    Runs that lie side by side are taken together, as many as stay in the core's own memory while they are looked at
    again. Here and below loops are short and run over slices from 0: the compiler then takes many entries at once.
    """
    n_zeros = n_misfits = place = run = 0
    while run < len(begins):
        begin = begins[run]
        while run + 1 < len(begins) and begins[run + 1] == ends[run] and ends[run] - begin < _LOOKED_AT_TWICE:
            run += 1
        some_genes, some_counts = genes[begin : ends[run]], counts[begin : ends[run]]
        some_words = words[place : place + len(some_genes)]
        for i in range(len(some_genes)):
            some_words[i] = (np.int32(some_counts[i]) << _HALF) | np.int32(some_genes[i])
        for i in range(len(some_counts)):
            n_zeros += some_counts[i] == 0
            n_misfits += not (
                (some_counts[i] >= 0) & (some_counts[i] <= _LOW) & (some_counts[i] == np.floor(some_counts[i]))
            )
        place += len(some_genes)
        run += 1
    return n_zeros, n_misfits


@njit(nogil=True, cache=True)
def _place_runs(part, rows, lengths, indptr, cursor, words, low):  # type: ignore[no-untyped-def]
    """Copy each run behind the last one of its cell; return whether a gene is below the one before it in its cell."""
    descends, begin = False, 0
    for run in range(len(rows)):
        these, place = part[begin : begin + lengths[run]], cursor[rows[run]]
        there = words[place : place + len(these)]
        there[0] = these[0]
        for i in range(1, len(these)):
            there[i] = these[i]
            descends |= (these[i] & low) < (these[i - 1] & low)
        descends |= place > indptr[rows[run]] and (these[0] & low) < (words[place - 1] & low)
        cursor[rows[run]] = place + len(these)
        begin += len(these)
    return descends


@njit(nogil=True, cache=True)
def _unpack(indptr, words, rows, starts, genes, counts):  # type: ignore[no-untyped-def]
    """Fill genes and counts of rows of a chunk from where each starts in the result."""
    for cell in range(len(rows)):
        these, start = words[indptr[rows[cell]] : indptr[rows[cell] + 1]], starts[cell]
        to_genes, to_counts = genes[start : start + len(these)], counts[start : start + len(these)]
        for i in range(len(these)):
            to_genes[i] = these[i] & _LOW
        for i in range(len(these)):
            to_counts[i] = these[i] >> _HALF


@njit(nogil=True, cache=True)
def _unpack_wide(indptr, words, rows, starts, genes, counts):  # type: ignore[no-untyped-def]
    """Fill genes and the bits of counts from words of 64 bits; see `_unpack`."""
    for cell in range(len(rows)):
        first, start = indptr[rows[cell]], starts[cell]
        for i in range(indptr[rows[cell] + 1] - first):
            genes[start + i] = np.int32(words[first + i] & np.uint64(2**32 - 1))
            counts[start + i] = np.uint32(words[first + i] >> np.uint64(32))
