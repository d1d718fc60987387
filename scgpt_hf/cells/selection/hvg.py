"""The arithmetic of highly variable genes as Seurat v3 defines them, on sums of counts that `select.py` data_module.

Sums of whole numbers make the result a function of the cells alone, in whatever order they are read. The libraries
that offer it are what the tests compare with: scanpy needs all cells in memory; cellxgene_census adds unseeded noise
where a fit fails, so that two runs chose different genes.

Source: Stuart et al. 2019, Cell 177:1888; scverse/scanpy:src/scanpy/preprocessing/_highly_variable_genes.py.
"""

import logging

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import Int64Array

logger = logging.getLogger(__name__)

FloatArray = npt.NDArray[np.float64]

# Share of the genes that each local fit looks at. Source: scanpy and Seurat.
_SPAN = 0.3
# Noise added to log means when many are equal and the fit is singular, tried in turn.
# Source: cellxgene_census.experimental.pp (max_loess_jitter), there unseeded.
_JITTERS = (0.0, 1e-12, 1e-9, 1e-6)
# Genes below which no curve is fitted: below 15 the fit is singular, and with 2 or 3 scikit-misc crashes the process.
_MIN_FITTED = 30
_LARGER_BATCHES = (
    "rank genes within larger groups of cells (--hvg_batch_key; `per` or a higher `min_cells` in Python), "
    "or take every gene (--gene_selection all)"
)


def add_sums(counts: csr_matrix, batch_of_cell: Int64Array, sums: FloatArray, clip: FloatArray | None = None) -> None:
    """Add each batch's sum of counts and of squared counts of each gene to `sums`.

    Args:
        counts: raw counts. Shape (cells, genes).
        batch_of_cell: experimental batch of each cell. Shape (cells,).
        sums: changed in place. Shape (2, batches, genes).
        clip: larger counts are taken as this. Shape (batches, genes).
    """
    batches, row_of_cell = np.unique(batch_of_cell, return_inverse=True)
    row = np.repeat(row_of_cell, np.diff(counts.indptr))
    values = counts.data.astype(np.float64)
    if clip is not None:
        values = np.minimum(values, clip[batches][row, counts.indices])
    shape = (len(batches), counts.shape[1])
    place = row * shape[1] + counts.indices
    for power, weights in enumerate((values, values**2)):
        sums[power, batches] += np.bincount(place, weights, minlength=shape[0] * shape[1]).reshape(shape)


def moments(sums: FloatArray, n_cells: Int64Array) -> tuple[FloatArray, FloatArray]:
    """Return mean and unbiased variance of each gene in each batch, both (batches, genes).

    Args:
        sums: of counts and of squared counts. Shape (2, batches, genes).
        n_cells: cells of each batch. Shape (batches,).
    """
    total, squares = sums
    means = total / n_cells[:, None]
    return means, (squares - total * means) / np.maximum(n_cells - 1, 1)[:, None]


def expected_std(means: FloatArray, variances: FloatArray) -> FloatArray:
    """Return the standard deviation that a gene's mean predicts in this batch, shape (genes,); 1 where it is constant.

    Args:
        means: mean count of each gene in one batch. Shape (genes,).
        variances: variance of each gene in one batch. Shape (genes,).

    Raises:
        ValueError: too few genes vary, or no curve can be fitted because most of them have the same few counts.
    """
    from skmisc.loess import loess

    varying = variances > 0
    std = np.ones_like(means)
    if not varying.any():
        return std
    if varying.sum() < _MIN_FITTED:
        raise ValueError(
            f"found {varying.sum()} genes that vary within a batch of cells, expected at least {_MIN_FITTED} to fit "
            f"variance over mean; keep more genes (a lower --min_gene_counts), {_LARGER_BATCHES}"
        )
    x, y = np.log10(means[varying]), np.log10(variances[varying])
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
            logger.debug("fit failed with jitter %g: %s", jitter, error)
        else:
            break
    std[varying] = np.sqrt(10**fit.outputs.fitted_values)
    return std


def standardized_variances(sums: FloatArray, n_cells: Int64Array, means: FloatArray, std: FloatArray) -> FloatArray:
    """Return the variance of clipped counts in units of what the mean predicts, shape (batches, genes).

    Args:
        sums: of counts and of squared counts, clipped. Shape (2, batches, genes).
        n_cells: cells of each batch. Shape (batches,).
        means: not clipped. Shape (batches, genes).
        std: from `expected_std`. Shape (batches, genes).
    """
    total, squares = sums
    deviations: FloatArray = n_cells[:, None] * means**2 + squares - 2 * total * means
    degrees: FloatArray = np.maximum(n_cells - 1, 1)[:, None] * std**2
    return deviations / degrees


def rank_genes(variances: FloatArray, n_genes: int) -> Int64Array:
    """Return the `n_genes` genes of the best median rank over the batches, ascending.

    In each batch the genes are ranked, and those of rank `n_genes` or worse, or without variance, have no rank there.
    Equal medians are decided by the number of batches with a rank, then by the order of the genes.

    Args:
        variances: standardised variances. Shape (batches, genes).
        n_genes: number of genes to return.

    Raises:
        ValueError: fewer genes vary.
    """
    ranks = np.full(variances.shape, np.nan)
    for rank, variance in zip(ranks, variances, strict=True):
        best = np.argsort(-variance, kind="stable")[:n_genes]
        best = best[variance[best] > 0]
        rank[best] = np.arange(len(best))
    n_batches = (~np.isnan(ranks)).sum(axis=0)
    ranked = np.flatnonzero(n_batches)
    if len(ranked) < n_genes:
        raise ValueError(
            f"asked for {n_genes:,} highly variable genes, but only {len(ranked):,} vary between cells; "
            "lower --n_hvg, or drop fewer genes (a lower --min_gene_counts)"
        )
    order = np.lexsort((-n_batches[ranked], np.nanmedian(ranks[:, ranked], axis=0)))
    return np.sort(ranked[order[:n_genes]])
