"""`compiled`: the decorator of compiled functions. Their machine code is cached on disk wherever a folder is writable.

`tokens/sampling_scgpt.py` has another such decorator, because its files are also used without this package.
"""

import logging
import os
import stat
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import gettempdir
from typing import Any

from numba import config, njit

logger = logging.getLogger(__name__)


def compiled(function: Callable[..., Any]) -> Any:
    """Compile a function with numba at its first call; it then runs without the GIL.

    numba caches the machine code in `NUMBA_CACHE_DIR`, next to the file of the function, or in the user's cache folder.
    In containers and on clusters often none of them is writable, and numba raises an error. Then this process uses a
    private folder for temporary files, for other libraries, too. Without that, nothing is cached, a warning is logged
    and each process compiles again.

    Args:
        function: the function to compile.

    Returns:
        The compiled function.
    """
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:  # numba found no writable folder for its cache
        config.CACHE_DIR = _temporary_cache() or config.CACHE_DIR  # type: ignore[attr-defined]
    try:
        return njit(nogil=True, cache=True)(function)
    except RuntimeError:
        _warn_of_compilation()
        return njit(nogil=True)(function)


@cache
def _warn_of_compilation() -> None:
    """Log a warning, once in a process."""
    logger.warning(
        "each process compiles all functions again, because no folder for the machine code is writable; set "
        "NUMBA_CACHE_DIR to one that is"
    )


@cache
def _temporary_cache() -> str | None:
    """Return a folder for temporary files to which no other user can write, or None."""
    try:
        folder = Path(gettempdir(), f"scgpt_hf-numba-{os.getuid()}")
        folder.mkdir(mode=0o700, exist_ok=True)
        found = folder.lstat()
    except OSError:
        return None
    # numba unpickles the files of its cache, so a folder that another user made in advance must not be used.
    private = stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o022
    return str(folder) if private else None
