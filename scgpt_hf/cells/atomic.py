"""Write files atomically: under a temporary name, flushed to the disk, and then renamed.

Readers therefore find the old file or the complete new one, even after a crash of the machine.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


@contextmanager
def replace_file(path: Path, *, folder: Path | None = None) -> Iterator[Path]:
    """Yield a temporary path for a new version of a file, and rename it to `path` at the end of the block.

    If the block raises, `path` is left as it was, and the temporary file is removed.

    Args:
        path: the file to write.
        folder: folder for the temporary file, on the same disk as `path`; by default the folder of `path`, because a
            file can be renamed in one step only within a file system.

    Raises:
        OSError: the file cannot be flushed or renamed.

    Example:
        >>> with replace_file(Path("figure.png")) as temporary:  # doctest: +SKIP
        ...     figure.savefig(temporary, format="png")
    """
    # Several processes may write the same file at the same time: each writes another temporary file.
    temporary = (folder or path.parent) / f".{path.name}.{uuid4().hex[:8]}.part"
    try:
        yield temporary
        flush_to_disk([temporary])
        os.replace(temporary, path)
        flush_to_disk([path.parent])  # the new name is stored in the parent folder
    finally:
        temporary.unlink(missing_ok=True)


def write_atomically(path: Path, text: str, *, temporary_folder: Path | None = None) -> None:
    """Write a text file to the disk, or leave the old one untouched if writing fails or the machine crashes.

    Args:
        path: the file.
        text: its new content.
        temporary_folder: see `replace_file`.

    Raises:
        OSError: the file cannot be written.
    """
    try:
        with replace_file(path, folder=temporary_folder) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise type(error)(error.errno, f"cannot write {path}: {error.strerror}", error.filename) from error


def flush_to_disk(paths: Iterable[Path]) -> None:
    """Flush files and folders to the disk, so that they survive a crash of the machine."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
