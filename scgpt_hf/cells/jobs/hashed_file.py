"""Write a file atomically and hash it while it is written."""

import errno
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import IO, NamedTuple

from scgpt_hf.cells.atomic import replace_file


class WrittenFile(NamedTuple):
    """The SHA-256 of a file in hexadecimal digits, and its size in bytes."""

    sha256: str
    n_bytes: int


class HashedFile:
    """A writable file that computes the hash of what is written."""

    def __init__(self, file: IO[bytes]) -> None:
        """Start at the beginning of an empty file.

        Args:
            file: the file, open for writing.
        """
        self.file, self.sha256, self.n_bytes, self.closed = file, hashlib.sha256(), 0, False

    def write(self, content: bytes) -> int:
        """Write bytes and add them to the hash."""
        self.sha256.update(content)
        self.n_bytes += len(content)
        return self.file.write(content)

    def flush(self) -> None:
        """Do nothing: Arrow flushes after each batch, but the file is flushed once, at its end."""


def write_hashed(
    path: Path,
    fill: Callable[[HashedFile], object],
    *,
    temporary_folder: Path,
    before_rename: Callable[[WrittenFile], object] = lambda written: None,
) -> WrittenFile:
    """Write a file and return its hash and size.

    The file is written to a temporary name, flushed to the disk and then renamed, so `path` is never incomplete, even
    after a power failure.

    Args:
        path: the file to write.
        fill: writes the content to the open file.
        temporary_folder: folder for the temporary file, on the same disk as `path`; created if it does not exist.
        before_rename: called with the hash and size before the file is renamed; if it raises, `path` is not changed.

    Raises:
        OSError: writing failed. If the disk is full, the message says how much space is free.
    """
    temporary_folder.mkdir(exist_ok=True)
    try:
        with replace_file(path, folder=temporary_folder) as temporary:
            with temporary.open("xb") as file:
                hashed = HashedFile(file)
                fill(hashed)
            written = WrittenFile(hashed.sha256.hexdigest(), hashed.n_bytes)
            before_rename(written)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        free = shutil.disk_usage(path.parent).free / 1e9
        raise OSError(
            errno.ENOSPC,
            f"the disk is full: {path} was not written, {free:.2f} GB are free. Free some space, or choose another "
            "folder, then run the same command again; it writes only the missing shards",
        ) from error
    return written
