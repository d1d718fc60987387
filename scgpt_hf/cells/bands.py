"""Rows of a SOMA sparse array, a band of 2,048 at a time, kept small until they are asked for.

Decides how the entries of a band are read, put into order and kept: in two or four bytes each where they fit. A block
stays in its bands; `Bands.gather` makes the matrix of a few of its cells. `census.py` says which band is read by which
thread. The loops over entries are compiled and release the GIL, so that threads read at the same time.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import tiledbsoma as soma
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import Int64Array, sorted_csr

# Wanted cells per cell of the range they span, from which on reading the whole range is faster (measured).
DENSE = 1 / 64

Array: TypeAlias = NDArray[Any]


class Band(NamedTuple):
    """Some cells of one band, by ascending id: cell i holds entries `indptr[i]:indptr[i + 1]`.

    Attributes:
        indptr: int64 (cells + 1,).
        genes: columns, uint16 where all of the array's fit, else int32 (entries,).
        counts: not zero; uint16 where all of the band's are whole and fit, else float32 (entries,).
    """

    indptr: Int64Array
    genes: Array
    counts: Array

    @property
    def raw(self) -> bool:
        """Whether all counts are whole, finite and > 0."""
        counts = self.counts
        fit = counts.dtype.kind == "u"
        return fit or bool((np.isfinite(counts) & (counts > 0) & (counts == np.floor(counts))).all())


class Bands:
    """The cells of many bands, in the order they were asked for.

    Args:
        bands: as read.
        places: the position of each cell of each band.
        n_genes: columns of a matrix.
    """

    def __init__(self, bands: Sequence[Band], places: Sequence[Int64Array], n_genes: int) -> None:
        n_cells = sum(map(len, places))
        self._bands, self._n_genes = bands, n_genes
        self._band, self._row, self._length = (np.empty(n_cells, np.int64) for _ in range(3))
        for number, (band, cells) in enumerate(zip(bands, places, strict=True)):
            self._band[cells], self._row[cells], self._length[cells] = number, range(len(cells)), np.diff(band.indptr)

    def gather(self, cells: Int64Array) -> csr_matrix:
        """Return the cells at these positions, in this order: float32 (cells, genes), genes ascending."""
        indptr = np.concatenate([[0], np.cumsum(self._length[cells])])
        genes, counts = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
        order = np.argsort(self._band[cells], kind="stable")
        for part in np.split(order, np.flatnonzero(np.diff(self._band[cells[order]])) + 1) if len(cells) else []:
            band = self._bands[self._band[cells[part[0]]]]
            _copy_rows(band.indptr, band.genes, band.counts, self._row[cells[part]], indptr[part], genes, counts)
        return sorted_csr(indptr, genes, counts, self._n_genes)


def read_band(array: soma.SparseNDArray, cell_ids: Int64Array) -> Band:
    """Return cells of one band, given by ascending id."""
    first, last = int(cell_ids[0]), int(cell_ids[-1])
    whole = len(cell_ids) >= DENSE * (last - first + 1)
    row_of_id = np.full(last - first + 1, -1, dtype=np.int32)
    row_of_id[cell_ids - first] = np.arange(len(cell_ids), dtype=np.int32)
    gene_type = np.uint16 if array.shape[1] <= 2**16 else np.int32
    parts = [  # each is made small at once, so that its memory serves for the next
        _shrink([column.to_numpy() for column in batch.columns], first, row_of_id, gene_type)
        for table in array.read((slice(first, last) if whole else pa.array(cell_ids),)).tables()
        for batch in table.to_batches()
    ]
    indptr = np.zeros(len(cell_ids) + 1, np.int64)
    for _, _, rows, ends in parts:
        np.add.at(indptr, rows + 1, np.diff(ends, prepend=0))
    np.cumsum(indptr, out=indptr)
    genes = np.empty(indptr[-1], gene_type)
    counts = np.empty(indptr[-1], np.result_type(np.uint16, *(part[1] for part in parts)))
    cursor = indptr[:-1].copy()
    for part_genes, part_counts, rows, ends in parts:
        _place_runs(part_genes, part_counts, rows, ends, cursor, genes, counts)
    if not _ascend(indptr, genes):  # the fragments of the array came out of order
        order = np.lexsort((genes, np.repeat(np.arange(len(cell_ids)), np.diff(indptr))))
        genes, counts = genes[order], counts[order]
    return Band(indptr, genes, counts)


def _shrink(entries: Sequence[Array], first: int, row_of_id: Array, gene_type: Any) -> tuple[Array, ...]:
    """Return the wanted entries of a part of a band as they lie: genes, counts, and each run's row and end."""
    ids, columns, values = entries
    n = len(ids)
    genes, rows, ends = np.empty(n, gene_type), np.empty(n, np.int32), np.empty(n, np.int64)
    for count_type in (np.uint16, np.float32):
        counts = np.empty(n, count_type)
        n_kept, n_runs, fit = _keep_wanted(ids, columns, values, first, row_of_id, genes, counts, rows, ends)
        if fit:
            break
    return genes[:n_kept], counts[:n_kept], rows[:n_runs].copy(), ends[:n_runs].copy()


@njit(nogil=True, cache=True)
def _keep_wanted(ids, columns, values, first, row_of_id, genes, counts, rows, ends):  # type: ignore[no-untyped-def]
    """Fill genes and counts, rows and ends of runs; return how many there are of each, and whether uint16 holds all.

    Here and below loops run over slices from 0, which the compiler turns into a few instructions for many entries.
    """
    n_kept, n_runs, n_misfits, entry = 0, 0, 0, 0
    while entry < len(ids):
        begin, cell = entry, ids[entry]
        while entry < len(ids) and ids[entry] == cell:  # entries of one cell lie together, a tile's worth
            entry += 1
        n, row = entry - begin, row_of_id[cell - first]
        if row < 0:
            continue
        _copy(columns[begin:entry], genes[n_kept : n_kept + n])
        from_values, to_counts, n_zeros = values[begin:entry], counts[n_kept : n_kept + n], 0
        for i in range(n):
            count = np.float32(from_values[i])
            to_counts[i] = count
            n_zeros += count == 0
            n_misfits += not ((count >= 0) & (count <= 65535) & (count == np.floor(count)))  # NaN compares false
        if n_zeros:
            n = _drop_zeros(genes[n_kept : n_kept + n], to_counts)
        if n:
            n_kept += n
            rows[n_runs], ends[n_runs] = row, n_kept
            n_runs += 1
    return n_kept, n_runs, n_misfits == 0


@njit(nogil=True, cache=True)
def _drop_zeros(genes, counts):  # type: ignore[no-untyped-def]
    """Close the gaps that stored zeros leave, and return how many entries there are."""
    n = 0
    for i in range(len(counts)):
        if counts[i] != 0:
            genes[n], counts[n] = genes[i], counts[i]
            n += 1
    return n


@njit(nogil=True, cache=True)
def _place_runs(from_genes, from_counts, rows, ends, cursor, genes, counts):  # type: ignore[no-untyped-def]
    """Copy each run behind the last one of its cell."""
    start = 0
    for run in range(len(rows)):
        stop, place = ends[run], cursor[rows[run]]
        _copy(from_genes[start:stop], genes[place : place + stop - start])
        _copy(from_counts[start:stop], counts[place : place + stop - start])
        cursor[rows[run]] += stop - start
        start = stop


@njit(nogil=True, cache=True)
def _ascend(indptr, genes):  # type: ignore[no-untyped-def]
    """Return whether the genes of every cell ascend."""
    n_descents = 0
    for cell in range(len(indptr) - 1):
        of_cell = genes[indptr[cell] : indptr[cell + 1]]
        for entry in range(1, len(of_cell)):
            n_descents += of_cell[entry] < of_cell[entry - 1]
    return n_descents == 0


@njit(nogil=True, cache=True)
def _copy_rows(indptr, from_genes, from_counts, rows, starts, genes, counts):  # type: ignore[no-untyped-def]
    """Copy rows of a band, widened, to where each starts in the result."""
    for cell in range(len(rows)):
        first, stop, start = indptr[rows[cell]], indptr[rows[cell] + 1], starts[cell]
        _copy(from_genes[first:stop], genes[start : start + stop - first])
        _copy(from_counts[first:stop], counts[start : start + stop - first])


@njit(nogil=True, cache=True)
def _copy(these, there):  # type: ignore[no-untyped-def]
    for i in range(len(these)):
        there[i] = these[i]
