"""Small caches for tests: cells to write, and the files that were written."""

from pathlib import Path

import anndata
import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix, random_array

SHARD = {"cells_per_shard": 2048}  # so that `make_cells` fills several shards


def make_cells(seed: int = 0, n_cells: int = 9000) -> anndata.AnnData:
    """Return random cells with 12 genes and 1,000 cells per donor."""
    counts = random_array((n_cells, 12), density=0.3, rng=seed, data_sampler=lambda size: np.arange(size) % 300 + 1)
    obs = pd.DataFrame({"donor_id": np.arange(n_cells) // 1000}, index=[str(cell) for cell in range(n_cells)])
    genes = pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(12)])
    return anndata.AnnData(csr_matrix(counts, dtype=np.float32), obs.astype(str), genes)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a folder by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}
