"""Damage inputs at random, and check that each one raises an error of this package and that no file changes.

  python benchmarks/fuzz.py --minutes 10 --seed 0
  python benchmarks/fuzz.py --seed 1234 --only h5ad --count 1        repeat one example

The inputs are sources, caches, settings, run folders, models and checkpoints, damaged as in
`tests/support/damage.py`. Every failure is printed with the seed that repeats it. A run over all cases writes
results/fuzz.json. The examples run in child processes, because a crash of the process and an example that does not
end are failures as well. A hang of the HDF5 library (`--only h5ad --seed 12`) must end with the error of
`scgpt_hf/cells/files/probe.py`.
"""

import argparse
import logging
import multiprocessing
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from pathlib import Path

from measuring import write_result

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES_PER_PROCESS = 50
EXAMPLE_TIMEOUT_S = 120


def run(
    names: list[str], inputs: str, seeds: range, results: "multiprocessing.SimpleQueue[tuple[str, int, str]]"
) -> None:
    """Check every case with every seed. Each is announced before it starts, so that a crash can be attributed."""
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    logging.disable()
    from transformers.utils.logging import disable_progress_bar

    from tests.support.damage import check

    disable_progress_bar()

    for seed in seeds:
        for name in names:
            results.put((name, seed, "started"))
            signal.alarm(EXAMPLE_TIMEOUT_S)  # ends the process if the example hangs
            with tempfile.TemporaryDirectory() as folder:
                try:
                    outcome = check(name, Path(inputs), Path(folder), seed).rpartition(" -> ")[2].partition(":")[0]
                except AssertionError as error:
                    outcome = f"FAILED {error}".replace(folder, "…")
            results.put((name, seed, outcome))


def main() -> None:
    """Run until the time is over, print failures, and exit with 1 if there are any."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="duration (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first example (default: %(default)s)")
    parser.add_argument("--count", type=int, help="number of seeds to run, instead of a duration")
    parser.add_argument("--only", nargs="*", help="cases to run (default: all)")
    options = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    warnings.simplefilter("ignore")
    from scgpt_hf.cells.soma.build import build_census
    from tests.support.damage import CASES, make_inputs
    from tests.support.synthetic import synthetic_cells

    names, started, counts, failures = options.only or list(CASES), time.monotonic(), Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch:
        cells = [synthetic_cells(1, range(190), 160, ["a", "b", "c"], "first")]
        cells[0].write_h5ad(Path(scratch) / "first.h5ad")
        census = build_census([Path(scratch) / "first.h5ad"], Path(scratch) / "soma")
        (Path(scratch) / "inputs").mkdir()
        inputs = make_inputs(cells, census, Path(scratch) / "inputs")
        seed, last = options.seed, options.seed + (options.count or 10**12)
        while seed < last and (options.count or time.monotonic() - started < 60 * options.minutes):
            context = multiprocessing.get_context("spawn")
            results = context.SimpleQueue()
            until = min(seed + max(1, EXAMPLES_PER_PROCESS // len(names)), last)
            child = context.Process(target=run, args=(names, str(inputs), range(seed, until), results))
            child.start()
            latest = ("", 0, "")
            while child.is_alive() or not results.empty():
                if results.empty():
                    time.sleep(0.05)
                    continue
                latest = results.get()
                if latest[2] != "started":
                    counts[f"{latest[0]} {latest[2].split()[0]}"] += 1
                if latest[2].startswith("FAILED"):
                    failures.append(latest[2])
                    print(latest[2], flush=True)
            if child.exitcode:
                failures.append(f"{latest[0]} {latest[1]}: the process ended with exit code {child.exitcode}")
                print(failures[-1], flush=True)
            seed = until
    print(f"{counts.total():,} examples, {len(failures)} failures")
    if not options.only:
        minutes = round((time.monotonic() - started) / 60, 1)
        found = {"seeds": [options.seed, seed], "minutes": minutes, "failures": failures}
        write_result("fuzz", found | {"examples": counts.total(), "outcomes": dict(sorted(counts.items()))})
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
