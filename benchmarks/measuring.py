"""Shared by all benchmarks: alternating measurements, medians and ratios, and a JSON file that describes the machine.

The variants that a benchmark compares are called arms. They are measured alternately in one run, so that other load on
the machine affects all of them.
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
    """Run every arm once per round, and return the median of each arm.

    Args:
        arms: name → function. It returns its result, such as cells per second; if it returns None, its result is the
            time it took, in seconds.
        repeats: number of rounds. There is no warm-up round; call this function twice if you need one.
    """
    figures: dict[str, list[float]] = {name: [] for name in arms}
    for _ in range(repeats):
        for name, arm in arms.items():
            started = time.perf_counter()
            figure = arm()
            figures[name].append(time.perf_counter() - started if figure is None else float(figure))
    return {name: statistics.median(values) for name, values in figures.items()}


def ratios(medians: Mapping[str, float], base: str) -> dict[str, float]:
    """Divide each median by the median of the arm `base`."""
    return {name: value / medians[base] for name, value in medians.items()}


def print_medians(medians: Mapping[str, float], base: str, unit: str) -> None:
    """Print one line per arm: its median and its ratio to the arm `base`."""
    for name, ratio in ratios(medians, base).items():
        print(f"{name:<44} {medians[name]:>14,.1f} {unit:<10} {ratio:>8.2f} x")


def write_result(name: str, data: Mapping[str, Any], path: Path | None = None) -> Path:
    """Write `data` with the command, the date and the machine to `path` or `results/NAME.json`, and return the path."""
    path = RESULTS / f"{name}.json" if path is None else path
    path.parent.mkdir(exist_ok=True)
    command = " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *map(_without_folder, sys.argv[1:])])
    record = {"command": command, "measured": datetime.now(UTC).date().isoformat(), "machine": describe_machine()}
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps({**record, **data}, indent=2) + "\n", encoding="utf-8")
    temporary.rename(path)
    print(f"wrote {path}")
    return path


def describe_machine() -> dict[str, Any]:
    """Return CPU, cores, memory, GPU, system, versions and current load; no names of hosts, users or folders."""
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
    """Return the peak memory of this process, in GB."""
    if sys.platform == "linux":  # not `getrusage`, where a child process inherits the peak of its parent
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line.split()[1] for line in lines if line.startswith("VmHWM:"))) / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e9  # bytes on macOS


def _without_folder(argument: str) -> str:
    """Shorten a path in an argument to its last part, so that folders of the machine are not published."""
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
