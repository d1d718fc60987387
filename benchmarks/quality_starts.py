#!/usr/bin/env python
"""Score cell types by many starts of k-means, because one start decides NMI and ARI by luck.

Example:
    python benchmarks/quality_starts.py runs/quality/recipe-1500-*/best_model --data DIR

NMI and ARI of scIB compare the labels with k-means clusters from one random start. For each scored set of `quality.py`,
this prints the mean of NMI, ARI and ASW label over 20 starts, with the standard deviation over starts; for the models,
and for PCA fitted on the training cells and on the scored cells. The result is `results/quality/starts.json`.
"""

import argparse
from pathlib import Path
from typing import Any

import anndata
import numpy as np
from measuring import write_result
from quality import SCORED, TRAINED, embed, join_sets, read_labelled
from scib_metrics import silhouette_label
from scipy.sparse import csr_matrix
from sklearn.cluster import KMeans
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from scgpt_hf.analysis.evaluation.baseline_embeddings import PCA, baseline_features
from scgpt_hf.scoring.fitted_pca import fit_pca

STARTS = 20


def main() -> None:
    """Score all embeddings, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", type=Path, nargs="+", help="folders of models, one for each seed")
    parser.add_argument("--data", type=Path, required=True, help="folder of the .h5ad files")
    options = parser.parse_args()
    counts, genes, sets = join_sets({name: anndata.read_h5ad(options.data / f"{name}.h5ad") for name in TRAINED})
    pca = fit_pca(counts, genes, sets, 0)
    result: dict[str, Any] = {}
    for file, (name, column) in SCORED.items():
        adata = read_labelled(options.data, file, column)
        batches = adata.obs["donor_id"].to_numpy(str)
        embeddings: dict[str, Any] = {
            "PCA, scored cells": baseline_features(csr_matrix(adata.X), batches, [PCA], 0)[PCA]
        }
        embeddings["PCA, training cells"] = pca.transform(csr_matrix(adata.X), list(adata.var_names))
        embeddings |= {f"model {number}": embed(adata, model) for number, model in enumerate(options.models)}
        labels = adata.obs["label"].to_numpy(str)
        result[name] = {method: score(embedding, labels) for method, embedding in embeddings.items()}
        for method, found in result[name].items():
            print(name, method, found, flush=True)
    write_result("quality/starts", {"starts": STARTS, "sets": result})


def score(embedding: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Return NMI, ARI and ASW label, their mean, and the standard deviation of the mean over the starts."""
    n_clusters, agreement = len(set(labels)), []
    for start in range(STARTS):
        clusters = KMeans(n_clusters, n_init=1, random_state=start).fit_predict(embedding)
        agreement.append((normalized_mutual_info_score(labels, clusters), adjusted_rand_score(labels, clusters)))
    asw = float(silhouette_label(embedding, labels))
    means = (np.sum(agreement, axis=1) + asw) / 3
    nmi, ari = np.mean(agreement, axis=0)
    found = {"NMI": nmi, "ARI": ari, "ASW label": asw, "mean": means.mean(), "deviation": means.std(ddof=1)}
    return {name: round(float(value), 4) for name, value in found.items()}


if __name__ == "__main__":
    main()
