"""Which cells and which genes a run uses, chosen before anything is trained.

Counts are streamed, never held: memory is bounded by a few chunks of cells, and for variable genes by donors x genes.
Which of the chosen cells train is decided next, in `splits.py`; genes are then chosen from training cells only.
"""

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd
from tqdm import tqdm

from scgpt_hf.cells.block import CellBlock, Int64Array
from scgpt_hf.cells.schedule.epoch import CHUNK_SIZE
from scgpt_hf.cells.selection.hvg import add_sums, expected_std, moments, rank_genes, standardized_variances
from scgpt_hf.cells.selection.splits import find_donors

if TYPE_CHECKING:
    from scgpt_hf.cells.source import CellSource

logger = logging.getLogger(__name__)

# A donor with fewer cells shares a batch with others when variable genes are chosen: the curve of variance over mean
# that is fitted to each batch fails, or is noise, on few cells. Measured on 17,736 cells of shared/data/blood: ranking
# 13 donors of 55 to 83 cells one by one instead of together replaced 565 of 1,200 genes.
MIN_CELLS_PER_BATCH = 100
# Four chunks, as many as a source reads at once: 100 MB of counts, at 1,500 expressed genes per cell.
_CELLS_PER_READ = 4 * CHUNK_SIZE


def null_free(obs: pd.DataFrame, column: str = "donor_id") -> Int64Array:
    """Return the ids of the cells with a value in a column; those where it is missing or empty are logged.

    Raises:
        ValueError: no such column, or no cell has a value.
    """
    if column not in obs:
        raise ValueError(f"obs has no column {column!r}; its columns are {list(obs.columns)}")
    kept = (obs[column].notna() & (obs[column].astype(str) != "")).to_numpy()
    _report_dropped("cells", kept, f"no {column}")
    return obs.index.to_numpy(np.int64)[kept]


def sample_donors(obs: pd.DataFrame, max_cells: int, *, seed: int, donor_key: str = "donor_id") -> Int64Array:
    """Return the cells of whole donors taken at random, `max_cells` at most.

    Donors are shuffled and taken in that order; one that would exceed `max_cells` is skipped and the next is tried, so
    the total comes close to `max_cells`, and very large donors are taken less often than small ones.

    Args:
        obs: one row for each cell, index = cell ids, with column `donor_key`. Shape (cells, columns).
        max_cells: most cells to return.
        seed: settles the order of the donors.
        donor_key: the column that names donors.

    Returns:
        int64 cell ids, ascending.

    Raises:
        ValueError: no such column, cells without a donor, or not even the smallest donor fits.
    """
    donor_of_cell, donors = find_donors(obs, donor_key)
    n_cells = np.bincount(donor_of_cell, minlength=len(donors))
    taken, left = np.zeros(len(donors), bool), max_cells
    for donor in np.random.default_rng(seed).permutation(len(donors)):
        if n_cells[donor] <= left:
            taken[donor], left = True, left - n_cells[donor]
    if not taken.any():
        smallest = int(n_cells.argmin())
        raise ValueError(
            f"no donor has at most {max_cells:,} cells: the smallest, {donors[smallest]!r}, has {n_cells[smallest]:,}; "
            "raise max_cells (--max_cells)"
        )
    logger.info("took %d of %d donors: %d of %d cells", taken.sum(), len(donors), max_cells - left, len(obs))
    return np.sort(obs.index.to_numpy(np.int64)[taken[donor_of_cell]])


def filter_cells(source: "CellSource", cell_ids: Int64Array, min_genes: int) -> Int64Array:
    """Return the cells with at least `min_genes` expressed genes, ascending; says in the log how many were dropped.

    The Census knows the number beforehand (obs `nnz`, since release 2023-12-15); else the counts are streamed.

    Raises:
        ValueError: no cell is left.
    """
    cell_ids = np.sort(cell_ids)
    if min_genes <= 0:
        return cell_ids
    kept = _count_genes(source, cell_ids) >= min_genes
    _report_dropped("cells", kept, f"fewer than {min_genes:,} expressed genes (--min_genes)")
    return cell_ids[kept]


def filter_genes(source: "CellSource", cell_ids: Int64Array, min_counts: int) -> Int64Array:
    """Return the columns of the genes with at least `min_counts` counts in these cells, ascending; logs the others.

    Args:
        source: of the cells.
        cell_ids: training cells only. Shape (cells,).
        min_counts: fewest counts of a gene over all these cells.

    Returns:
        int64 columns of `source.genes`.

    Raises:
        ValueError: no gene is left.
    """
    if min_counts <= 0:
        return np.arange(len(source.genes))
    kept = gene_totals(source, cell_ids) >= min_counts
    _report_dropped("genes", kept, f"fewer than {min_counts:,} counts in {len(cell_ids):,} cells (--min_gene_counts)")
    return np.flatnonzero(kept)


def cells_expressing(source: "CellSource", cell_ids: Int64Array, genes: Int64Array) -> Int64Array:
    """Return the ids of the cells that express at least one of these genes, in the order given; others are logged.

    Args:
        source: of the cells.
        cell_ids: shape (cells,).
        genes: columns of the counts. Shape (genes,).

    Raises:
        ValueError: no cell does.
    """
    wanted = np.zeros(len(source.genes), np.bool_)
    wanted[genes] = True
    expressing = [np.empty(0, np.int64)]
    for block in _stream_blocks(source, cell_ids, "counting expressed genes"):
        n_before = np.concatenate([[0], np.cumsum(wanted[block.counts.indices])])
        expressing.append(block.cell_ids[np.diff(n_before[block.counts.indptr]) > 0])
    kept = np.isin(cell_ids, np.concatenate(expressing))
    _report_dropped("cells", kept, f"none of the {len(genes):,} chosen genes expressed")
    return cell_ids[kept]


def gene_totals(source: "CellSource", cell_ids: Int64Array) -> Int64Array:
    """Return the counts of each gene over these cells, shape (genes,), streamed."""
    totals = np.zeros(len(source.genes))
    for block in _stream_blocks(source, cell_ids, "counting genes"):
        totals += np.bincount(block.counts.indices, block.counts.data, minlength=len(totals))
    return totals.astype(np.int64)


def highly_variable_genes(
    source: "CellSource",
    cell_ids: Int64Array,
    n_genes: int,
    *,
    batch_key: str | None = "donor_id",
    candidates: Int64Array | None = None,
    min_cells: int = MIN_CELLS_PER_BATCH,
) -> Int64Array:
    """Return the genes that vary most between cells beyond what their mean explains, ranked within each donor.

    Seurat v3: per donor a curve of variance over mean is fitted, counts are standardised by it and clipped, and genes
    ranked; a gene's place is the median of its ranks among the best of each donor. The counts are read twice. Memory
    is about 80 bytes for each donor and candidate gene: 0.4 GB for 150 donors and 30,000 genes.

    Args:
        source: of the cells.
        cell_ids: training cells only. Shape (cells,).
        n_genes: number of genes to return.
        batch_key: obs column; genes are ranked within the cells of each value. None ranks over all cells.
        candidates: columns to choose from; by default all. Shape (candidates,).
        min_cells: donors with fewer cells are pooled into one batch, with the next larger ones if these are too few.

    Returns:
        int64 columns of `source.genes`, ascending. Shape (n_genes,).

    Raises:
        ValueError: more genes asked than there are or than vary, cells without a donor, or no curve can be fitted.

    Source: Stuart et al. 2019, Cell 177:1888 (seurat_v3); see `hvg.py`.
    """
    columns = np.arange(len(source.genes)) if candidates is None else np.unique(candidates)
    if not 1 <= n_genes <= len(columns):
        raise ValueError(
            f"asked for {n_genes:,} highly variable genes of {len(columns):,}; "
            f"choose --n_hvg in [1, {len(columns):,}], or drop fewer genes (a lower --min_gene_counts)"
        )
    cell_ids = np.sort(cell_ids)
    batch_of_cell = np.zeros(len(cell_ids), np.int64)
    if batch_key is not None:
        batch_of_cell = _pool_donors(source.obs([batch_key]).loc[cell_ids], batch_key, min_cells)
    n_cells = np.bincount(batch_of_cell)
    sums = _sum_counts(source, cell_ids, columns, batch_of_cell)
    means, variances = moments(sums, n_cells)
    std = np.empty_like(means)
    for batch in tqdm(range(len(n_cells)), desc="fitting variance over mean", unit=" donors", disable=None, delay=2):
        std[batch] = expected_std(means[batch], variances[batch])
    sums = _sum_counts(source, cell_ids, columns, batch_of_cell, clip=means + std * np.sqrt(n_cells)[:, None])
    return columns[rank_genes(standardized_variances(sums, n_cells, means, std), n_genes)]


def _pool_donors(obs: pd.DataFrame, donor_key: str, min_cells: int) -> Int64Array:
    """Return the number of each cell's batch: its donor, or 0 for all donors with few cells. Shape (cells,)."""
    donor_of_cell, donors = find_donors(obs, donor_key)
    n_cells = np.bincount(donor_of_cell)
    order = np.argsort(n_cells, kind="stable")
    before = np.cumsum(n_cells[order]) - n_cells[order]
    pooled = np.zeros(len(donors), bool)
    if n_cells.min() < min_cells:
        pooled[order] = (n_cells[order] < min_cells) | (before < min_cells)
        counts = pooled.sum(), len(donors), n_cells[pooled].sum(), min_cells
        logger.info("ranked genes of %d of %d donors together, %d cells: some have fewer than %d", *counts)
    batch_of_donor = np.where(pooled, 0, np.cumsum(~pooled) - 1 + pooled.any())
    return batch_of_donor[donor_of_cell]


def _sum_counts(
    source: "CellSource",
    cell_ids: Int64Array,
    columns: Int64Array,
    batch_of_cell: Int64Array,
    clip: npt.NDArray[np.float64] | None = None,
) -> npt.NDArray[np.float64]:
    """Return the sums of counts and of squared counts, (2, batches, columns), of ascending cells; counts clipped."""
    sums = np.zeros((2, batch_of_cell.max() + 1, len(columns)))
    for block in _stream_blocks(source, cell_ids, "ranking genes"):
        where = np.searchsorted(cell_ids, block.cell_ids)
        add_sums(block.counts[:, columns], batch_of_cell[where], sums, clip)
    return sums


def _count_genes(source: "CellSource", cell_ids: Int64Array) -> Int64Array:
    """Return the number of expressed genes of each cell, shape (cells,)."""
    described = source.describe()
    if described["kind"] == "census" and described["layer"] == "raw":
        try:
            return source.obs(["nnz"]).loc[cell_ids, "nnz"].to_numpy(np.int64)
        except ValueError:
            logger.info("obs has no nnz (a Census before 2023-12-15): expressed genes are counted")
    blocks = _stream_blocks(source, cell_ids, "counting expressed genes")
    return np.concatenate([np.zeros(0, np.int64), *(np.diff(block.counts.indptr) for block in blocks)])


def _stream_blocks(source: "CellSource", cell_ids: Int64Array, what: str) -> Iterator[CellBlock]:
    """Yield the cells in ascending order, four chunks' worth at a time, with a bar on a terminal when it takes long."""
    cells = np.sort(cell_ids)
    first = 0
    with tqdm(total=len(cells), desc=what, unit=" cells", disable=None, delay=2) as bar:
        while first < len(cells):
            stop = first + _CELLS_PER_READ
            if stop < len(cells):  # back to where a chunk begins, so that no chunk is read twice
                stop = int(np.searchsorted(cells, cells[stop] // CHUNK_SIZE * CHUNK_SIZE))
            yield source.read(cells[first:stop])
            bar.update(stop - first)
            first = stop


def _report_dropped(what: str, kept: npt.NDArray[np.bool_], why: str) -> None:
    """Log how many were dropped and why; raise when nothing is left."""
    n_dropped = len(kept) - int(kept.sum())
    if n_dropped == len(kept):
        raise ValueError(
            f"all {len(kept):,} {what} would be dropped: {why}; lower the threshold or widen the filter (--obs_filter)"
        )
    logger.info("dropped %d of %d %s: %s", n_dropped, len(kept), what, why)
