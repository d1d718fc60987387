"""List the baselines that embeddings are compared with, and compute those that are fitted to the scored cells.

The recipe is scanpy's: counts per 10,000, log1p, 2,000 highly variable genes, 50 principal components. A baseline that
is fitted to the scored cells has an advantage over a model that was pretrained on other cells. `run_baselines.py`
computes those that belong to a run: they know its training cells only, as the model does.
"""

import logging
import warnings
from collections.abc import Collection
from typing import Any, NamedTuple

import numpy as np
from scipy.sparse import csr_matrix

from scgpt_hf.analysis.evaluation.run_baselines import COUNT_MLP, TRAINING_PCA, UNTRAINED
from scgpt_hf.cells.block import FloatArray
from scgpt_hf.scoring.fitted_pca import fit_components
from scgpt_hf.scoring.metrics import Labels
from scgpt_hf.scoring.normalization import log_normalize, variable_genes
from scgpt_hf.scoring.ranks import RANK_GENES, rank_genes

PCA, LOGISTIC, SCVI, RANKS = "HVG + PCA", "HVG + logistic regression", "scVI", "ranks + ANOVA + PCA"


class Baseline(NamedTuple):
    """Description of a baseline.

    Attributes:
        meaning: what it computes, in one sentence.
        source: where it comes from.
        needs_run: whether it belongs to a pretraining run, and is read from its folder.
        is_classifier: whether it only predicts types, so that its features are no embedding.
        by_default: whether it is computed unless other baselines are named.
    """

    meaning: str
    source: str
    needs_run: bool = False
    is_classifier: bool = False
    by_default: bool = True


BASELINES: dict[str, Baseline] = {
    PCA: Baseline("variable genes and 50 components, fitted to the scored cells themselves", "scanpy.pp.pca"),
    LOGISTIC: Baseline(
        "logistic regression on log-normalized variable genes",
        "sklearn.linear_model.LogisticRegression",
        is_classifier=True,
    ),
    RANKS: Baseline(
        "ranks of genes within the cell, z-scored; genes chosen by ANOVA on the labels, PCA, logistic regression",
        "arXiv:2602.16696",
        is_classifier=True,
    ),
    TRAINING_PCA: Baseline(
        "variable genes and 50 components, fitted to the training cells of the run", "scanpy.pp.pca", needs_run=True
    ),
    COUNT_MLP: Baseline(
        "a small network without attention, trained for up to a minute with the run's count decoder",
        "scgpt_hf.scoring.count_mlp; scVI's decoder, Lopez et al. 2018, Nature Methods 15:1053",
        needs_run=True,
    ),
    UNTRAINED: Baseline("the model of the run with its initial random weights", "this software", needs_run=True),
    SCVI: Baseline("scVI, trained on the scored cells", "Lopez et al. 2018, Nature Methods 15:1053", by_default=False),
}


def baseline_features(
    counts: csr_matrix, batches: Labels, baselines: Collection[str], seed: int, *, progress: bool = False
) -> dict[str, FloatArray]:
    """Compute the features of the cells for each baseline.

    Args:
        counts: raw counts. Shape (cells, genes).
        batches: batch of each cell. Shape (cells,).
        baselines: names from `BASELINES`.
        seed: seed of PCA and scVI.
        progress: show a progress bar while scVI trains.

    Returns:
        Baseline → float32 features, shape (cells, features): principal components, log-normalized counts of highly
        variable genes, their ranks within the cell, or latent variables of scVI.
    """
    normalized = log_normalize(counts)
    genes = variable_genes(normalized, batches)
    variable = normalized[:, genes].toarray()
    features = {}
    if PCA in baselines:
        features[PCA] = principal_components(variable, seed)[0]
    if LOGISTIC in baselines:
        features[LOGISTIC] = variable
    if RANKS in baselines:
        features[RANKS] = rank_genes(counts, variable_genes(normalized, batches, RANK_GENES))
    if SCVI in baselines:
        features[SCVI] = scvi_embedding(counts[:, genes], batches, seed, enable_progress_bar=progress)
    return features


def transfer_features(
    counts: csr_matrix, batches: Labels, query: csr_matrix, baselines: Collection[str], seed: int
) -> dict[str, tuple[FloatArray, FloatArray]]:
    """Compute the features of a reference and a query for each baseline that is fitted to them, except scVI.

    Genes and components are chosen on the reference, and applied to the query.

    Args:
        counts: raw counts of the reference. Shape (reference cells, genes).
        batches: batch of each reference cell. Shape (reference cells,).
        query: raw counts of the query, with the same columns. Shape (query cells, genes).
        baselines: names from `BASELINES`.
        seed: seed of PCA.

    Returns:
        Baseline → float32 features of reference and query, shapes (reference cells, features), (query cells, features).
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
    if RANKS in baselines:
        ranked = variable_genes(normalized, batches, RANK_GENES)
        features[RANKS] = rank_genes(counts, ranked), rank_genes(query, ranked)
    return features


def principal_components(
    features: FloatArray, seed: int, query: FloatArray | None = None
) -> tuple[FloatArray, FloatArray]:
    """Compute 50 principal components of centered, unscaled features, and project other cells onto them.

    Args:
        features: log-normalized counts of variable genes. Shape (cells, genes).
        seed: seed of the solver's start vector.
        query: other cells with the same genes; none by default. Shape (query cells, genes).

    Returns:
        float32 components of the cells, shape (cells, 50), and of the query, shape (query cells, 50). There are fewer
        components if there are at most 50 cells or genes.

    Raises:
        ValueError: there are fewer than two cells or two genes.

    Source: scanpy.pp.pca with its defaults.
    """
    pca = fit_components(features, seed)
    components = pca.transform(features).astype(np.float32)
    projected = components[:0] if query is None else pca.transform(query).astype(np.float32)
    return components, projected


def scvi_embedding(counts: csr_matrix, batches: Labels, seed: int, **training: Any) -> FloatArray:
    """Train scVI on the cells with its default settings, and return its latent variables.

    Args:
        counts: raw counts of the variable genes. Shape (cells, genes).
        batches: batch of each cell, whose effect scVI removes. Shape (cells,).
        seed: seed of weights and mini-batches. scvi-tools also sets the global seeds of torch and numpy to it.
        training: arguments of `scvi.model.SCVI.train`, such as `max_epochs`.

    Returns:
        float32 latent variables, shape (cells, 10).

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
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)  # it logs which devices it found, and tips
    scvi.settings.seed = seed
    adata = AnnData(csr_matrix(counts, dtype=np.float32))
    adata.obs["batch"] = np.asarray(batches)
    with warnings.catch_warnings():  # lightning warns about the loaders and loggers that scvi uses by default
        warnings.simplefilter("ignore")
        scvi.model.SCVI.setup_anndata(adata, batch_key="batch")
        model = scvi.model.SCVI(adata)
        model.train(**training)
        return np.asarray(model.get_latent_representation(), dtype=np.float32)
