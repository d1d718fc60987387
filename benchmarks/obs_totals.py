"""Measure what it costs to compare the counts of each chunk with the totals in obs.

  python benchmarks/synthetic_census.py blood_20k --cells 20000
  python benchmarks/obs_totals.py blood_20k

The same cells are read with and without the comparison, alternately in one run. The result is processor time of all
threads, because that is what other programs on the machine affect least.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np
from measuring import alternate, print_medians, ratios, write_result

from scgpt_hf.cells.soma.census import CensusSource

WINDOW = 16_384  # cells of one read


def processor_ms(source: CensusSource, cell_ids: np.ndarray, *, compared: bool) -> float:
    """Read all cells and return the processor time, in milliseconds."""
    source._has_totals = compared
    source.__dict__.pop("_totals", None)  # so that reading the totals is measured, too
    started = time.process_time()
    for start in range(0, len(cell_ids), WINDOW):
        source.read(cell_ids[start : start + WINDOW])
    return (time.process_time() - started) * 1e3


def main() -> None:
    """Measure, print and write results/obs_totals.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="folder written by synthetic_census.py")
    parser.add_argument("--repeats", type=int, default=9, help="rounds of each arm (default: %(default)s)")
    arguments = parser.parse_args()
    with CensusSource(f"{arguments.census}/census_data/homo_sapiens") as source:
        cell_ids = source.obs().index.to_numpy()
        arms = {
            "without": partial(processor_ms, source, cell_ids, compared=False),
            "compared with obs": partial(processor_ms, source, cell_ids, compared=True),
        }
        alternate(arms, 2)
        medians = alternate(arms, arguments.repeats)
    print_medians(medians, "without", "ms")
    write_result("obs_totals", {"cells": len(cell_ids), "processor_ms": medians, "ratio": ratios(medians, "without")})


if __name__ == "__main__":
    main()
