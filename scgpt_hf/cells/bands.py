"""Rows of a SOMA sparse array, a band of 2,048 at a time.

Decides how the entries of a band are read and put into order; `census.py` says which band is read by which thread. The
loops over entries are compiled and release the GIL, so that threads read at the same time.
"""

from collections.abc import Sequence
from concurrent.futures import Executor
from typing import NamedTuple, TypeAlias

import numpy as np
import pyarrow as pa
import tiledbsoma as soma
from numba import njit
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import Int64Array

DENSE = (
    1 / 64
)  # wanted cells per cell of the range they span, from which on reading the whole range is faster (measured)

Float32Array: TypeAlias = NDArray[np.float32]
Int32Array: TypeAlias = NDArray[np.int32]


class Band(NamedTuple):
    """Some cells of one band, by ascending id: cell i holds entries `indptr[i]:indptr[i + 1]`.

    `raw` says whether all counts are what `require_counts` accepts; found on the way, it costs nothing to read.
    """

    indptr: Int64Array
    genes: Int32Array
    counts: Float32Array
    raw: bool


def read_band(array: soma.SparseNDArray, cell_ids: Int64Array) -> Band:
    """Return cells of one band, given by ascending id."""
    first, last = int(cell_ids[0]), int(cell_ids[-1])
    whole = len(cell_ids) >= DENSE * (last - first + 1)
    tables = list(array.read((slice(first, last) if whole else pa.array(cell_ids),)).tables())
    row_of_id = np.full(last - first + 1, -1, dtype=np.int32)
    row_of_id[cell_ids - first] = np.arange(len(cell_ids), dtype=np.int32)
    entries = [[column.to_numpy() for column in batch.columns] for table in tables for batch in table.to_batches()]
    indptr = np.zeros(len(cell_ids) + 1, dtype=np.int64)
    for ids, _, counts in entries:
        _count_entries(ids, counts, first, row_of_id, indptr[1:])
    np.cumsum(indptr, out=indptr)
    genes, values, cursor = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32), indptr[:-1].copy()
    n_wrong = 0
    for ids, columns, counts in entries:
        n_wrong += _scatter_entries(ids, columns, counts, first, row_of_id, cursor, genes, values)
    if not _ascend(indptr, genes):  # the fragments of the array came out of order
        rows = csr_matrix((values, genes, indptr), shape=(len(cell_ids), int(genes.max()) + 1), copy=False)
        rows.sort_indices()
        genes, values = rows.indices, rows.data
    return Band(indptr, genes, values, raw=n_wrong == 0)


def gather_bands(bands: list[Band], places: Sequence[Int64Array], n_genes: int, pool: Executor) -> csr_matrix:
    """Return the cells of all bands as one matrix; cell i of band b becomes row `places[b][i]`.

    Empties the list: each band is freed when it is copied, so that a block is not held twice.
    """
    indptr = np.zeros(sum(map(len, places)) + 1, dtype=np.int64)
    for band, rows in zip(bands, places, strict=True):
        indptr[rows + 1] = np.diff(band.indptr)
    np.cumsum(indptr, out=indptr)
    genes, values = np.empty(indptr[-1], np.int32), np.empty(indptr[-1], np.float32)
    bands.reverse()
    copies = [pool.submit(_copy_rows, *bands.pop()[:3], rows, indptr, genes, values) for rows in places]
    for copy in copies:
        copy.result()
    if indptr[-1] <= np.iinfo(np.int32).max:  # scipy wants both index arrays of one type
        indptr = indptr.astype(np.int32)
    counts = csr_matrix((values, genes, indptr), shape=(len(indptr) - 1, n_genes), copy=False)
    counts.has_sorted_indices = True  # every band is; scipy would look at all of them
    return counts


@njit(nogil=True, cache=True)
def _count_entries(ids, counts, first, row_of_id, lengths):  # type: ignore[no-untyped-def]
    """Add to each wanted cell's length the number of its entries."""
    for entry in range(len(ids)):
        row = row_of_id[ids[entry] - first]
        if row >= 0 and counts[entry] != 0:
            lengths[row] += 1


@njit(nogil=True, cache=True)
def _scatter_entries(ids, columns, counts, first, row_of_id, cursor, genes, values):  # type: ignore[no-untyped-def]
    """Write each wanted entry behind the last one of its cell, in order; return how many are no raw counts."""
    n_wrong, last, row, place = 0, np.int64(-1), np.int32(-1), np.int64(0)
    for entry in range(len(ids)):
        if ids[entry] != last:  # entries of one cell lie together, a tile's worth
            if row >= 0:
                cursor[row] = place
            last = ids[entry]
            row = row_of_id[last - first]
            place = cursor[row]
        count = np.float32(counts[entry])
        if row >= 0 and count != 0:
            genes[np.uint64(place)], values[np.uint64(place)] = columns[entry], count
            place += 1
            n_wrong += (count < 0) | (count - np.floor(count) != 0)  # NaN and infinity: NaN != 0
    if row >= 0:
        cursor[row] = place
    return n_wrong


@njit(nogil=True, cache=True)
def _ascend(indptr, genes):  # type: ignore[no-untyped-def]
    """Return whether the genes of every cell ascend."""
    n_descents = 0
    for cell in range(len(indptr) - 1):
        for entry in range(indptr[cell] + 1, indptr[cell + 1]):
            n_descents += genes[entry] < genes[entry - 1]
    return n_descents == 0


@njit(nogil=True, cache=True)
def _copy_rows(from_indptr, from_genes, from_values, rows, indptr, genes, values):  # type: ignore[no-untyped-def]
    """Copy each cell of a band to its row of the result."""
    for cell in range(len(rows)):
        start, stop, place = from_indptr[cell], from_indptr[cell + 1], indptr[rows[cell]]
        for entry in range(start, stop):
            genes[place + entry - start] = from_genes[entry]
            values[place + entry - start] = from_values[entry]
