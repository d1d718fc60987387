"""Choose highly variable genes by their dispersion, scanpy's flavor "seurat", from counts that are streamed.

    1. Scale the counts of each cell to the same sum, so that sequencing depth does not make a gene variable.
    2. In each batch, compute the mean and the variance of each gene, and log(variance / mean), its dispersion.
    3. Compare the dispersion with those of genes of a similar mean: a z-score in each of 20 bins of log1p(mean).
    4. Take the genes that are among the best in most batches; of these the ones with the highest mean z-score.

The other flavor, `hvg`, uses raw counts. Where cells differ in depth, it prefers genes that are high in every cell.

Source: Satija et al. 2015, Nature Biotechnology 33:495; scanpy.pp.highly_variable_genes, flavor "seurat".
"""

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scgpt_hf.cells.block import CellBlock, Float64Array, Int64Array
from scgpt_hf.cells.selection.counts import add_sums, stream_blocks
from scgpt_hf.cells.selection.hvg import (
    MIN_CELLS_PER_BATCH,
    moments,
    require_enough_genes,
    require_varying_genes,
    to_batches,
)

if TYPE_CHECKING:
    from scgpt_hf.cells.source import CellSource

_TARGET_SUM = 10_000.0
# Values are rounded to multiples of 1/16, which is less than a tenth of a single count in a cell of 10,000 counts. Sums
# are then of whole numbers, and do not depend on the order in which cells are read.
_STEPS_PER_UNIT = 16
_N_BINS = 20  # Source: scanpy


def dispersed_genes(
    source: "CellSource",
    cell_ids: Int64Array,
    n_genes: int,
    *,
    batch_key: str | None = "donor_id",
    candidates: Int64Array | None = None,
    min_cells: int = MIN_CELLS_PER_BATCH,
) -> Int64Array:
    """Return the genes with the highest dispersion for their mean. The counts are read once.

    Args:
        source: where to read the cells.
        cell_ids: training cells only. Shape (cells,).
        n_genes: number of genes to return.
        batch_key: obs column; genes are ranked within the cells of each value. None ranks them over all cells at once.
        candidates: columns of the genes to choose from; by default all. Shape (candidates,).
        min_cells: batches with fewer cells are pooled, as `highly_variable_genes` does.

    Returns:
        int64 columns of `source.genes`, ascending. Shape (n_genes,).

    Raises:
        ValueError: there are fewer candidates or varying genes than `n_genes`, or a cell has no batch.

    Example:
        >>> dispersed_genes(source, train, 2_000, batch_key="dataset_id").shape  # doctest: +SKIP
        (2000,)
    """
    columns = require_enough_genes(source, candidates, n_genes)
    cell_ids = np.sort(cell_ids)
    batch_of_cell = to_batches(source, cell_ids, batch_key, min_cells)
    sums = np.zeros((2, batch_of_cell.max() + 1, len(columns)))
    for block in stream_blocks(source, cell_ids, "ranking genes"):
        counts = block.counts[:, columns]
        scale = np.repeat(_factors(block), np.diff(counts.indptr))
        counts.data = np.rint(counts.data * scale * _STEPS_PER_UNIT)
        add_sums(counts, batch_of_cell[np.searchsorted(cell_ids, block.cell_ids)], sums)
    sums /= np.array([_STEPS_PER_UNIT, _STEPS_PER_UNIT**2])[:, None, None]
    means, variances = moments(sums, np.bincount(batch_of_cell))
    scores = np.stack([dispersion_scores(*one) for one in zip(means, variances, strict=True)])
    return columns[_best_genes(scores, n_genes)]


def _factors(block: CellBlock) -> Float64Array:
    """Return the factors that scale the counts of each cell, over all its genes, to the target sum. Shape (cells,)."""
    totals = np.asarray(block.counts.sum(axis=1, dtype=np.float64)).ravel()
    return _TARGET_SUM / np.where(totals > 0, totals, 1)


def dispersion_scores(means: Float64Array, variances: Float64Array) -> Float64Array:
    """Return the z-score of each gene's log dispersion among the genes of a similar mean.

    Args:
        means: mean of the scaled counts of each gene. Shape (genes,).
        variances: their variance. Shape (genes,).

    Returns:
        Shape (genes,); NaN for genes that do not vary. The only gene of a bin has score 1.

    Source: scanpy.pp.highly_variable_genes, flavor "seurat".
    """
    scores = np.full(len(means), np.nan)
    varying = variances > 0
    if not varying.any():
        return scores
    dispersion = pd.Series(np.log(variances[varying] / means[varying]))
    bins = pd.cut(np.log1p(means[varying]), _N_BINS, labels=False)
    groups = dispersion.groupby(bins)
    centre, spread = groups.transform("mean"), groups.transform("std")
    alone = spread.isna()
    spread[alone], centre[alone] = centre[alone], 0.0
    scores[varying] = ((dispersion - centre) / spread.where(spread != 0, np.nan)).fillna(0.0)
    return scores


def _best_genes(scores: Float64Array, n_genes: int) -> Int64Array:
    """Return the genes that are among the best in most batches, and among equals those with the best mean score.

    Args:
        scores: see `dispersion_scores`; a gene that does not vary in a batch counts there as 0. Shape (batches, genes).
        n_genes: number of genes to return.

    Raises:
        ValueError: fewer than `n_genes` genes vary.
    """
    varying = np.flatnonzero((~np.isnan(scores)).any(axis=0))
    require_varying_genes(len(varying), n_genes)
    n_batches = np.zeros(scores.shape[1], np.int64)
    for score in scores:
        best = np.argsort(-np.nan_to_num(score, nan=-np.inf), kind="stable")[:n_genes]
        n_batches[best[~np.isnan(score[best])]] += 1
    order = np.lexsort((-np.nan_to_num(scores).mean(axis=0)[varying], -n_batches[varying]))
    return np.sort(varying[order[:n_genes]])
