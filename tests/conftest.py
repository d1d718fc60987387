"""Fixtures for all tests: the folder of shared data, and small synthetic cells.

This module imports pytest and the standard library only, so that `pytest -m gpu tests/gpu` runs on a machine with
little more than torch, transformers and numpy. Fixtures import what they need.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import ROOT

if TYPE_CHECKING:
    from anndata import AnnData

# Several test processes share the cores. torch and numpy read this variable when they are first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tests open arrays with TileDB's default settings, which corrupt memory now and then; see `soma/context.py`.
os.environ.setdefault("TILEDB_SM_MEM_MALLOC_TRIM", "false")
# Some tests send SIGINT to a subprocess. A job that a shell starts with `&` ignores SIGINT, and so would its children.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with `data/blood` and `fixtures/scgpt_parity`; tests that need it are skipped if it does not exist."""
    folder = Path(os.environ.get("SCGPT_HF_SHARED", ROOT.parent / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set SCGPT_HF_SHARED to the folder that contains data/ and fixtures/")
    return folder


def _synthetic_cells(seed: int, genes: range, n_cells: int, donors: list[str], dataset_id: str) -> AnnData:
    """Return cells of four types with ten marker genes each; a gene has the same rates in every data set."""
    import numpy as np
    import pandas as pd
    from anndata import AnnData
    from scipy.sparse import csr_matrix

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


@pytest.fixture(scope="session")
def small_cells() -> list[AnnData]:
    """Two data sets of 160 and 140 blood cells. 170 of the 200 genes and one of the 7 donors occur in both."""
    return [
        _synthetic_cells(1, range(190), 160, ["donor_1", "donor_2", "donor_3", "donor_4"], "first"),
        _synthetic_cells(2, range(20, 200), 140, ["donor_4", "donor_5", "donor_6", "donor_7"], "second"),
    ]


@pytest.fixture(scope="session")
def small_census(small_cells: list[AnnData], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A local SOMA in the layout of the Census with the 300 cells of `small_cells`, of which 270 are primary data."""
    from scgpt_hf.cells.soma.build import build_census

    folder = tmp_path_factory.mktemp("census")
    paths = [folder / f"{name}.h5ad" for name in ("first", "second")]
    for path, cells in zip(paths, small_cells, strict=True):
        cells.write_h5ad(path)
    return build_census(paths, folder / "soma")
