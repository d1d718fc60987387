"""Measure the speed of `scripts/pretrain.py` itself, and the share of its time that it waits for data.

  python benchmarks/trainer_speed.py --data CACHE --seconds 60 --flags "--torch_compile true"
  python benchmarks/trainer_speed.py --make /tmp/cells --cells 100000       # random cells, in a new cache

The process is stopped after `--seconds` of training. The last line is JSON: medians over the lines of metrics.jsonl.
"""

import argparse
import json
import math
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

_MEASURED = ("cells_per_second", "tokens_per_second", "waiting_share", "mfu")
_WARM_UP_LINES = 2  # they include compilation
PRETRAIN = Path(__file__).resolve().parents[1] / "scripts" / "pretrain.py"


def main() -> None:
    """Train for a while, and print the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", help="cache, Census or .h5ad files")
    parser.add_argument("--make", type=Path, help="folder of a cache to make of random cells, instead of --data")
    parser.add_argument("--cells", type=int, default=100_000, help="number of random cells (default: %(default)s)")
    parser.add_argument("--mean_tokens", type=int, default=120, help="their mean tokens (default: %(default)s)")
    parser.add_argument("--seconds", type=float, default=60, help="seconds of training (default: %(default)s)")
    parser.add_argument("--flags", default="", help='flags of pretrain.py, e.g. "--torch_compile true"')
    options = parser.parse_args()
    data = options.data
    if options.make:
        from synthetic_cells import write_cells

        data = [str(write_cells(options.make, options.cells, options.mean_tokens))]
    print(json.dumps(measure_trainer(data, shlex.split(options.flags), options.seconds)))


def measure_trainer(data: Sequence[str], flags: Sequence[str], seconds: float, limit: float = 3600) -> dict[str, Any]:
    """Run scripts/pretrain.py, stop it after some seconds of training, and return medians over its log.

    Args:
        data: addresses of the cells.
        flags: more flags of pretrain.py.
        seconds: duration of the training after its first log line.
        limit: duration after which it is stopped anyway.

    Raises:
        RuntimeError: the run ended before it had logged enough lines.
    """
    with tempfile.TemporaryDirectory() as folder:
        command = [
            *(sys.executable, str(PRETRAIN), "--data", *data, "--output_dir", folder + "/run"),
            *("--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
            *("--num_train_epochs", "1000", "--logging_steps", "10", "--disable_tqdm", "true", *flags),
        ]
        process = subprocess.Popen(command)
        started, stop_at = time.monotonic(), math.inf
        while process.poll() is None and time.monotonic() < min(stop_at, started + limit):
            time.sleep(0.2)
            if stop_at == math.inf and _logged(folder):
                stop_at = time.monotonic() + seconds
        process.terminate()  # pretrain.py stops after its current step
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
        lines = _logged(folder)[_WARM_UP_LINES:]
    if not lines:
        raise RuntimeError(f"pretrain.py logged too few lines (exit code {process.returncode}): see above")
    medians = {key: float(np.median([line[key] for line in lines])) for key in _MEASURED if key in lines[0]}
    return {"flags": " ".join(flags), "log_lines": len(lines), **medians}


def _logged(folder: str) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl that have the training speed."""
    path = Path(folder) / "run" / "metrics.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if "cells_per_second" in line]


if __name__ == "__main__":
    main()
