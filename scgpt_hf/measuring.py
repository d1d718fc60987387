"""Measure the memory of this process, and write durations as text, for everything that estimates the cost of a run."""

import resource
import sys

import torch


def peak_memory(device: torch.device) -> float:
    """Return the peak memory so far in bytes: of the GPU, or of the process on a CPU."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    unit = 1 if sys.platform == "darwin" else 1024  # macOS reports bytes, Linux KiB
    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)


def format_duration(seconds: float) -> str:
    """Return seconds as text: seconds, minutes or hours.

    Example:
        >>> format_duration(42), format_duration(4200), format_duration(42_000)
        ('42 s', '70 min', '11.7 h')
    """
    if seconds < 0.5:
        return "less than a second"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
