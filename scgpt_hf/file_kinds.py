"""Name what a file is by its first bytes, for the error about a file that is not what its name says.

A failed download, a file that Git LFS has not fetched, or a compressed file often keeps the name of the data. A library
that reads it reports damage; the advice to copy the file again would not help.
"""

from pathlib import Path

# First bytes → what such a file is, and what to do. The first entry that matches is used.
_KINDS = (
    (b"version https://git-lfs", "a Git LFS pointer, not the data; fetch the data with `git lfs pull`"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
    (b"\x1f\x8b", "a gzip file; decompress it with gunzip"),
    (b"BZh", "a bzip2 file; decompress it with bunzip2"),
    (b"\xfd7zXZ\x00", "an xz file; decompress it with unxz"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard file; decompress it with unzstd"),
    (b"PK\x03\x04", "a ZIP archive"),
    (b"\x80", "a Python pickle"),
    (b"%%MatrixMarket", "a matrix in Matrix Market format, which 10x writes"),
    (b"%PDF", "a PDF document"),
)
_MARKUP = "a web page or XML, not the data; the server probably answered with an error: download the file again"


def describe_file(path: str | Path) -> str | None:
    """Return the kind of a file and what to do with it, or None if its first bytes belong to no known kind.

    Args:
        path: a file that you may read.
    """
    with Path(path).open("rb") as file:
        first = file.read(512)
    if not first:
        return "an empty file; copy or download it again"
    if first.lstrip().startswith(b"<"):
        return _MARKUP
    # A safetensors file begins with the length of its header, 8 bytes, and the header, which is JSON.
    if first[8:9] == b"{" and int.from_bytes(first[:8], "little") < 10**8:
        return "a safetensors file"
    return next((kind for start, kind in _KINDS if first.startswith(start)), None)
