"""Measure what the check for crashes of HDF5 adds to opening a large .h5ad file.

  python benchmarks/h5ad_probe.py
  python benchmarks/h5ad_probe.py --cells 100000 --file cells.h5ad

The file has few counts for each cell, because neither the check nor the opening reads them. Its obs is realistic: an
index with one barcode for each cell, and ten categorical columns. The file is in memory, since it was just written. The
arms run in turn; printed are medians. Processor time is recorded too, that of the check from its child process: on a
busy machine it shows what an idle one would take.
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path
from statistics import median
from unittest.mock import patch

import anndata
import numpy as np
import pandas as pd
from measuring import alternate, print_medians, write_result
from scipy.sparse import csr_matrix

from scgpt_hf.cells.files import probe
from scgpt_hf.cells.files.reader import AnnDataSource

COUNTS_PER_CELL, N_GENES = 8, 30_000
CATEGORIES = {  # columns of obs in the CELLxGENE schema, with a usual number of categories
    **{"assay": 12, "cell_type": 400, "development_stage": 60, "disease": 30, "donor_id": 3000, "sex": 3},
    **{"self_reported_ethnicity": 20, "suspension_type": 2, "tissue": 150, "tissue_general": 40},
}


def write_cells(path: Path, n_cells: int) -> None:
    """Write an .h5ad file."""
    rng = np.random.default_rng(0)
    genes = np.sort(rng.integers(0, N_GENES // COUNTS_PER_CELL, (n_cells, COUNTS_PER_CELL)), axis=1)
    genes += np.arange(COUNTS_PER_CELL) * (N_GENES // COUNTS_PER_CELL)  # ascending and distinct
    indptr = np.arange(0, genes.size + 1, COUNTS_PER_CELL)
    counts = csr_matrix((rng.integers(1, 9, genes.size).astype(np.float32), genes.ravel(), indptr), (n_cells, N_GENES))
    bases = rng.choice(list("ACGT"), (n_cells, 16)).view("<U16").ravel()
    obs = pd.DataFrame(index=[f"{barcode}-1-{cell}" for cell, barcode in enumerate(bases)])
    for name, n_categories in CATEGORIES.items():
        codes = rng.integers(n_categories, size=n_cells)
        obs[name] = pd.Categorical.from_codes(codes, [f"{name} {number}" for number in range(n_categories)])
    var = pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(N_GENES)])
    anndata.AnnData(counts, obs, var).write_h5ad(path)


def check(path: Path, cpu_seconds: list[float]) -> None:
    """Check the file as its first opening in a process does; append the processor time of the child to a list."""
    probe._checked.clear()
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    probe.require_readable([str(path)])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def open_unchecked(path: Path, cpu_seconds: list[float]) -> None:
    """Open the file without the check; append the processor time to a list."""
    before = time.process_time()
    with patch("scgpt_hf.cells.files.contents.require_readable"), AnnDataSource(path):
        cpu_seconds.append(time.process_time() - before)


def main() -> None:
    """Measure and write `results/h5ad_probe.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=1_000_000)
    parser.add_argument("--file", type=Path, help="where to write the cells (default: a temporary file)")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        path = options.file or Path(scratch) / "cells.h5ad"
        if not path.exists():
            write_cells(path, options.cells)
        cpu: dict[str, list[float]] = {"check": [], "opening": []}
        arms = {"check": lambda: check(path, cpu["check"]), "opening": lambda: open_unchecked(path, cpu["opening"])}
        seconds = alternate(arms, options.repeats)
        size = path.stat().st_size / 1e6
    cpu_seconds = {arm: median(times) for arm, times in cpu.items()}
    for name, times in (("elapsed", seconds), ("of processor time", cpu_seconds)):
        print_medians(times, "opening", f"s {name}")
    found = {"seconds": seconds, "cpu_seconds": cpu_seconds, "cpu_seconds_of_each": cpu}
    write_result("h5ad_probe", {"cells": options.cells, "file_mb": size, **found})


if __name__ == "__main__":
    main()
