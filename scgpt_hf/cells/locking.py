"""Keep processes that start at the same time from writing the same file or folder: locks, and renames without loss."""

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

logger = logging.getLogger(__name__)


@contextmanager
def exclusive(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock of a file or folder while you write it. The lock of a process that is killed is released.

    The lock is a hidden file beside `path`. Where none can be created, or the file system has no locks, the block runs
    without one, so the last step of writing should be a rename that does not replace anything; see `rename_new`.

    Args:
        path: the file or folder that is written. It does not have to exist.
        wait: wait for the other process instead of raising. Then look whether it has written `path`.

    Raises:
        FileExistsError: another process holds the lock.

    Example:
        >>> with exclusive(Path("my_census")):  # doctest: +SKIP
        ...     build_it()
    """
    path = path.absolute()
    lock = FileLock(path.with_name(f".{path.name}.lock"), is_singleton=True)  # so that one thread can lock it twice
    new_parent = not path.parent.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        if not wait:
            raise FileExistsError(
                f"another process is writing {path}; wait until it has finished, or choose another folder"
            ) from error
        logger.info("another process is writing %s; waiting for it", path)
        lock.acquire()
    except OSError as error:
        logger.info("writing %s without a lock: %s", path, error)
    try:
        yield
    finally:
        if lock.lock_counter == 1:
            Path(lock.lock_file).unlink(missing_ok=True)
        lock.release()
        if new_parent:
            with suppress(OSError):  # it has files
                path.parent.rmdir()


def rename_new(source: Path, target: Path) -> None:
    """Rename a folder. If two processes want the same name, the first one gets it, and the other one raises.

    Args:
        source: a folder that is complete.
        target: its new name, of nothing or of an empty folder.

    Raises:
        FileExistsError: `target` exists. It is not changed.
    """
    try:
        os.rename(source, target)
    except OSError as error:
        if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
            raise
        raise FileExistsError(f"another process has written {target} meanwhile; it was not replaced") from error
