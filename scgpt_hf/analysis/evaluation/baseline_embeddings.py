"""What every embedding is compared with, computed on the same cells: variable genes, their PCA, scVI.

The recipe is scanpy's: counts per 10,000, log1p, 2,000 variable genes, 50 components. All cells that are scored may be
seen, their labels never: an advantage over a model that was trained on other cells. Scores are made in `probing.py`
and `metrics.py`.
"""

import logging
import warnings
from collections.abc import Collection
from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from scgpt_hf.analysis.evaluation.metrics import FloatArray, Labels

PCA, LOGISTIC, SCVI = "HVG + PCA", "HVG + logistic regression", "scVI"
BASELINES = (PCA, LOGISTIC, SCVI)
N_HVG = 2_000
N_COMPONENTS = 50
_VOTERS = 20  # cells a batch needs to rank genes by their variance


def baseline_features(
    counts: csr_matrix, batches: Labels, baselines: Collection[str], seed: int, *, progress: bool = False
) -> dict[str, FloatArray]:
    """Return what each baseline makes of the cells: components, log-normalised variable genes, latent variables.

    Args:
        counts: raw counts. Shape (cells, genes).
        batches: batch of each cell. Shape (cells,).
        baselines: of `BASELINES`.
        seed: of PCA and scVI.
        progress: show a bar while scVI trains.

    Returns:
        Baseline → float32 (cells, features).
    """
    normalized = log_normalize(counts)
    genes = variable_genes(normalized, batches)
    variable = normalized[:, genes].toarray()
    features = {}
    if PCA in baselines:
        features[PCA] = principal_components(variable, seed)[0]
    if LOGISTIC in baselines:
        features[LOGISTIC] = variable
    if SCVI in baselines:
        features[SCVI] = scvi_embedding(counts[:, genes], batches, seed, enable_progress_bar=progress)
    return features


def transfer_features(
    counts: csr_matrix, batches: Labels, query: csr_matrix, baselines: Collection[str], seed: int
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Return what each baseline but scVI makes of a reference and of a query: genes and components of the reference.

    Args:
        counts: raw counts of the reference. Shape (reference cells, genes).
        batches: batch of each cell of the reference. Shape (reference cells,).
        query: raw counts of the query, columns alike. Shape (query cells, genes).
        baselines: of `BASELINES`.
        seed: of PCA.

    Returns:
        Baseline → float32 (reference cells, features) and (query cells, features).
    """
    normalized = log_normalize(counts)
    genes = variable_genes(normalized, batches)
    variable, of_query = normalized[:, genes].toarray(), log_normalize(query)[:, genes].toarray()
    features: dict[str, tuple[FloatArray, FloatArray]] = {}
    if PCA in baselines:
        components, projected = principal_components(variable, seed, of_query)
        features[PCA] = components, projected
    if LOGISTIC in baselines:
        features[LOGISTIC] = variable, of_query
    return features


def log_normalize(counts: csr_matrix) -> csr_matrix:
    """Return log1p of the counts per 10,000, float32 (cells, genes); a cell without counts stays empty.

    Source: scanpy.pp.normalize_total(target_sum=1e4) and log1p.
    """
    import scanpy
    from anndata import AnnData

    adata = AnnData(csr_matrix(counts, dtype=np.float32, copy=True))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Some cells have zero counts", UserWarning)
        scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    return adata.X


def variable_genes(normalized: csr_matrix, batches: Labels, n_genes: int = N_HVG) -> npt.NDArray[np.int64]:
    """Return the columns of the most variable genes, ascending; all that are expressed, where those are fewer.

    Genes are ranked in each batch and taken by how many batches choose them, so that a gene that differs only between
    batches is not. Batches of fewer than 20 cells do not vote; where fewer than two do, all cells are ranked together.

    Args:
        normalized: as `log_normalize` returns. Shape (cells, genes).
        batches: batch of each cell. Shape (cells,).
        n_genes: how many.

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
    voting = names[sizes >= _VOTERS]
    cells = np.isin(batches, voting) if len(voting) > 1 else np.ones(len(batches), dtype=bool)
    adata = AnnData(normalized[cells])
    adata.uns["log1p"] = {"base": None}
    adata.obs["batch"] = np.asarray(batches)[cells]
    adata.obs["batch"] = adata.obs["batch"].astype("category")
    batch_key = "batch" if len(voting) > 1 else None
    scanpy.pp.highly_variable_genes(adata, n_top_genes=n_genes, flavor="seurat", batch_key=batch_key)
    return np.flatnonzero(adata.var["highly_variable"].to_numpy())


def principal_components(
    features: FloatArray, seed: int, query: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Return 50 components of the features, centred, not scaled, and the query projected onto them.

    Args:
        features: log-normalised variable genes. Shape (cells, genes).
        seed: of the solver's first vector.
        query: other cells with the same genes, none by default. Shape (query cells, genes).

    Returns:
        float32 (cells, 50) and (query cells, 50); fewer components where cells or genes are fewer.

    Source: scanpy.pp.pca with its defaults.
    """
    from sklearn import decomposition

    n_components = min(N_COMPONENTS, min(features.shape) - 1)
    if n_components < 1:
        raise ValueError(f"PCA needs at least two cells and two genes, found {features.shape}")
    pca = decomposition.PCA(n_components, svd_solver="arpack", random_state=seed)
    components = pca.fit_transform(features).astype(np.float32)
    projected = components[:0] if query is None else pca.transform(query).astype(np.float32)
    return components, projected


def scvi_embedding(counts: csr_matrix, batches: Labels, seed: int, **training: Any) -> FloatArray:
    """Return the latent space of scVI, trained on the raw counts of these cells with its defaults. Shape (cells, 10).

    Args:
        counts: raw counts of the variable genes. Shape (cells, genes).
        batches: the batch that scVI shall correct for. Shape (cells,).
        seed: of weights and mini-batches; sets the global seeds of torch and numpy.
        training: for scvi's `train`, as `max_epochs`.

    Raises:
        ModuleNotFoundError: scvi-tools is not installed.

    Source: Lopez et al. 2018, Nature Methods 15:1053.
    """
    from anndata import AnnData

    try:
        import scvi
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is not installed, which the baseline scVI needs: pip install "scgpt_hf[scvi]"'
        ) from error
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # no word on devices it did not find, no advice
    scvi.settings.seed = seed
    adata = AnnData(csr_matrix(counts, dtype=np.float32))
    adata.obs["batch"] = np.asarray(batches)
    with warnings.catch_warnings():  # lightning's advice on loaders and loggers, which scvi's defaults call for
        warnings.simplefilter("ignore")
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        model = scvi.model.SCVI(adata)
        model.train(**training)
        return np.asarray(model.get_latent_representation(), dtype=np.float32)
