"""What every benchmark here shares: arms measured in turn, medians and ratios, and a JSON that names the machine.

Two arms are only compared within one run, alternately, so that whatever else the machine does falls on both.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
LIBRARIES = (
    *("scgpt_hf", "torch", "transformers", "datasets", "tiledbsoma", "tiledbsoma-ml"),
    *("numpy", "numba", "pyarrow"),
)


def alternate(arms: Mapping[str, Callable[[], float | None]], repeats: int = 3) -> dict[str, float]:
    """Return the median of each arm over `repeats` rounds, in each of which every arm runs once.

    Args:
        arms: name → what to run. It returns its figure, e.g. cells per second; or None, and its figure is the seconds
            it took.
        repeats: rounds. A first round to warm up is the caller's to make.
    """
    figures: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            started = time.perf_counter()
            figure = arm()
            figures[name].append(time.perf_counter() - started if figure is None else float(figure))
    return {name: statistics.median(values) for name, values in figures.items()}


def ratios(medians: Mapping[str, float], base: str) -> dict[str, float]:
    """Return each median divided by that of the arm `base`."""
    return {name: value / medians[base] for name, value in medians.items()}


def print_medians(medians: Mapping[str, float], base: str, unit: str) -> None:
    """Print one line per arm: its median and its ratio to the arm `base`."""
    for name, ratio in ratios(medians, base).items():
        print(f"{name:<44} {medians[name]:>14,.1f} {unit:<10} {ratio:>8.2f} x")


def write_result(name: str, data: Mapping[str, Any]) -> Path:
    """Write `data`, the command, the date and the machine to `results/NAME.json` and return its path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folder, sys.argv[1:])])
    record = {"command": command, "measured": datetime.now(UTC).date().isoformat(), "machine": describe_machine()}
    beside = path.with_suffix(".part")
    beside.write_text(json.dumps({**record, **data}, indent=2) + "\n", encoding="utf-8")
    beside.rename(path)
    print(f"written to {path}")
    return path


def describe_machine() -> dict[str, Any]:
    """Return CPU, cores, memory, GPU, system, versions and the load now; no name of a host, user or folder."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": _gpu_name(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "versions": {"python": platform.python_version()} | _versions(),
    }


def peak_memory_gb() -> float:
    """Return the most memory this process has held at once, in GB."""
    if sys.platform == "linux":  # there a child inherits its parent's peak in `getrusage`
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def _without_folder(argument: str) -> str:
    """Return an argument with only the last part of a path in it, so that no machine's folders are published."""
    flag, equals, value = argument.rpartition("=")
    return f"{flag}{equals}{Path(value).name if '/' in value else value}"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _gpu_name() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _versions() -> dict[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
