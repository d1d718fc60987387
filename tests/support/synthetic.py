"""Small synthetic blood cells with raw counts, and the obs columns of the Census."""

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix


def synthetic_cells(seed: int, genes: range, n_cells: int, donors: list[str], dataset_id: str) -> AnnData:
    """Return blood cells of four types with ten marker genes each.

    Args:
        seed: of the counts. A gene has the same rates for every seed.
        genes: numbers of the genes, from 0 to 199.
        n_cells: number of cells.
        donors: donors; they take turns.
        dataset_id: data set of all cells.
    """
    rates = np.random.default_rng(0).gamma(0.4, 2.0, size=(4, 200))
    for cell_type in range(4):
        rates[cell_type, 10 * cell_type : 10 * cell_type + 10] += 8
    rng = np.random.default_rng(seed)
    columns = rng.permutation(genes)
    cell_type = rng.integers(4, size=n_cells)
    counts = rng.poisson(rates[cell_type][:, columns] * rng.gamma(5, 0.1, size=(n_cells, 1)))
    obs = pd.DataFrame(
        {
            "cell_type": np.array(["T cell", "B cell", "monocyte", "NK cell"])[cell_type],
            "donor_id": np.array(donors)[np.arange(n_cells) % len(donors)],
            "dataset_id": dataset_id,
            "assay": "10x 3' v3",
            "tissue_general": "blood",
            "disease": np.where(np.arange(n_cells) % len(donors) == 0, "COVID-19", "normal"),
            "suspension_type": "cell",
            "is_primary_data": np.arange(n_cells) % 10 != 9,
        },
        index=[f"{dataset_id}-{cell}" for cell in range(n_cells)],
    )
    var = pd.DataFrame(
        {"feature_name": [f"GENE{gene}" for gene in columns]}, index=[f"ENSG{gene:011d}" for gene in columns]
    )
    return AnnData(csr_matrix(counts.astype(np.float32)), obs, var)
