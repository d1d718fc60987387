"""Read the presence matrix of a Census: which genes each of its data sets measured.

The matrix is `ms/RNA/feature_dataset_presence_matrix`. Its rows are the data sets of the table `census_info/datasets`,
its columns the genes of var, both by `soma_joinid`.
"""

from typing import Any

import numpy as np
import pandas as pd
import tiledbsoma as soma

from scgpt_hf.cells.soma.layout import PRESENCE


def read_presence(experiment_uri: str, n_genes: int, context: soma.SOMATileDBContext) -> pd.DataFrame | None:
    """Return the genes that each data set measured.

    Args:
        experiment_uri: the experiment of one organism, `.../census_data/ORGANISM`.
        n_genes: number of genes of var.
        context: how to open the arrays.

    Returns:
        Booleans, indexed by `dataset_id`. Shape (datasets, genes). None if the SOMA has no presence matrix, or no table
        of data sets: the experiment may have been copied without the rest of its Census.

    Raises:
        ValueError: the matrix has other rows than the table of data sets, or other columns than var.
    """
    datasets_uri = f"{experiment_uri.rstrip('/').rsplit('/', 2)[0]}/census_info/datasets"
    with soma.Experiment.open(experiment_uri, context=context) as experiment:
        rna: Any = experiment.ms["RNA"]
        if PRESENCE not in rna or not soma.DataFrame.exists(datasets_uri, context=context):
            return None
        entries = rna[PRESENCE].read().tables().concat().to_pandas()
    with soma.DataFrame.open(datasets_uri, context=context) as frame:
        datasets = frame.read(column_names=["soma_joinid", "dataset_id"]).concat().to_pandas()
    entries = entries[entries["soma_data"] != 0]
    rows = pd.Index(datasets["soma_joinid"]).get_indexer(entries["soma_dim_0"])
    genes = entries["soma_dim_1"].to_numpy()
    if (rows < 0).any() or (genes >= n_genes).any():
        raise ValueError(
            f"{experiment_uri}: {PRESENCE} does not fit the {n_genes:,} genes of var and the {len(datasets):,} data "
            f"sets of {datasets_uri}; is the copy complete?"
        )
    measured = np.zeros((len(datasets), n_genes), np.bool_)
    measured[rows, genes] = True
    return pd.DataFrame(measured, index=datasets["dataset_id"].astype(str))
