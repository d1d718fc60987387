"""A small screen whose effects are known: each perturbed gene changes three genes of its own, and doubles add up."""

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix

GENES = [f"GENE{number}" for number in range(24)]
TARGETS = ["GENE0", "GENE1", "GENE2", "GENE3", "OUTSIDE"]  # the last one is not measured
DOUBLES = ["GENE1+GENE0", "GENE2+GENE3", "GENE0+OUTSIDE"]


def effect_of(name: str) -> np.ndarray:
    """Return by how much the rates of the genes change, on the log scale."""
    effect = np.zeros(len(GENES))
    for gene in name.split("+"):
        if gene in TARGETS:
            first = 4 + 3 * TARGETS.index(gene)
            effect[first : first + 3] += (1.2, -1.0, 0.8)
    return effect


def build_screen(n_cells: int = 30, n_controls: int = 60, replicates: int = 2, seed: int = 0) -> AnnData:
    """Return a screen of 24 genes and eight conditions."""
    rng = np.random.default_rng(seed)
    base = rng.uniform(1.5, 3.0, len(GENES))
    names = [f"{gene}+ctrl" for gene in TARGETS] + DOUBLES
    labels = ["ctrl"] * n_controls + [name for name in names for _ in range(n_cells)]
    replicate = np.array([f"rep{index % replicates}" for index in range(len(labels))])
    log_rates = np.stack([base + effect_of(name) for name in labels])
    log_rates += 0.3 * (replicate == "rep1")[:, None] * rng.normal(size=len(GENES))
    counts = rng.poisson(np.exp(log_rates))
    obs = pd.DataFrame({"condition": labels, "replicate": replicate}, index=[f"cell{i}" for i in range(len(labels))])
    obs["total"] = counts.sum(1) + 1000
    adata = AnnData(csr_matrix(counts.astype(np.float32)), obs=obs, var=pd.DataFrame(index=GENES))
    return adata
