"""Read the cells of one chunk of a SOMA sparse array, and keep them packed until their rows are needed.

A chunk is an aligned range of 2,048 neighboring cells, one row of tiles of a Census. TileDB returns an entry as 20
bytes: cell id, gene and count. A shuffle window of 65,536 cells with 1,500 entries each would take 2 GB. Each entry
therefore becomes one word of 4 bytes, or of 8 where they do not suffice, and the cell id becomes an offset:

                upper half                      lower half
    uint32      count, integer 1 to 65,535      gene, below 65,536      where all entries of the chunk fit
    uint64      the bits of a float32 count     gene                    otherwise

`read_chunk` works in six steps:

1. Read the entries in parts of some tiles each, natively or through TileDB.
2. Pack each part as soon as it is read, so that the memory of its 20-byte entries is used again for the next part. This
   drops zeros and the entries of cells that are not wanted.
3. Count the entries of each cell over all parts; their running sum is `indptr`.
4. Copy the words of each cell behind one another. They are in several runs, usually one for each tile with the cell.
5. Sort, if genes do not ascend within a cell. That happens only if fragments overlap.
6. Add up the counts of repeated entries of one cell and one gene, as SciPy, anndata and tiledbsoma do. A Census may
   store them, but has none if it was built from valid files.

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

from scgpt_hf.cells.block import CellBlock, CsrArrays, Int64Array, to_float32, to_offsets
from scgpt_hf.cells.compiled import compiled
from scgpt_hf.cells.soma.layout import TILE
from scgpt_hf.cells.soma.native import NativeArray

# If at least this share of the cells in a range is wanted, TileDB reads the complete range faster than a list of cells
# (measured).
MIN_RANGE_DENSITY = 1 / 64

# `_sum_words` adds up counts below 2**16 in 32 bits, of up to this many words at a time, because that is faster.
_WORDS_PER_SUM = 2**16

_TILE_BITS = TILE.bit_length() - 1
_OUT_OF_ORDER = "entries are not in the order in which TileDB stores them"

# Of a word of 32 bits. The largest count is a float32, because compiled code compares a float32 with an int as float64.
_COUNT_SHIFT, _GENE_MASK, _MAX_COUNT = 16, 2**16 - 1, np.float32(2**16 - 1)

Array: TypeAlias = NDArray[Any]
Entries: TypeAlias = tuple[Array, Array, Array]  # cell ids, genes and counts, shape (entries,) each


class Chunk(NamedTuple):
    """Packed counts of some cells of one chunk, by ascending id: cell i has words `indptr[i]:indptr[i + 1]`.

    Attributes:
        indptr: offsets of the cells, int64. Shape (cells + 1,).
        words: gene and count of each entry, genes ascending within a cell, counts not 0. Shape (entries,). uint32 or
            uint64; see the module's docstring.
        n_stored: number of entries of each cell in the array, without zeros but with repeated ones. Shape (cells,).
    """

    indptr: Int64Array
    words: Array
    n_stored: Int64Array

    @property
    def n_repeated(self) -> int:
        """Return the number of entries that were added to another one of the same cell and gene."""
        return int(self.n_stored.sum()) - len(self.words)

    @property
    def has_raw_counts(self) -> bool:
        """Return whether all counts are finite integers above 0."""
        if self.words.dtype == np.uint32:  # only such counts fit 16 bits
            return True
        counts = _counts_of_words(self.words)
        return bool((np.isfinite(counts) & (counts > 0) & (counts == np.floor(counts))).all())

    def sum_counts(self) -> NDArray[np.float64]:
        """Return the sum of the counts of each cell. Shape (cells,)."""
        if self.words.dtype == np.uint32:
            return _sum_words(self.indptr, self.words)  # type: ignore[no-any-return]
        return _sum_rows(self.indptr, _counts_of_words(self.words))  # type: ignore[no-any-return]


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


def read_chunk(array: soma.SparseNDArray | NativeArray, cell_ids: Int64Array, *, n_genes: int | None = None) -> Chunk:
    """Read cells of one chunk and pack their counts.

    Args:
        array: cells by genes.
        cell_ids: cells of one chunk, ascending. Shape (cells,).
        n_genes: number of genes of var; that of the array by default. An array may have room for more.

    Raises:
        ValueError: an entry has no count or a gene that var does not have, or float32 cannot hold its count.
    """
    n_genes = array.shape[1] if n_genes is None else n_genes
    # The row of each cell id, or -1 if the cell is not wanted. The table has one more place at each end, with -1: ids
    # outside the range are clipped to these places, so that every lookup is valid.
    first_id = int(cell_ids[0]) - 1
    row_of_id = np.full(int(cell_ids[-1]) - first_id + 2, -1, dtype=np.int32)
    row_of_id[cell_ids - first_id] = np.arange(len(cell_ids), dtype=np.int32)
    if isinstance(array, NativeArray):
        entries = array.read_entries(int(cell_ids[0]), int(cell_ids[-1]))
    else:
        entries = _read_through_tiledb(array, cell_ids)
    parts = [_pack_part(part, row_of_id, first_id, n_genes, array) for part in entries]

    indptr = np.zeros(len(cell_ids) + 1, np.int64)
    for part in parts:
        indptr[1:] += np.bincount(part.rows, part.lengths, len(cell_ids)).astype(np.int64)
    n_stored = indptr[1:].copy()
    np.cumsum(indptr, out=indptr)
    # one part with wide words makes all wide
    dtype = np.result_type(np.uint32 if n_genes <= 2**16 else np.uint64, *(part.words for part in parts))
    words: Array = np.empty(indptr[-1], dtype)
    next_place, gene_mask = indptr[:-1].copy(), words.dtype.type(2 ** (4 * words.itemsize) - 1)
    ascending = True
    for part in parts:
        part_words = part.words if part.words.dtype == dtype else _widen_words(part.words)
        ascending &= _place_runs(part_words, part.rows, part.lengths, indptr, next_place, words, gene_mask)
    if not ascending:
        for part in parts if isinstance(array, NativeArray) else []:
            _require_ascending_runs(part)
        indptr, words = _join_words(indptr, words, gene_mask, array.uri)
    return Chunk(indptr, words, n_stored)


def _join_words(indptr: Int64Array, words: Array, gene_mask: Any, where: str) -> tuple[Int64Array, Array]:
    """Sort the words of each cell by gene, and add up the counts of a repeated gene; return offsets and words.

    Counts that are not raw are not added up: whoever reads them raises, and must see each of them.
    """
    cells = np.repeat(np.arange(len(indptr) - 1), np.diff(indptr))
    words = words[np.lexsort((words & gene_mask, cells))]
    genes = words & gene_mask
    is_first = np.append(True, (np.diff(genes) != 0) | (np.diff(cells) != 0))
    chunk = Chunk(indptr, words, np.diff(indptr))
    if is_first.all() or not chunk.has_raw_counts:
        return indptr, words
    sums = np.add.reduceat(_counts_of_words(words), np.flatnonzero(is_first), dtype=np.float64)
    counts = to_float32(sums, where)
    indptr = np.concatenate([[0], np.cumsum(is_first)])[indptr]
    wide = _pack_wide_words(genes[is_first], counts)
    if words.dtype == np.uint32 and counts.max() <= _MAX_COUNT:
        return indptr, counts.astype(np.uint32) << _COUNT_SHIFT | genes[is_first]
    return indptr, wide


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
            # by name: an array of another program may have its dimensions in another order, or further attributes
            ids, genes, counts = (batch.column(name) for name in ("soma_dim_0", "soma_dim_1", "soma_data"))
            if counts.null_count:
                raise ValueError(
                    f"{array.uri}: {counts.null_count:,} of {len(counts):,} stored counts are missing (null); expected "
                    "a count for each entry; write the array again without them"
                )
            yield ids.to_numpy(), genes.to_numpy(), counts.to_numpy()


class _Part(NamedTuple):
    """Packed entries of a part of a chunk, in the order in which they were read.

    A run is a sequence of neighboring entries of one cell, usually its entries of one tile.

    Attributes:
        words: see `Chunk.words`; genes may descend. Shape (entries,).
        rows: the row of the cell of each run. Shape (runs,).
        lengths: the number of words of each run. Shape (runs,).
    """

    words: Array
    rows: Array
    lengths: Array


def _pack_part(
    entries: Entries, row_of_id: Array, first_id: int, n_genes: int, array: soma.SparseNDArray | NativeArray
) -> _Part:
    """Pack the entries of the wanted cells, without zeros.

    Args:
        entries: cell ids, genes and counts. Shape (entries,) each.
        row_of_id: row of each cell id from `first_id` on, −1 if it is not wanted, as at both ends.
        first_id: cell id of the first place of `row_of_id`.
        n_genes: number of genes of var.
        array: the array that the entries are from.

    Raises:
        OSError: entries of a native array are not in the order in which TileDB stores them.
        ValueError: see `read_chunk`.
    """
    ids, genes, values = entries
    counts = to_float32(values, array.uri)
    if genes.dtype == np.int64:
        genes = genes.view(np.uint64)  # so that one comparison finds negative genes, too
    rows, starts, stops = (np.empty(len(ids), np.int32) for _ in range(3))
    n_runs, in_order = _find_runs(ids, genes, row_of_id, first_id, rows, starts, stops)
    if isinstance(array, NativeArray) and not in_order:  # TileDB may return entries of several fragments one by one
        raise OSError(_OUT_OF_ORDER)
    rows, starts, stops = rows[:n_runs].copy(), starts[:n_runs], stops[:n_runs]
    lengths = stops - starts
    words: Array = np.empty(lengths.sum(), np.uint32)
    all_fit = _pack_words(genes, counts, starts, stops, words, genes.dtype.type(n_genes))
    if not all_fit or n_genes > 2**16:  # rare: discard the words and look closer
        wanted = row_of_id[(ids - first_id).clip(0, len(row_of_id) - 1)] >= 0
        unknown = genes[wanted & (genes >= n_genes)]
        if len(unknown):
            raise ValueError(
                f"{array.uri}: {len(unknown):,} entries have genes that var does not have, e.g. gene "
                f"{unknown.max():,}; var has {n_genes:,} genes; is the copy complete?"
            )
        if not counts[wanted].all():  # a Census stores no zeros
            ids, genes, counts = (column[counts != 0] for column in (ids, genes, counts))
            return _pack_part((ids, genes, counts), row_of_id, first_id, n_genes, array)
        words = _pack_wide_words(genes[wanted], counts[wanted])
    return _Part(words, rows, lengths)


def _require_ascending_runs(part: _Part) -> None:
    """Raise an OSError if the genes of a run descend, which they do in no fragment."""
    genes = part.words & (_GENE_MASK if part.words.dtype == np.uint32 else np.uint64(2**32 - 1))
    descends = genes[1:] < genes[:-1]
    descends[np.cumsum(part.lengths)[:-1] - 1] = False  # where the next run begins
    if descends.any():
        raise OSError(_OUT_OF_ORDER)


def _pack_wide_words(genes: Array, counts: NDArray[np.float32]) -> NDArray[np.uint64]:
    """Return words of 64 bits."""
    return genes.astype(np.uint64) | (counts.view(np.uint32).astype(np.uint64) << np.uint64(32))


def _widen_words(words: NDArray[np.uint32]) -> NDArray[np.uint64]:
    """Return words of 32 bits as words of 64 bits."""
    return _pack_wide_words(words & _GENE_MASK, (words >> _COUNT_SHIFT).astype(np.float32))


def _counts_of_words(words: Array) -> NDArray[np.float32]:
    """Return the counts of words of 32 or 64 bits."""
    if words.dtype == np.uint32:
        return (words >> _COUNT_SHIFT).astype(np.float32)
    return (words >> np.uint64(32)).astype(np.uint32).view(np.float32)


# The inner loops below are short, keep to values of 32 bits, and run over slices from 0 to their length. The compiler
# vectorizes such loops; one with offsets in its indices stays scalar and is slower.


@compiled
def _find_runs(ids, genes, row_of_id, first_id, rows, starts, stops):  # type: ignore[no-untyped-def]
    """Fill the row, start and stop of each run of entries of a wanted cell.

    Returns:
        The number of runs, and whether all runs are in the order in which TileDB stores the entries of a fragment: by
        row and column of tiles, then by cell, then by gene.
    """
    n_runs = entry = 0
    in_order, cell_before, gene_before = True, np.int64(-1), np.int64(-1)
    while entry < len(ids):
        start, cell = entry, ids[entry]
        while entry < len(ids) and ids[entry] == cell:
            entry += 1
        down = (cell >> _TILE_BITS) - (cell_before >> _TILE_BITS)
        right = (np.int64(genes[start]) >> _TILE_BITS) - (gene_before >> _TILE_BITS)
        in_order &= (down > 0) | ((down == 0) & ((right > 0) | ((right == 0) & (cell > cell_before))))
        cell_before, gene_before = cell, np.int64(genes[entry - 1])
        row = row_of_id[min(max(cell - first_id, 0), len(row_of_id) - 1)]
        if row >= 0:
            rows[n_runs], starts[n_runs], stops[n_runs] = row, start, entry
            n_runs += 1
    return n_runs, in_order


@compiled
def _pack_words(genes, counts, starts, stops, words, n_genes):  # type: ignore[no-untyped-def]
    """Fill words of 32 bits; return whether all counts are integers from 1 to 65,535, and all genes are known.

    Neighboring runs are packed together: a longer loop gains more from being vectorized.
    """
    place = run = 0
    all_fit = True
    while run < len(starts):
        start = starts[run]
        while run + 1 < len(starts) and starts[run + 1] == stops[run]:
            run += 1
        some_genes, some_counts = genes[start : stops[run]], counts[start : stops[run]]
        some_words = words[place : place + len(some_genes)]
        misfit = False
        for i in range(len(some_genes)):
            gene, count = some_genes[i], some_counts[i]
            some_words[i] = (np.int32(count) << _COUNT_SHIFT) | np.int32(gene)
            # every comparison with NaN is false, so NaN is a misfit
            fits = (count > np.float32(0)) & (count <= _MAX_COUNT) & (count == np.floor(count)) & (gene < n_genes)
            misfit |= not fits
        all_fit &= not misfit
        place += len(some_genes)
        run += 1
    return all_fit


@compiled
def _place_runs(part, rows, lengths, indptr, next_place, words, gene_mask):  # type: ignore[no-untyped-def]
    """Copy each run of a part behind the last one of its cell; return whether the genes of each cell ascend.

    They do not if a gene is repeated. `next_place` is the place in `words` of the next run of each cell; it is moved
    on.
    """
    descending, start = False, 0
    for run in range(len(rows)):
        run_words, place = part[start : start + lengths[run]], next_place[rows[run]]
        target = words[place : place + len(run_words)]
        target[0] = run_words[0]
        for i in range(1, len(run_words)):
            target[i] = run_words[i]
            descending |= (run_words[i] & gene_mask) <= (run_words[i - 1] & gene_mask)
        descending |= place > indptr[rows[run]] and (run_words[0] & gene_mask) <= (words[place - 1] & gene_mask)
        next_place[rows[run]] = place + len(run_words)
        start += len(run_words)
    return not descending


@compiled
def _sum_words(indptr, words):  # type: ignore[no-untyped-def]
    """Return the sum of the counts of each cell from words of 32 bits."""
    sums = np.zeros(len(indptr) - 1, np.float64)
    for cell in range(len(sums)):
        row_words = words[indptr[cell] : indptr[cell + 1]]
        for start in range(0, len(row_words), _WORDS_PER_SUM):
            some_words, part = row_words[start : start + _WORDS_PER_SUM], np.uint32(0)
            for i in range(len(some_words)):
                part += some_words[i] >> np.uint32(_COUNT_SHIFT)
            sums[cell] += part
    return sums


@compiled
def _sum_rows(indptr, counts):  # type: ignore[no-untyped-def]
    """Return the sum of the counts of each cell from float32 counts."""
    sums = np.zeros(len(indptr) - 1, np.float64)
    for cell in range(len(sums)):
        for count in counts[indptr[cell] : indptr[cell + 1]]:
            sums[cell] += count
    return sums


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
