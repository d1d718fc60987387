"""The data a newcomer trains on when told nothing: 700 real blood cells that come with scanpy.

Decides how their counts are recovered and what donors they are given. The result is an ordinary local Census, written
by `cells/build.py`, so the demo takes the same path as 160 million cells. Needs no network.
"""

import logging
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd
from anndata import AnnData
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

logger = logging.getLogger(__name__)

TARGET_SUM = 10_000  # counts per cell after scanpy's normalisation of this data set
ROUNDING = 0.0005  # the log values are stored to three decimals
N_CELLS = 700


def demo_census(folder: str | Path) -> Path:
    """Return a local Census with scanpy's 700 PBMCs (`pbmc68k_reduced`), built at `folder` unless it is there already.

    The counts are the original ones of 765 genes, recovered exactly and checked. The cells are all from one donor
    ("donor A" of Zheng et al. 2017), run in eight wells. **The wells stand in for donors** (`donor_id` "pbmc68k_well_1"
    to "pbmc68k_well_8"), so that the demo can split by donor as every run does; its validation loss therefore says
    nothing about new people. Genes are known by symbol only, and `feature_id` is the symbol.

    Raises:
        ValueError: scanpy's data are not as expected and whole counts cannot be recovered, or something else is at
            `folder`.

    Source: scanpy `datasets/_datasets.py:pbmc68k_reduced`; Zheng et al. 2017, Nature Communications 8:14049.
    """
    from scgpt_hf.cells.soma.build import build_census
    from scgpt_hf.cells.source import open_source

    folder = Path(folder)
    if not folder.exists():
        with TemporaryDirectory() as scratch:
            path = Path(scratch) / "pbmc68k_reduced.h5ad"
            demo_cells().write_h5ad(path)
            build_census([path], folder)
    if (n_cells := len(open_source(folder).obs())) != N_CELLS:
        raise ValueError(f"{str(folder)!r} holds {n_cells:,} cells, not the demo's {N_CELLS}; choose another folder")
    logger.info("demo data in %s: 700 real cells of one donor; its eight sequencing wells stand in for donors", folder)
    return folder


def demo_cells() -> AnnData:
    """Return the cells as an AnnData: raw counts in X, and the obs columns of the Census that are known.

    Raises:
        ValueError: as `demo_census`.
    """
    from scanpy.datasets import pbmc68k_reduced

    reduced = pbmc68k_reduced()
    counts = recover_counts(csr_matrix(reduced.raw.X), reduced.obs["n_counts"].to_numpy())
    wells = reduced.obs_names.str.extract(r"-(\d+)$", expand=False)
    obs = pd.DataFrame(
        {
            "donor_id": "pbmc68k_well_" + wells,
            "cell_type": reduced.obs["bulk_labels"].astype(str).to_numpy(),
            "assay": "10x 3' v1",
            "disease": "normal",
            "tissue": "blood",
            "tissue_general": "blood",
            "tissue_type": "tissue",
            "suspension_type": "cell",
            "is_primary_data": True,
        },
        index=reduced.obs_names.astype(str),
    )
    return AnnData(counts, obs, pd.DataFrame(index=reduced.raw.var_names.astype(str)))


def recover_counts(logged: csr_matrix, totals: NDArray[np.floating]) -> csr_matrix:
    """Return the whole counts behind `log1p(counts / totals * 10,000)` rounded to three decimals.

    Args:
        logged: rounded log values. Shape (cells, genes).
        totals: counts of each cell, over all genes ever measured. Shape (cells,).

    Returns:
        float32 counts, each the only whole number that rounds to its log value. Shape (cells, genes).

    Raises:
        ValueError: a log value is not that of a whole count.
    """
    scale = np.repeat(TARGET_SUM / totals.astype(np.float64), np.diff(logged.indptr))
    whole = np.rint(np.expm1(logged.data.astype(np.float64)) / scale)
    miss = np.abs(np.log1p(whole * scale) - logged.data)
    if n_wrong := int((miss > ROUNDING + 1e-6).sum()):
        raise ValueError(
            f"cannot recover raw counts: {n_wrong:,} of {miss.size:,} log values lie up to {miss.max():.2g} from "
            f"that of a whole count, expected at most {ROUNDING}; does scanpy still "
            f"normalise this data set to {TARGET_SUM:,}?"
        )
    return csr_matrix((whole.astype(np.float32), logged.indices, logged.indptr), shape=logged.shape)
