"""Real blood cells, to fit simple methods to and to score them on."""

from pathlib import Path
from typing import NamedTuple

import anndata
import numpy as np
import pytest
from scipy.sparse import csr_matrix, vstack


class Cells(NamedTuple):
    """Cells with raw counts (cells, genes), the id of each gene, and the batch and label of each cell."""

    counts: csr_matrix
    genes: list[str]
    batches: np.ndarray
    labels: np.ndarray


@pytest.fixture(scope="session")
def training_cells(shared: Path) -> Cells:
    """2,200 cells of two chemistries of one tissue, with the genes that both measured."""
    parts = [anndata.read_h5ad(shared / "data" / "blood" / f"pbmc1k_{name}_10x.h5ad") for name in ("v2", "v3")]
    genes = parts[0].var_names.intersection(parts[1].var_names)
    counts = vstack([csr_matrix(part[:, genes].X) for part in parts], format="csr")
    batches = np.repeat(["v2", "v3"], [part.n_obs for part in parts])
    return Cells(counts, genes.tolist(), batches, np.full(len(batches), "unknown"))


@pytest.fixture(scope="session")
def other_cells(shared: Path) -> Cells:
    """500 cells of four types, of another donor and laboratory."""
    cells = anndata.read_h5ad(shared / "data" / "blood" / "pbmc3k_10x.h5ad")
    cells = cells[cells.obs["cell_type_coarse"].isin(["T cell", "B cell", "monocyte", "NK cell"]).to_numpy()]
    cells = cells[np.sort(np.random.default_rng(0).permutation(cells.n_obs)[:500])]
    labels = cells.obs["cell_type_coarse"].to_numpy(str)
    return Cells(csr_matrix(cells.X), cells.var_names.tolist(), cells.obs["donor_id"].to_numpy(str), labels)
