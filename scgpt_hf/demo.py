"""The demo data: 700 real blood cells that come with scanpy, used when no other data are configured.

scanpy stores these cells as logarithms of normalized counts, so their raw counts are recovered first. The result is an
ordinary local Census, written by `cells/soma/build.py`: the demo runs the same code as a training on 160 million cells.
It needs no network.
"""

import logging
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

if TYPE_CHECKING:
    from anndata import AnnData

logger = logging.getLogger(__name__)

TARGET_SUM = 10_000  # counts per cell after scanpy's normalization of this dataset
ROUNDING = 0.0005  # largest rounding error of the log values, which are stored with three decimals
N_CELLS = 700


def demo_census(folder: str | Path) -> Path:
    """Build a local Census with scanpy's 700 PBMCs (`pbmc68k_reduced`), unless `folder` already has it.

    The counts are the original raw counts of 765 genes, recovered exactly and checked. All cells are from one donor
    ("donor A" of Zheng et al. 2017) and were sequenced in eight wells. **The wells are used as donors** (`donor_id`
    "pbmc68k_well_1" to "pbmc68k_well_8"), so that the demo can be split by donor like any other run. So its validation
    loss says nothing about new people. The dataset has gene symbols only, and `feature_id` is the symbol.

    If several processes need the folder at the same time, one builds it and the others wait.

    Args:
        folder: folder of the Census.

    Returns:
        `folder`.

    Raises:
        ValueError: raw counts cannot be recovered from the data of this version of scanpy, or `folder` has other data.

    Example:
        >>> folder = demo_census("demo")  # doctest: +SKIP
        >>> len(open_source(folder).obs())  # doctest: +SKIP
        700

    Source: scanpy `datasets/_datasets.py:pbmc68k_reduced`; Zheng et al. 2017, Nature Communications 8:14049.
    """
    from scgpt_hf.cells.locking import exclusive
    from scgpt_hf.cells.soma.build import build_census
    from scgpt_hf.cells.source import open_source

    folder = Path(folder)
    if not folder.exists():
        with exclusive(folder, wait=True), TemporaryDirectory() as scratch, suppress(FileExistsError):
            if not folder.exists():
                path = Path(scratch) / "pbmc68k_reduced.h5ad"
                demo_cells().write_h5ad(path)
                build_census([path], folder)  # raises FileExistsError if there are no locks and another one was faster
    if (n_cells := len(open_source(folder).obs())) != N_CELLS:
        raise ValueError(
            f"{str(folder)!r} has {n_cells:,} cells, expected the {N_CELLS} of the demo; choose another folder"
        )
    logger.info("demo data in %s: 700 real cells of one donor, whose eight sequencing wells are used as donors", folder)
    return folder


def demo_cells() -> "AnnData":
    """Return the cells of the demo as an AnnData, with raw counts in X and obs columns of the Census.

    Raises:
        ValueError: raw counts cannot be recovered from the data of this version of scanpy.

    Example:
        >>> demo_cells().shape
        (700, 765)
    """
    from anndata import AnnData
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
    """Recover raw counts from `log1p(counts / totals * 10,000)`, rounded to three decimals.

    Args:
        logged: rounded log values. Shape (cells, genes).
        totals: counts of each cell, over all genes that were measured. Shape (cells,).

    Returns:
        float32 counts, each of them the only whole number with that log value. Shape (cells, genes).

    Raises:
        ValueError: a log value is not that of a whole number.
    """
    scale = np.repeat(TARGET_SUM / totals.astype(np.float64), np.diff(logged.indptr))
    counts = np.rint(np.expm1(logged.data.astype(np.float64)) / scale)
    errors = np.abs(np.log1p(counts * scale) - logged.data)
    if n_wrong := int((errors > ROUNDING + 1e-6).sum()):
        raise ValueError(
            f"cannot recover raw counts: {n_wrong:,} of {errors.size:,} log values differ by up to {errors.max():.2g} "
            f"from that of a whole number, expected at most {ROUNDING}; does scanpy still normalize this dataset to "
            f"{TARGET_SUM:,} counts per cell?"
        )
    return csr_matrix((counts.astype(np.float32), logged.indices, logged.indptr), shape=logged.shape)
