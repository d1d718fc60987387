"""Normalize raw counts and choose variable genes, as scanpy's standard recipe does."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import csr_matrix

from scgpt_hf.scoring.metrics import Labels

N_HVG = 2_000
_TARGET_SUM = 10_000.0
_MIN_BATCH_CELLS = 20  # in smaller batches, the variance of a gene is mostly noise


@contextmanager
def keep_torch_threads() -> Iterator[None]:
    """Restore torch's number of threads at the end: scanpy's compiled kernels set that of OpenMP, which torch uses."""
    n_threads = torch.get_num_threads()
    try:
        yield
    finally:
        if torch.get_num_threads() != n_threads:
            torch.set_num_threads(n_threads)


def log_normalize(counts: csr_matrix) -> csr_matrix:
    """Return log1p of the counts per 10,000 as float32, shape (cells, genes). A cell without counts stays empty.

    Source: scanpy.pp.normalize_total(target_sum=1e4) and log1p; without scanpy, whose kernels change the number of
        threads.
    """
    normalized = csr_matrix(counts, dtype=np.float32, copy=True)
    totals = np.asarray(normalized.sum(axis=1, dtype=np.float64)).ravel()
    factors = (_TARGET_SUM / np.where(totals > 0, totals, 1)).astype(np.float32)
    normalized.data *= np.repeat(factors, np.diff(normalized.indptr))
    np.log1p(normalized.data, out=normalized.data)
    return normalized


@keep_torch_threads()
def variable_genes(normalized: csr_matrix, batches: Labels, n_genes: int = N_HVG) -> npt.NDArray[np.int64]:
    """Return the columns of the most variable genes.

    Genes are ranked in each batch, and those chosen in most batches are taken. So a gene that only differs between
    batches is not chosen. Batches with fewer than 20 cells are ignored; if fewer than two batches remain, genes are
    ranked over all cells at once.

    Args:
        normalized: result of `log_normalize`. Shape (cells, genes).
        batches: batch of each cell. Shape (cells,).
        n_genes: number of genes.

    Returns:
        int64 columns, ascending: `n_genes`, or all expressed genes if there are fewer.

    Raises:
        ValueError: no gene is expressed.

    Source: scanpy.pp.highly_variable_genes, flavor "seurat", with batch_key.
    """
    import scanpy
    from anndata import AnnData

    expressed = np.flatnonzero(normalized.getnnz(axis=0))
    if not len(expressed):
        raise ValueError(f"no gene is expressed in these {normalized.shape[0]:,} cells; choose the layer with counts")
    if len(expressed) <= n_genes:
        return np.asarray(expressed)
    names, sizes = np.unique(batches, return_counts=True)
    large = names[sizes >= _MIN_BATCH_CELLS]
    cells = np.isin(batches, large) if len(large) > 1 else np.ones(len(batches), dtype=bool)
    adata = AnnData(normalized[cells])
    adata.uns["log1p"] = {"base": None}  # scanpy warns unless it knows that the values are logarithms
    adata.obs["batch"] = np.asarray(batches)[cells]
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    batch_key = "batch" if len(large) > 1 else None
    scanpy.pp.highly_variable_genes(adata, n_top_genes=n_genes, flavor="seurat", batch_key=batch_key)
    return np.flatnonzero(adata.var["highly_variable"].to_numpy())
