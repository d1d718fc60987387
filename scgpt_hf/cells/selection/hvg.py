"""Choose highly variable genes as Seurat v3 does, from counts that are streamed. See `dispersion` for another flavor.

    1. Sum counts and squared counts of each gene in each donor: mean and variance.          (first pass over cells)
    2. Fit log10 variance over log10 mean in each donor: the spread that the mean predicts.
    3. Sum again with counts clipped: the variance beyond what the mean predicts.            (second pass)
    4. Rank the genes by it in each donor, and take the genes of the best median rank.

Why not a library: scanpy needs all cells in memory, and cellxgene_census adds unseeded noise where a fit fails, so two
runs choose different genes. Here the sums are exact, so the result depends on the cells alone and not on the order in
which they are read. The tests compare the result with both libraries.

Source: Stuart et al. 2019, Cell 177:1888; scverse/scanpy:src/scanpy/preprocessing/_highly_variable_genes.py.
"""

import logging
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scgpt_hf.cells.block import Float64Array, Int64Array
from scgpt_hf.cells.obs import take_cells
from scgpt_hf.cells.selection.counts import sums_per_batch
from scgpt_hf.cells.selection.splits import find_donors
from scgpt_hf.progress_bar import progress_bar

if TYPE_CHECKING:
    from scgpt_hf.cells.source import CellSource

logger = logging.getLogger(__name__)

# Donors with fewer cells are pooled into one batch: with few cells, the curve of variance over mean cannot be fitted,
# or is noise. Measured on 17,736 blood cells: ranking genes in 13 donors of 55 to 83 cells one by one, instead of in
# one pool, replaced 565 of 1,200 genes.
MIN_CELLS_PER_BATCH = 100
# Share of the genes that each local fit uses. Source: scanpy and Seurat.
_SPAN = 0.3
# Scales of the noise added to log means, smallest first: when many means are equal, the fit is singular.
# Source: cellxgene_census.experimental.pp (max_loess_jitter), where the noise is unseeded.
_JITTERS = (0.0, 1e-12, 1e-9, 1e-6)
# Fewest genes for a fit. Below 15 the fit is singular, and with 2 or 3 genes scikit-misc crashes the process.
_MIN_FITTED_GENES = 30
_LARGER_BATCHES = (
    "rank genes within larger groups of cells (--hvg_batch_key; `batch_key` or a higher `min_cells` in Python), "
    "or take every gene (--gene_selection all)"
)


def highly_variable_genes(
    source: "CellSource",
    cell_ids: Int64Array,
    n_genes: int,
    *,
    batch_key: str | None = "donor_id",
    candidates: Int64Array | None = None,
    min_cells: int = MIN_CELLS_PER_BATCH,
) -> Int64Array:
    """Return the genes that vary most between cells, beyond the variance that their mean explains.

    Genes are ranked within each donor, so that differences between donors do not make a gene variable. The counts are
    read twice. Memory is about 80 bytes for each donor and candidate gene: 0.4 GB for 150 donors and 30,000 genes.

    Args:
        source: where to read the cells.
        cell_ids: training cells only. Shape (cells,).
        n_genes: number of genes to return.
        batch_key: obs column; genes are ranked within the cells of each value. None ranks them over all cells at once.
        candidates: columns of the genes to choose from; by default all. Shape (candidates,).
        min_cells: donors with fewer cells are pooled into one batch. If the pool is still smaller than this, the next
            larger donors join it.

    Returns:
        int64 columns of `source.genes`, ascending. Shape (n_genes,).

    Raises:
        ValueError: there are fewer candidates or varying genes than `n_genes`, a cell has no donor, or no curve can be
            fitted.

    Source: Stuart et al. 2019, Cell 177:1888 (seurat_v3).
    """
    columns = require_enough_genes(source, candidates, n_genes)
    cell_ids = np.sort(cell_ids)
    batch_of_cell = to_batches(source, cell_ids, batch_key, min_cells)
    n_cells = np.bincount(batch_of_cell)
    means, variances = moments(sums_per_batch(source, cell_ids, columns, batch_of_cell), n_cells)
    std = np.empty_like(means)
    for batch in progress_bar(range(len(n_cells)), description="fitting variance over mean", unit="donors"):
        std[batch] = expected_std(means[batch], variances[batch])
    clip = means + std * np.sqrt(n_cells)[:, None]  # Source: Stuart et al. 2019; standardized counts ≤ sqrt(cells)
    clipped_sums = sums_per_batch(source, cell_ids, columns, batch_of_cell, clip)
    return columns[rank_genes(standardized_variances(clipped_sums, n_cells, means, std), n_genes)]


def require_enough_genes(source: "CellSource", candidates: Int64Array | None, n_genes: int) -> Int64Array:
    """Return the columns to choose from, ascending. Shape (candidates,).

    Raises:
        ValueError: there are fewer than `n_genes`.
    """
    columns = np.arange(len(source.genes)) if candidates is None else np.unique(candidates)
    if not 1 <= n_genes <= len(columns):
        raise ValueError(
            f"found {len(columns):,} genes to choose from, but {n_genes:,} highly variable genes were requested; "
            f"choose --n_hvg in [1, {len(columns):,}], or drop fewer genes (a lower --min_gene_counts)"
        )
    return columns


def require_varying_genes(n_varying: int, n_genes: int) -> None:
    """Raise ValueError if fewer than `n_genes` genes vary between cells."""
    if n_varying < n_genes:
        raise ValueError(
            f"found {n_varying:,} genes that vary between cells, but {n_genes:,} highly variable genes were "
            "requested; lower --n_hvg, or drop fewer genes (a lower --min_gene_counts)"
        )


def to_batches(source: "CellSource", cell_ids: Int64Array, batch_key: str | None, min_cells: int) -> Int64Array:
    """Return the number of the batch within which genes are ranked, for each cell. Shape (cells,).

    Args:
        source: where to read the cells.
        cell_ids: the cells. Shape (cells,).
        batch_key: see `highly_variable_genes`.
        min_cells: see `highly_variable_genes`.

    Raises:
        ValueError: a cell has no value in the column.
    """
    if batch_key is None:
        return np.zeros(len(cell_ids), np.int64)
    return _pool_small_donors(take_cells(source.obs([batch_key]), cell_ids), batch_key, min_cells)


def moments(sums: Float64Array, n_cells: Int64Array) -> tuple[Float64Array, Float64Array]:
    """Return the mean and the unbiased variance of each gene in each batch, both of shape (batches, genes).

    Args:
        sums: sums of counts and of squared counts. Shape (2, batches, genes).
        n_cells: number of cells in each batch. Shape (batches,).
    """
    total, squares = sums
    means = total / n_cells[:, None]
    return means, (squares - total * means) / np.maximum(n_cells - 1, 1)[:, None]


def expected_std(means: Float64Array, variances: Float64Array) -> Float64Array:
    """Return the standard deviation that the mean of each gene predicts in one batch.

    A local regression (loess) of log10 variance over log10 mean, of degree 2, is fitted to the genes that vary.

    Args:
        means: mean count of each gene. Shape (genes,).
        variances: variance of each gene. Shape (genes,).

    Returns:
        Shape (genes,); 1 for genes that do not vary.

    Raises:
        ValueError: too few genes vary, or no curve can be fitted because most genes have the same few counts.

    Source: Stuart et al. 2019, Cell 177:1888; scanpy, flavor "seurat_v3".
    """
    from skmisc.loess import loess

    varying = variances > 0
    std = np.ones_like(means)
    if not varying.any():
        return std
    if varying.sum() < _MIN_FITTED_GENES:
        raise ValueError(
            f"found {varying.sum()} genes that vary within a batch of cells, expected at least {_MIN_FITTED_GENES} to "
            f"fit variance over mean; keep more genes (a lower --min_gene_counts), {_LARGER_BATCHES}"
        )
    x, y = np.log10(means[varying]), np.log10(variances[varying])
    # A constant seed: the noise serves only to make a singular fit possible, and the genes must not depend on it.
    rng = np.random.default_rng(0)
    for jitter in _JITTERS:
        fit = loess(x + rng.uniform(-jitter, jitter, len(x)), y, span=_SPAN, degree=2)
        try:
            fit.fit()
        except ValueError as error:
            if jitter == _JITTERS[-1]:
                raise ValueError(
                    f"cannot fit variance over mean to {len(x):,} varying genes of a batch of cells: {error}; "
                    f"drop rare genes (a higher --min_gene_counts), {_LARGER_BATCHES}"
                ) from error
            logger.debug("the fit failed with jitter %g: %s", jitter, error)
        else:
            break
    std[varying] = np.sqrt(10**fit.outputs.fitted_values)
    return std


def standardized_variances(
    sums: Float64Array, n_cells: Int64Array, means: Float64Array, std: Float64Array
) -> Float64Array:
    """Return the variance of each gene's clipped counts, in units of the variance that its mean predicts.

    With clipped counts x, and mean and std of a gene in a batch of N cells:

        sum((x - mean)²) / ((N - 1) std²)  =  (N mean² + sum(x²) - 2 mean sum(x)) / ((N - 1) std²)

    Args:
        sums: sums of clipped counts and of their squares. Shape (2, batches, genes).
        n_cells: number of cells in each batch. Shape (batches,).
        means: means of the counts before clipping. Shape (batches, genes).
        std: standard deviations from `expected_std`. Shape (batches, genes).

    Returns:
        Shape (batches, genes).

    Source: scanpy, flavor "seurat_v3".
    """
    total, squares = sums
    deviations: Float64Array = n_cells[:, None] * means**2 + squares - 2 * total * means
    degrees: Float64Array = np.maximum(n_cells - 1, 1)[:, None] * std**2
    return deviations / degrees


def rank_genes(variances: Float64Array, n_genes: int) -> Int64Array:
    """Return the `n_genes` genes with the best median rank over the batches.

    In each batch, only the best `n_genes` genes that vary get a rank. The median is over the batches in which a gene
    has a rank. Genes of equal median are ordered by the number of those batches, then by their column.

    Args:
        variances: standardized variances. Shape (batches, genes).
        n_genes: number of genes to return.

    Returns:
        int64 columns, ascending. Shape (n_genes,).

    Raises:
        ValueError: fewer than `n_genes` genes vary.

    Source: scanpy, flavor "seurat_v3".
    """
    ranks = np.full(variances.shape, np.nan)
    for rank, variance in zip(ranks, variances, strict=True):
        best = np.argsort(-variance, kind="stable")[:n_genes]
        best = best[variance[best] > 0]
        rank[best] = np.arange(len(best))
    n_batches = (~np.isnan(ranks)).sum(axis=0)
    ranked = np.flatnonzero(n_batches)
    require_varying_genes(len(ranked), n_genes)
    order = np.lexsort((-n_batches[ranked], np.nanmedian(ranks[:, ranked], axis=0)))
    return np.sort(ranked[order[:n_genes]])


def _pool_small_donors(obs: pd.DataFrame, donor_key: str, min_cells: int) -> Int64Array:
    """Return the number of each cell's batch: 0 for the pool of small donors if there is one, then one per donor.

    Shape (cells,).
    """
    donor_of_cell, donors = find_donors(obs, donor_key)
    n_cells = np.bincount(donor_of_cell)
    ascending = np.argsort(n_cells, kind="stable")
    n_cells_before = np.cumsum(n_cells[ascending]) - n_cells[ascending]  # cells of all smaller donors
    pooled = np.zeros(len(donors), bool)
    if n_cells.min() < min_cells:
        # The second condition: larger donors join until the pool itself has enough cells.
        pooled[ascending] = (n_cells[ascending] < min_cells) | (n_cells_before < min_cells)
        logger.info(
            "pooled %d of %d donors, %d cells, to rank genes: some donors have fewer than %d cells",
            *(pooled.sum(), len(donors), n_cells[pooled].sum(), min_cells),
        )
    batch_of_donor = np.where(pooled, 0, np.cumsum(~pooled) - 1 + pooled.any())
    return batch_of_donor[donor_of_cell]
