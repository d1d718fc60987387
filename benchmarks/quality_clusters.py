#!/usr/bin/env python
"""Show what the clusters of an embedding split or join, beside coarse cell types and beside PCA.

Example:
    python benchmarks/quality_clusters.py runs/quality/recipe-1500-0/best_model --data DIR --set pbmc4k_asurat

NMI and ARI compare clusters with labels, so an embedding that separates subtypes which the labels join scores lower.
For the model and for PCA fitted on the training cells of `quality.py`, this prints NMI and ARI of Leiden clusters at
the resolution with the highest NMI, the table of clusters and cell types, and the genes that mark each cluster of the
model. The result is `results/quality/clusters_SET.json`.
"""

import argparse
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import scanpy
from anndata import AnnData
from measuring import write_result
from quality import SCORED, TRAINED, embed, join_sets, read_labelled
from scipy.sparse import csr_matrix
from sklearn.metrics import adjusted_rand_score, normalized_mutual_info_score

from scgpt_hf.scoring.fitted_pca import fit_pca

RESOLUTIONS = np.round(np.arange(0.1, 2.01, 0.1), 1)
MARKERS = 8


def main() -> None:
    """Cluster both embeddings, print and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder of a model")
    parser.add_argument("--data", type=Path, required=True, help="folder of the .h5ad files")
    parser.add_argument("--set", default="pbmc4k_asurat", choices=[*SCORED], help="scored set (default: %(default)s)")
    options = parser.parse_args()
    name, column = SCORED[options.set]
    adata = read_labelled(options.data, options.set, column)
    embeddings = {"model": embed(adata, options.model), "PCA, training cells": embed_with_pca(adata, options.data)}
    result: dict[str, Any] = {}
    for method, embedding in embeddings.items():
        scores, clusters = best_clusters(embedding, adata.obs["label"].to_numpy(str))
        table = pd.crosstab(adata.obs["label"].to_numpy(str), clusters, rownames=["cell type"], colnames=["cluster"])
        result[method] = {**scores, "cells": {str(one): of_types.to_dict() for one, of_types in table.items()}}
        print(f"\n{name}, {method}: {scores}\n{table.to_string()}")
        if method == "model":
            result[method]["markers"] = marker_genes(adata, clusters)
            print(pd.DataFrame(result[method]["markers"]).to_string(index=False))
    write_result(f"quality/clusters_{options.set}", result)


def embed_with_pca(adata: AnnData, data: Path) -> np.ndarray:
    """Return the components of PCA that was fitted on the training cells. Shape (cells, components)."""
    counts, genes, sets = join_sets({name: anndata.read_h5ad(data / f"{name}.h5ad") for name in TRAINED})
    pca = fit_pca(counts, genes, sets, 0)
    return pca.transform(csr_matrix(adata.X), list(adata.var_names))


def best_clusters(embedding: np.ndarray, labels: np.ndarray) -> tuple[dict[str, float], np.ndarray]:
    """Return scores and Leiden clusters at the resolution whose clusters have the highest NMI with the labels."""
    cells = AnnData(np.zeros((len(embedding), 1), np.float32), obsm={"X": embedding})
    scanpy.pp.neighbors(cells, use_rep="X")
    found = []
    for resolution in RESOLUTIONS:
        scanpy.tl.leiden(cells, resolution, flavor="igraph", n_iterations=2, directed=False)
        clusters = cells.obs["leiden"].to_numpy(str)
        found.append((normalized_mutual_info_score(labels, clusters), resolution, clusters))
    nmi, resolution, clusters = max(found, key=lambda one: one[0])
    ari = adjusted_rand_score(labels, clusters)
    return {"NMI": round(nmi, 4), "ARI": round(ari, 4), "resolution": float(resolution)}, clusters


def marker_genes(adata: AnnData, clusters: np.ndarray) -> dict[str, list[str]]:
    """Return the genes with the highest t statistic of each cluster against all other cells."""
    cells = AnnData(csr_matrix(adata.X), pd.DataFrame({"cluster": clusters}, index=adata.obs_names))
    cells.var_names = adata.var["feature_name"].astype(str).to_numpy()
    cells.var_names_make_unique()
    scanpy.pp.normalize_total(cells, target_sum=1e4)
    scanpy.pp.log1p(cells)
    sizes = cells.obs["cluster"].value_counts()
    large = sorted(sizes.index[sizes > 1])
    scanpy.tl.rank_genes_groups(cells, "cluster", groups=large, method="t-test")
    return {name: [str(gene) for gene in cells.uns["rank_genes_groups"]["names"][name][:MARKERS]] for name in large}


if __name__ == "__main__":
    main()
