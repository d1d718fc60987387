"""The process of a command: settings that make reading faster, and the exit after an error.

Only commands change the state of the process, never an import or a library call.
"""

import ctypes
import logging
import os
import platform
import sys
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import NoReturn

from scgpt_hf.cells.threads import set_background_priority

# Parameters of `mallopt`, from malloc.h of glibc
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -2, -3, -8
_HEAP_BYTES = 64 * 2**20  # glibc returns an empty heap of this size, unless at least M_TOP_PAD bytes stay free
_LARGEST_MMAP_THRESHOLD = _HEAP_BYTES // 2  # the largest value that M_MMAP_THRESHOLD accepts
_LARGEST_TRIM_THRESHOLD = 2**31 - 1  # the largest value that fits an int
_LOGGERS_OF_GENES = ("scgpt_hf.pipeline.genes", "scgpt_hf.tokens.vocabulary_scgpt")


@cache
def tune_process() -> None:
    """Tune this process for a command: keep freed memory, lower the CPU priority of background threads, print less.

    Call it first in a command, or in a script of your own that reads millions of cells, before threads allocate memory.
    Further calls do nothing.

    Example:
        >>> tune_process()  # doctest: +SKIP
    """
    _keep_freed_memory()
    set_background_priority(True)
    hide_short_progress_bars()


def show_log(level: int) -> None:
    """Print the messages of the package as they are, each report on the genes of the data once.

    Training, validation and baselines each match the genes, with the same result.

    Args:
        level: lowest level of the messages, from `logging`.
    """
    logging.basicConfig(format="%(message)s")
    package = logging.getLogger("scgpt_hf")
    package.setLevel(level)
    once = _OncePerMessage()
    for name in _LOGGERS_OF_GENES:
        logging.getLogger(name).addFilter(once)


class _OncePerMessage(logging.Filter):
    """Lets each message pass once."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        message = record.getMessage()
        is_new = message not in self.seen
        self.seen.add(message)
        return is_new


def accept_any_locale() -> None:
    """Let a command print in every locale, and end it if the locale cannot express its arguments or the folder.

    Containers and job schedulers often run with LC_ALL=C. Python then prints ASCII only, and holds paths with other
    characters in a form that no JSON, YAML or HDF5 file can store. Call it first in a command.

    Raises:
        SystemExit: an argument, or the path of the working folder, is not valid text.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    for text in (*sys.argv, os.getcwd()):
        try:
            text.encode()
        except UnicodeEncodeError:
            sys.exit(
                f"{program_name()}: the locale of this process cannot express {text!r}; set PYTHONUTF8=1 and run the "
                "command again, or rename the file to ASCII characters"
            )


def program_name() -> str:
    """Return the name under which the user started this command: `embed.py`, or `scgpt-hf embed`."""
    return Path(sys.argv[0]).name


def exit_with_error(error: Exception) -> NoReturn:
    """End the process with exit code 1 and one line: the name of the command and the message of the error."""
    sys.exit(f"{program_name()}: {error}")


def hide_short_progress_bars() -> None:
    """Hide the bars of transformers for loading and writing weights, one or two for each checkpoint.

    Bars of downloads, of training and of our own work stay.
    """
    from huggingface_hub.constants import HF_HUB_DISABLE_PROGRESS_BARS
    from huggingface_hub.utils.tqdm import enable_progress_bars
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # also hides downloads
    if not HF_HUB_DISABLE_PROGRESS_BARS:  # the user's choice, which the library defends with a warning
        enable_progress_bars()


def _keep_freed_memory() -> None:
    """Make glibc reuse freed memory instead of returning it to the system.

    By default glibc returns freed memory to the system as soon as there is more of it than two large blocks. Each chunk
    of cells then starts with pages that the system has to clear again, which took half of the time of reading
    (measured). Each thread may also keep an arena of freed memory, and TileDB starts several threads for each read; one
    arena for all of them is as fast and smaller.

    Source: `mallopt(3)`.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_ARENA_MAX, 1)
    libc.mallopt(_M_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
    libc.mallopt(_M_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)
    libc.mallopt(_M_TOP_PAD, _HEAP_BYTES)
