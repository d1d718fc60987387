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
    indptr = np.zeros(len(cell_ids) + 1, np.int64)
    parts = [  # each is made small at once, so that its memory serves for the next
        _shrink([column.to_numpy() for column in batch.columns], row_of_id, first, gene_type, indptr[1:])
        for table in array.read((slice(first, last) if whole else pa.array(cell_ids),)).tables()
        for batch in table.to_batches()
    ]
    np.cumsum(indptr, out=indptr)
    genes = np.empty(indptr[-1], gene_type)
    counts = np.empty(indptr[-1], np.result_type(np.uint16, *(part[1] for part in parts)))
    cursor, n_descents = indptr[:-1].copy(), 0
    for part_genes, part_counts, runs in parts:
        n_descents += _place_runs(part_genes, part_counts, *runs, indptr, cursor, genes, counts)
    if n_descents:  # the fragments of the array came out of order
        order = np.lexsort((genes, np.repeat(np.arange(len(cell_ids)), np.diff(indptr))))
        genes, counts = genes[order], counts[order]
    return Band(indptr, genes, counts)


def _shrink(
    entries: Sequence[Array], row_of_id: Array, first: int, gene_type: Any, lengths: Int64Array
) -> tuple[Array, Array, tuple[Array, Array, Array]]:
    """Return the entries of a part of a band as they lie: genes, counts, and where its runs of wanted cells are.

    Args:
        entries: cell ids, genes and counts. Shape (entries,) each.
        row_of_id: the row of each cell of the band, −1 if it is not wanted. Shape (last id − first + 1,).
        first: id of the first cell.
        gene_type: of the genes.
        lengths: of the cells, to which those of the runs are added. Shape (rows,).

    Returns:
        Genes and counts, shape (entries,); the row, begin and end of each run, shape (runs,).
    """
    ids, columns, values = entries
    values = values.astype(np.float32, copy=False)
    counts: Array = np.empty(len(values), np.uint16)
    n_zeros, n_misfits = _narrow(values, counts)
    if n_zeros:
        return _shrink([column[values != 0] for column in entries], row_of_id, first, gene_type, lengths)
    if n_misfits:
        counts = values.copy()  # Arrow's memory is the next part's
    rows, begins, ends = (np.empty(len(ids), np.int32) for _ in range(3))
    n_runs = _find_runs(ids, row_of_id, first, lengths, rows, begins, ends)
    return columns.astype(gene_type), counts, (rows[:n_runs].copy(), begins[:n_runs].copy(), ends[:n_runs].copy())


@njit(nogil=True, cache=True)
def _narrow(values, counts):  # type: ignore[no-untyped-def]
    """Fill the values in 16 bits; return how many are 0, and how many do not fit. Of NaN, every comparison is false.

    Here and below loops are short and run over slices from 0: the compiler then takes many entries at once.
    """
    n_zeros = n_misfits = 0
    for i in range(len(values)):
        counts[i] = np.int32(values[i])
        n_zeros += values[i] == 0
        n_misfits += not ((values[i] >= 0) & (values[i] <= 65535) & (values[i] == np.floor(values[i])))
    return n_zeros, n_misfits


@njit(nogil=True, cache=True)
def _find_runs(ids, row_of_id, first, lengths, rows, begins, ends):  # type: ignore[no-untyped-def]
    """Fill the row, begin and end of each run of entries of one wanted cell, a tile's worth; return how many."""
    n_runs = entry = 0
    while entry < len(ids):
        begin, cell = entry, ids[entry]
        while entry < len(ids) and ids[entry] == cell:
            entry += 1
        row = row_of_id[cell - first]
        if row >= 0:
            rows[n_runs], begins[n_runs], ends[n_runs] = row, begin, entry
            lengths[row] += entry - begin
            n_runs += 1
    return n_runs


@njit(nogil=True, cache=True)
def _place_runs(from_genes, from_counts, rows, begins, ends, indptr, cursor, genes, counts):  # type: ignore[no-untyped-def]
    """Copy each run behind the last one of its cell, and return how often a gene of a cell is below the one before."""
    n_descents = 0
    for run in range(len(rows)):
        start, stop, place = begins[run], ends[run], cursor[rows[run]]
        run_genes = from_genes[start:stop]
        _copy(run_genes, genes[place : place + stop - start])
        _copy(from_counts[start:stop], counts[place : place + stop - start])
        for i in range(1, len(run_genes)):
            n_descents += run_genes[i] < run_genes[i - 1]
        if place > indptr[rows[run]]:
            n_descents += genes[place] < genes[place - 1]
        cursor[rows[run]] += stop - start
    return n_descents


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
