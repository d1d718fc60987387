"""Check that output can be written before anything is computed, and keep results that could not be written."""

import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path


def require_writable_file(path: str | Path, *, overwrite: bool) -> None:
    """Raise unless a file can be written. Nothing is left behind.

    Args:
        path: the file.
        overwrite: whether the file may exist.

    Raises:
        FileExistsError: the file exists, and `overwrite` is false.
        FileNotFoundError: its folder does not exist.
        IsADirectoryError: the path is a folder.
        OSError: its folder cannot be written to.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file, such as {path / 'cells.h5ad'}")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; choose another name, or overwrite it")
    if not path.parent.exists():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.parent}; create it, or choose another")
    require_writable_folder(path.parent)


def require_writable_folder(folder: str | Path) -> None:
    """Raise unless files can be written to a folder, or the folder can be created. Nothing is left behind.

    Args:
        folder: the folder, which does not have to exist.

    Raises:
        NotADirectoryError: the folder, or a parent of it, is a file.
        ValueError: it is the address of a store, such as `s3://bucket/folder`.
        OSError: the folder, or its nearest parent that exists, cannot be written to.
    """
    if re.match("[a-z][a-z0-9]+:/", str(folder)):  # a Path has one slash less
        raise ValueError(f"cannot write to {folder}: it is not on this machine; write to a folder, then upload that")
    folder = Path(folder).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not existing.is_dir():
        raise NotADirectoryError(f"cannot write to {folder}: {existing} is not a folder; choose another folder")
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write to {folder}: creating a file in {existing} failed ({error.strerror}); choose another folder",
        ) from error


def require_free_folder(folder: Path) -> None:
    """Check that a folder does not exist yet, or is empty.

    Raises:
        FileExistsError: it is a file, or is not empty.
        OSError: it cannot be written to.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; choose a new folder with --out")
    require_writable_folder(folder)


def write_beside(out: str | Path, write: Callable[[Path], object], cause: Exception) -> OSError:
    """Write results to a new folder beside the output that could not be written, or else to the temporary folder.

    Args:
        out: the output that could not be written.
        write: writes the results into a folder, in the simplest format.
        cause: why the output could not be written.

    Returns:
        The error to raise. Its message names the folder with the results.
    """
    out = Path(out)
    failures = []
    for parent in (out.parent, Path(tempfile.gettempdir())):
        try:
            place = Path(tempfile.mkdtemp(prefix=f"{out.name}.unsaved-", dir=parent))
        except OSError as error:
            failures.append(f"{parent}: {error.strerror}")
            continue
        try:
            write(place)
        except Exception as error:  # noqa: BLE001 (whatever failed, the results may still fit into the next folder)
            failures.append(f"{parent}: {error}")
            shutil.rmtree(place, ignore_errors=True)
            continue
        return OSError(f"{out} could not be written: {cause}. The results are not lost: they are in {place}")
    return OSError(f"{out} could not be written: {cause}. The results could not be kept either: {'; '.join(failures)}")
