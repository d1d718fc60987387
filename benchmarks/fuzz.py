"""Damage inputs at random and see that the answer is our error and an untouched disk.

  python benchmarks/fuzz.py --minutes 10 --seed 0
  python benchmarks/fuzz.py --seed 1234 --only h5ad --count 1        one example again

Sources, caches, settings, run folders, models and checkpoints, damaged as in `tests/faults/damage.py`. Every failure is
printed with the seed that repeats it; a run over all cases writes benchmarks/results/fuzz.json. A crash of the process
itself, or an example that does not end, is a failure too: the examples run in a child process, a few hundred at a time.
A hang of the HDF5 library (`--only h5ad --seed 12`) has to end as the error of `scgpt_hf/cells/h5ad_probe.py`.
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

TESTS = Path(__file__).resolve().parents[1] / "tests"
TOGETHER = 50  # examples of a child process
JOIN_TIMEOUT_S = 120


def run(
    names: list[str], inputs: str, seeds: range, results: "multiprocessing.SimpleQueue[tuple[str, int, str]]"
) -> None:
    """Check every case at every seed; say beforehand which one it is, so that a crash has a name."""
    sys.path[:0] = [str(TESTS), str(TESTS / "faults")]
    warnings.simplefilter("ignore")
    logging.disable()
    from damage import check
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()

    for seed in seeds:
        for name in names:
            results.put((name, seed, "began"))
            signal.alarm(JOIN_TIMEOUT_S)  # an example that hangs ends its process, by name
            with tempfile.TemporaryDirectory() as folder:
                try:
                    ended = check(name, Path(inputs), Path(folder), seed).rpartition(" -> ")[2].partition(":")[0]
                except AssertionError as error:
                    ended = f"FAILED {error}".replace(folder, "…")
            results.put((name, seed, ended))


def main() -> None:
    """Run until the time is over, print what failed, and end with 1 if anything did."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=1.0, help="how long (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the first example (default: %(default)s)")
    parser.add_argument("--count", type=int, help="seeds to run, instead of minutes")
    parser.add_argument("--only", nargs="*", help="cases to run (default: all)")
    options = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS / "faults")]
    warnings.simplefilter("ignore")
    import conftest
    from damage import CASES, make_inputs

    from scgpt_hf.cells.soma.build import build_census

    names, began, counts, failures = options.only or list(CASES), time.monotonic(), Counter[str](), []
    with tempfile.TemporaryDirectory() as scratch:
        cells = [conftest._synthetic_cells(1, range(190), 160, ["a", "b", "c"], "first")]
        cells[0].write_h5ad(Path(scratch) / "first.h5ad")
        census = build_census([Path(scratch) / "first.h5ad"], Path(scratch) / "soma")
        (Path(scratch) / "inputs").mkdir()
        inputs = make_inputs(cells, census, Path(scratch) / "inputs")
        seed, last = options.seed, options.seed + (options.count or 10**12)
        while seed < last and (options.count or time.monotonic() - began < 60 * options.minutes):
            context = multiprocessing.get_context("spawn")
            results = context.SimpleQueue()
            until = min(seed + max(1, TOGETHER // len(names)), last)
            child = context.Process(target=run, args=(names, str(inputs), range(seed, until), results))
            child.start()
            latest = ("", 0, "")
            while child.is_alive() or not results.empty():
                if results.empty():
                    time.sleep(0.05)
                    continue
                latest = results.get()
                if latest[2] != "began":
                    counts[f"{latest[0]} {latest[2].split()[0]}"] += 1
                if latest[2].startswith("FAILED"):
                    failures.append(latest[2])
                    print(latest[2], flush=True)
            if child.exitcode:
                failures.append(f"{latest[0]} {latest[1]}: the process died with {child.exitcode}")
                print(failures[-1], flush=True)
            seed = until
    print(f"{counts.total():,} examples, {len(failures)} failures")
    if not options.only:
        minutes = round((time.monotonic() - began) / 60, 1)
        found = {"seeds": [options.seed, seed], "minutes": minutes, "failures": failures}
        write_result("fuzz", found | {"examples": counts.total(), "endings": dict(sorted(counts.items()))})
    sys.exit(bool(failures))


if __name__ == "__main__":
    main()
