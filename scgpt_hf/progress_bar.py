"""Show how far long work is: one bar on a terminal or in a notebook, one line every half minute in a log file.

The bar of training is in `training/validation/progress.py`, because it also prints metrics.
"""

import logging
import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_DELAY_S = 2.0  # shorter work shows no bar
_SECONDS_BETWEEN_LINES = 30.0
_LINE = "{desc}: {percentage:.0f} %, {n_fmt} of {total_fmt}{unit}, {rate_fmt}, {remaining} left"


def progress_bar(
    items: Iterable[Any] | None = None, *, description: str, unit: str, total: int | None = None, show: bool = True
) -> Any:
    """Return a bar of tqdm, which appears after two seconds.

    Args:
        items: what to iterate over; by default the caller calls `update`.
        description: text before the bar.
        unit: what is counted, in the plural, e.g. "cells".
        total: number of units; by default the length of `items`.
        show: false hides the bar. It is also hidden after `set_verbosity("error")`.

    Returns:
        A `tqdm.tqdm`: an iterable and a context manager.

    Example:
        >>> [cell * 2 for cell in progress_bar(range(3), description="doubling", unit="cells")]
        [0, 2, 4]
    """
    in_notebook = type(sys.stderr).__module__.startswith("ipykernel")
    is_log_file = not sys.stderr.isatty() and not in_notebook
    return (_Lines if is_log_file else tqdm)(
        items,
        desc=description,
        unit=f" {unit}",
        total=total,
        delay=_DELAY_S,
        mininterval=_SECONDS_BETWEEN_LINES if is_log_file else 0.1,
        bar_format=_LINE if is_log_file else None,
        disable=not show or logging.getLogger("scgpt_hf").level >= logging.ERROR,
    )


class _Lines(tqdm):  # type: ignore[misc]
    """Writes each state once, on a new line."""

    written = -1

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Write the line, unless it would repeat the one before; `tqdm` calls it."""
        if self.n != self.written:
            self.written = self.n
            self.fp.write(f"{self}\n")
            self.fp.flush()
