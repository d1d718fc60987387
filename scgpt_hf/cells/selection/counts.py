"""Sums of counts over cells, streamed: genes per cell, counts per gene, and what highly variable genes need.

All functions go through `stream_blocks`, so memory holds a few chunks of cells at a time, however many cells there are.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import CHUNK_SIZE, CellBlock, Float64Array, Int64Array, to_offsets
from scgpt_hf.progress_bar import progress_bar

if TYPE_CHECKING:
    from scgpt_hf.cells.source import CellSource


# Four chunks, because a source reads four at once. They take 100 MB with 1,500 expressed genes per cell.
_CELLS_PER_READ = 4 * CHUNK_SIZE


def stream_blocks(source: "CellSource", cell_ids: Int64Array, description: str) -> Iterator[CellBlock]:
    """Yield the cells in ascending order, up to four chunks of them at a time.

    Args:
        source: where to read the cells.
        cell_ids: cells to read, in any order. Shape (cells,).
        description: title of the progress bar, which is shown after two seconds.
    """
    cells = np.sort(cell_ids)
    start = 0
    with progress_bar(total=len(cells), description=description, unit="cells") as bar:
        while start < len(cells):
            stop = min(start + _CELLS_PER_READ, len(cells))
            if stop < len(cells):
                # Stop where a chunk starts: to read a part of a chunk costs as much as all of it.
                stop = int(np.searchsorted(cells, cells[stop] // CHUNK_SIZE * CHUNK_SIZE))
            yield source.read(cells[start:stop])
            bar.update(stop - start)
            start = stop


def genes_per_cell(source: "CellSource", cell_ids: Int64Array, genes: Int64Array | None = None) -> Int64Array:
    """Count the genes that each cell expresses.

    Args:
        source: where to read the cells.
        cell_ids: cells to count in, ascending. Shape (cells,).
        genes: columns of the genes to count; by default all. Shape (genes,).

    Returns:
        Number of expressed genes, shape (cells,).
    """
    counted = np.ones(len(source.genes), np.bool_)
    if genes is not None:
        counted[:] = False
        counted[genes] = True
    n_genes = [np.empty(0, np.int64)]
    for block in stream_blocks(source, cell_ids, "counting expressed genes"):
        n_before = to_offsets(counted[block.indices])  # (entries + 1,)
        n_genes.append(np.diff(n_before[block.indptr]))
    return np.concatenate(n_genes)


def counts_per_gene(source: "CellSource", cell_ids: Int64Array) -> Int64Array:
    """Sum the counts of each gene over the cells.

    Args:
        source: where to read the cells.
        cell_ids: cells to sum over, in any order. Shape (cells,).

    Returns:
        Total counts, shape (genes,).
    """
    # Not float32, the type of the counts: it represents whole numbers exactly only up to 16,777,216.
    totals = np.zeros(len(source.genes), np.float64)
    for block in stream_blocks(source, cell_ids, "counting genes"):
        totals += np.bincount(block.indices, block.data, minlength=len(totals))
    return totals.astype(np.int64)


def sums_per_batch(
    source: "CellSource",
    cell_ids: Int64Array,
    genes: Int64Array,
    batch_of_cell: Int64Array,
    clip: Float64Array | None = None,
) -> Float64Array:
    """Sum the counts and the squared counts of each gene over the cells of each experimental batch.

    Args:
        source: where to read the cells.
        cell_ids: cells to sum over, ascending. Shape (cells,).
        genes: columns of the genes. Shape (genes,).
        batch_of_cell: number of each cell's batch, from 0. Shape (cells,).
        clip: highest count of each gene in each batch; larger counts are replaced by it. Shape (batches, genes).

    Returns:
        Sums of counts and of squared counts, shape (2, batches, genes).
    """
    sums = np.zeros((2, batch_of_cell.max() + 1, len(genes)))
    for block in stream_blocks(source, cell_ids, "ranking genes"):
        positions = np.searchsorted(cell_ids, block.cell_ids)
        add_sums(block.counts[:, genes], batch_of_cell[positions], sums, clip)
    return sums


def add_sums(
    counts: csr_matrix, batch_of_cell: Int64Array, sums: Float64Array, clip: Float64Array | None = None
) -> None:
    """Add the counts and the squared counts of some cells to the sums of their batches, in place.

    The sums are of whole numbers, and so exact: they do not depend on the order in which cells are read.

    Args:
        counts: raw counts. Shape (cells, genes).
        batch_of_cell: number of each cell's batch. Shape (cells,).
        sums: sums of counts and of squared counts; changed in place. Shape (2, batches, genes).
        clip: highest count of each gene in each batch; larger counts are replaced by it. Shape (batches, genes).
    """
    # Rows for the batches that occur in this block only: a block has few donors, and there may be thousands.
    batches, row_of_cell = np.unique(batch_of_cell, return_inverse=True)
    row_of_entry = np.repeat(row_of_cell, np.diff(counts.indptr))
    values = counts.data.astype(np.float64)
    if clip is not None:
        values = np.minimum(values, clip[batches][row_of_entry, counts.indices])
    shape = (len(batches), counts.shape[1])
    place = row_of_entry * shape[1] + counts.indices
    for power, weights in enumerate((values, values**2)):
        sums[power, batches] += np.bincount(place, weights, minlength=shape[0] * shape[1]).reshape(shape)
