"""Explain why a file cannot be read: most often it is locked or of another kind, and not damaged.

`validation.py` catches the errors of h5py, anndata and the other readers, and raises what is returned here.
"""

import errno
import os
import re
from contextlib import suppress
from pathlib import Path

from scgpt_hf.file_kinds import describe_file

_LOCKED = (
    "another program has the file open for writing; close it there (adata.file.close() in Python), or read a copy of it"
)
_NO_LOCKS = "the file system does not support locks; set the environment variable HDF5_USE_FILE_LOCKING=FALSE"
# What the libraries report → what it means and what to do. None of these files is damaged, except the truncated one.
_CAUSES = tuple(
    (re.compile(pattern), explanation)
    for pattern, explanation in (
        (
            r"already open for|consistency flags",
            f"{_LOCKED}; if no program has, its writer crashed: copy it again, or repair it with h5clear -s",
        ),
        (r"[Tt]runcated file", "the file is incomplete: copy or download it again"),
        (
            r"No read method registered|[Uu]nknown encoding type",
            "unless it is damaged, a newer anndata has written it: update anndata (pip install -U anndata)",
        ),
        (
            r"[Rr]equired filter|filter.* is not registered|filter plugin|can't open directory.*plugin",
            "it is compressed by a filter that h5py lacks; write it again with compression='gzip'",
        ),
        (
            r"does not support dtype|[Uu]nsupported (data )?type|No conversion path",
            "it holds numbers of a type that SciPy lacks; write it again with counts of type float32 or int32",
        ),
    )
)
_DAMAGED = "if it is damaged or incomplete, copy it again, or write it again with anndata"


def explain_read_error(error: Exception, path: str, what: str) -> OSError | ValueError:
    """Return the error to raise for an error of a library that reads a file.

    Args:
        error: the error of the library.
        path: the file.
        what: what the file is read as, e.g. "an .h5ad file".

    Returns:
        An OSError of the same number if the operating system caused the error, else a ValueError.
    """
    reason = str(error).splitlines()[0] if str(error) else type(error).__name__
    number = error.errno if isinstance(error, OSError) else None
    if "lock" in reason and number is not None:
        is_locked = number in (errno.EAGAIN, errno.EACCES)
        return OSError(number, f"cannot open {path!r}: {_LOCKED if is_locked else _NO_LOCKS}")
    if number is not None:
        return OSError(number, f"cannot read {path!r}: {os.strerror(number)}")
    return ValueError(f"cannot read {path!r} as {what}: {_explain(reason, error, path)}")


def _explain(reason: str, error: Exception, path: str) -> str:
    """Return why a file cannot be read, and what to do."""
    if isinstance(error, MemoryError):
        return f"there is not enough memory ({reason}), unless the file is damaged"
    for pattern, explanation in _CAUSES:
        if pattern.search(reason):
            return f"{reason}; {explanation}"
    if "signature not found" in reason:
        with suppress(OSError):  # the file may be gone by now
            return f"it is {describe_file(path) or 'not an HDF5 file, or its beginning is damaged'}"
    if missing := re.search(r"object '(obs|var|X)' doesn't exist", reason):
        return (
            f"{missing[1]!r} is missing; an .h5ad file has 'obs', 'var' and 'X'{_list_groups(path)}; save the data as "
            "an AnnData (adata.write_h5ad)"
        )
    return f"{reason}; {_DAMAGED}"


def _list_groups(path: str) -> str:
    """Return a part of a sentence with the top-level groups of an HDF5 file, empty if it cannot be read."""
    if not Path(path).is_file():
        return ""
    import h5py

    with suppress(Exception), h5py.File(path, "r") as file:  # a damaged file raises many unrelated types
        return f", this file has {sorted(file)[:10]}"
    return ""
