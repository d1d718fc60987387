"""Vectors of genes from the correlations between genes over training cells.

Genes with similar vectors are expressed by the same cells. A model that starts from such vectors, instead of random
ones, need not learn first which genes occur together.
"""

from typing import TYPE_CHECKING

import numpy as np
from scipy.linalg import eigh
from scipy.sparse import csr_matrix, vstack
from threadpoolctl import threadpool_limits

from scgpt_hf.cells.block import Float64Array, Int64Array
from scgpt_hf.cells.selection.counts import stream_blocks

if TYPE_CHECKING:
    from scgpt_hf.cells.source import CellSource

MAX_CELLS = 20_000
"""Cells of the sample: its correlations have a standard error of 0.007 at most. Memory holds their counts."""
MAX_LANDMARKS = 2_048
"""Genes whose correlations are decomposed; other genes are placed relative to them."""
TARGET_SUM = 10_000
"""Sum of the counts of a cell before the logarithm, as in scGPT's preprocessing and in Scanpy's tutorials."""

# Values are rounded to multiples of this. They are below 16, so products are multiples of 2⁻²⁴ below 2⁸, and a sum of
# 20,000 of them takes 47 of the 53 bits of float64. So sums of products are exact, whatever their order.
_RESOLUTION = 2.0**-12
_CELLS_PER_PRODUCT = 512
_SMALLEST_EIGENVALUE = 1e-8  # relative to the largest; smaller ones are rounding errors


def gene_vectors(
    source: "CellSource", cell_ids: Int64Array, genes: Int64Array, size: int, *, seed: int
) -> Float64Array:
    """Compute vectors of genes whose inner products follow the correlations between the genes.

    The values of a cell are log1p of its counts after these were scaled to the same sum. Let u_k be the eigenvectors
    and λ_k the eigenvalues of the correlations between genes, largest first. Component k of the vectors is u_k · λ_k^¼.

    With more than `MAX_LANDMARKS` genes, only the correlations R between the landmarks, the genes whose values vary
    most, are decomposed. The eigenvectors are extended to the other genes by their correlations with the landmarks,
    R_other · u_k / λ_k (the Nyström method). No matrix of genes × genes is built.

    The cells are read once. The result depends on the arguments, not on the number of threads: sums are exact, and the
    eigenvectors are computed on one thread.

    Args:
        source: where to read the cells.
        cell_ids: training cells; up to `MAX_CELLS` of them are used. Shape (cells,).
        genes: columns of the genes. Shape (genes,).
        size: number of components.
        seed: determines the sample of cells.

    Returns:
        Vectors, of zeros where a gene has the same value in all cells of the sample. There are fewer components than
        `size` if there are fewer landmarks or cells. Shape (genes, components).

    Raises:
        ValueError: no gene varies between the cells.

    Example:
        >>> vectors = gene_vectors(source, train, np.arange(1200), 128, seed=0)  # doctest: +SKIP

    Source: Williams and Seeger 2001, Using the Nyström method to speed up kernel machines, NIPS 13; the exponent ¼ is
        from our own measurements.
    """
    values = _read_values(source, _sample(cell_ids, seed), genes)
    n_cells = values.shape[0]
    mean, sd = _moments(values)
    if not sd.any():
        raise ValueError(f"no gene varies between the {n_cells:,} sampled training cells; choose other cells or genes")
    inverse_sd = np.divide(1.0, sd, out=np.zeros_like(sd), where=sd > 0)
    n_varying = np.count_nonzero(sd)
    landmarks = np.sort(np.argsort(-sd, kind="stable")[: min(n_varying, MAX_LANDMARKS)])
    covariance = _products(values[:, landmarks]) / n_cells - np.outer(mean[landmarks], mean[landmarks])
    correlations = covariance * np.outer(inverse_sd[landmarks], inverse_sd[landmarks])
    first = max(len(landmarks) - size, 0)
    with threadpool_limits(1):  # several threads would add up in another order
        eigenvalues, eigenvectors = eigh(correlations, subset_by_index=[first, len(landmarks) - 1])
    kept = np.flatnonzero(eigenvalues > _SMALLEST_EIGENVALUE * eigenvalues[-1])[::-1]
    eigenvalues, eigenvectors = eigenvalues[kept], eigenvectors[:, kept]
    extended = np.zeros((len(genes), len(kept)))
    if len(landmarks) < n_varying:
        weights = eigenvectors * inverse_sd[landmarks][:, None]
        scores = values[:, landmarks] @ weights - mean[landmarks] @ weights  # (cells, components), of mean 0
        extended = (values.T @ scores) * inverse_sd[:, None] / n_cells / eigenvalues
    extended[landmarks] = eigenvectors
    return np.asarray(extended * eigenvalues**0.25)


def _sample(cell_ids: Int64Array, seed: int) -> Int64Array:
    """Return up to `MAX_CELLS` of the cells, ascending."""
    cells = np.sort(cell_ids)
    if len(cells) <= MAX_CELLS:
        return cells
    return np.sort(np.random.default_rng(seed).choice(cells, MAX_CELLS, replace=False, shuffle=False))


def _read_values(source: "CellSource", cell_ids: Int64Array, genes: Int64Array) -> csr_matrix:
    """Return log1p of the scaled counts, rounded to `_RESOLUTION`; float32 is exact. Shape (cells, genes)."""
    blocks = []
    for block in stream_blocks(source, cell_ids, "reading counts for gene vectors"):
        counts = block.counts[:, genes]
        totals = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
        scaled = counts.data * TARGET_SUM / np.repeat(totals, np.diff(counts.indptr))
        counts.data = (np.rint(np.log1p(scaled) / _RESOLUTION) * _RESOLUTION).astype(np.float32)
        blocks.append(counts)
    return csr_matrix(vstack(blocks, format="csr"))


def _moments(values: csr_matrix) -> tuple[Float64Array, Float64Array]:
    """Return mean and standard deviation of each column. Shape (genes,) each."""
    n_cells, n_genes = values.shape
    data = values.data.astype(np.float64)
    sums, squares = (np.bincount(values.indices, weights, n_genes) for weights in (data, data**2))
    variance = squares / n_cells - (sums / n_cells) ** 2
    constant = squares * n_cells == sums**2  # the difference above may leave a rounding error
    return sums / n_cells, np.sqrt(np.where(constant, 0.0, np.maximum(variance, 0.0)))


def _products(values: csr_matrix) -> Float64Array:
    """Return valuesᵀ · values, exactly. Shape (genes, genes)."""
    total = np.zeros((values.shape[1], values.shape[1]))
    for start in range(0, values.shape[0], _CELLS_PER_PRODUCT):
        dense = values[start : start + _CELLS_PER_PRODUCT].toarray().astype(np.float64)
        total += dense.T @ dense
    return total
