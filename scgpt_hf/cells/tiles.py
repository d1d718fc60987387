"""The entries of some cells of a sparse array, decompressed without TileDB.

TileDB makes 20 bytes of every entry, in columns as long as its buffers; `bands.py` keeps four. Here a few tiles at a
time become columns that the next step still finds in the nearer caches. The same entries take two thirds of the time
(measured).

Source: `tile.md` of the format specification of TileDB; see `fragments.py`.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
from numba import njit
from numpy.typing import NDArray

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.fragments import Field, PlainArray

_TILES_AT_ONCE = 4  # 5 MB of a Census, decompressed
_HEAD = 12  # bytes before a chunk: its size, its size as stored, and the size of what says how it was filtered
_FILTERED = 16  # bytes of the latter after Zstandard, and 8 more where the bytes of its numbers lie apart

Array: TypeAlias = NDArray[Any]
Bytes: TypeAlias = NDArray[np.uint8]


def read_entries(array: PlainArray, first: int, last: int) -> Iterator[list[Array]]:
    """Yield cell ids, genes and counts of the cells from first to last, and of some others, a few tiles at a time.

    Yields:
        int64, uint32 or uint64, and float32. Shape (entries,) each.

    Raises:
        OSError: a file is damaged or cannot be read.
    """
    for fragment in array.fragments:
        tiles = fragment.tiles(first, last)
        if tiles:
            begins = [of_field[tiles.start : tiles.stop + 1] for of_field in fragment.begins]
            stored = [
                _read(fragment.folder / field.file, of_field[0], of_field[-1])
                for field, of_field in zip(array.fields, begins, strict=True)
            ]
            for tile in range(0, len(tiles), _TILES_AT_ONCE):
                edges = [of_field[tile : tile + _TILES_AT_ONCE + 1] - of_field[0] for of_field in begins]
                parts = [some[edge[0] : edge[-1]] for some, edge in zip(stored, edges, strict=True)]
                yield _decode(parts, array.fields, array.shape[1])


def _read(path: Path, begin: int, end: int) -> Bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        return np.frombuffer(file.read(end - begin), np.uint8)


def _decode(parts: Sequence[Bytes], fields: Sequence[Field], n_genes: int) -> list[Array]:
    """Return the numbers of each field of some tiles."""
    frames, n_bytes, chunks = np.empty(sum(map(len, parts)), np.uint8), 0, []
    for part, field in zip(parts, fields, strict=True):
        sizes = np.empty(len(part) // (_HEAD + _FILTERED) + 1, np.int64)
        n_chunks, n_more = _find_frames(part, field.shuffled, field.kind.itemsize, frames[n_bytes:], sizes)
        if n_chunks < 0:
            raise OSError(f"a chunk of {field.file} is not stored as it should be")
        n_bytes += n_more
        chunks.append(sizes[:n_chunks])
    ends = np.cumsum([sizes.sum() for sizes in chunks])
    content = pa.decompress(pa.py_buffer(frames[:n_bytes]), int(ends[-1]), codec="zstd", asbytes=False)
    contents = np.split(np.frombuffer(content, np.uint8), ends[:-1])
    columns = [_numbers(*of_field) for of_field in zip(contents, chunks, fields, strict=True)]
    if len({len(column) for column in columns}) > 1 or columns[1].max(initial=0) >= n_genes:
        raise OSError(f"there are entries without a cell, gene or count, or of genes beyond the {n_genes} there are")
    return columns


def _numbers(content: Bytes, chunks: Int64Array, field: Field) -> Array:
    if not field.shuffled:
        return content.view(field.kind)
    numbers = np.empty(len(content) // field.kind.itemsize, np.uint32)
    _unshuffle(content, chunks, field.kind.itemsize, numbers)
    return numbers.view(np.float32) if field.kind == np.float32 else numbers


@njit(nogil=True, cache=True)
def _find_frames(stored, shuffled, width, frames, sizes):  # type: ignore[no-untyped-def]
    """Copy the Zstandard frames of all chunks one behind another, and fill the size of each chunk, decompressed.

    Returns:
        The number of chunks, or −1 if they do not lie there as they should; the bytes copied.
    """
    n_about = _FILTERED + 8 * shuffled
    at = n_chunks = n_bytes = n_left = 0
    while at < len(stored):
        if n_left == 0:  # a tile begins
            n_left, at = _number(stored, at), at + 8
        size, begin = _number(stored, at), at + _HEAD + n_about
        end = begin + _number(stored, at + 4)
        known = _number(stored, at + 8) == n_about and _number(stored, at + 12) == shuffled
        known &= _number(stored, at + 16) == 1  # part, of these sizes
        known &= size % width == 0 and size == _number(stored, at + n_about + 4)
        if shuffled:  # before it lies another frame, of two numbers: that one part was shuffled, and its size
            known &= _number(stored, at + 20) == 8
            begin += _number(stored, at + 24)
        if not known or end > len(stored) or end - begin != _number(stored, at + n_about + 8):
            return -1, 0
        frames[n_bytes : n_bytes + end - begin] = stored[begin:end]
        sizes[n_chunks] = size
        n_bytes, n_chunks, n_left, at = n_bytes + end - begin, n_chunks + 1, n_left - 1, end
    return (n_chunks if n_left == 0 else -1), n_bytes


@njit(nogil=True, cache=True)
def _number(stored, at):  # type: ignore[no-untyped-def]
    """Return the number of 32 bits that begins there, or a huge one behind the end."""
    if at + 4 > len(stored):
        return 2**62
    return stored[at] | stored[at + 1] << 8 | stored[at + 2] << 16 | np.int64(stored[at + 3]) << 24


@njit(nogil=True, cache=True)
def _unshuffle(content, chunks, width, numbers):  # type: ignore[no-untyped-def]
    """Fill the lower 32 bits of numbers of so many bytes, which lie apart in each chunk: all lowest ones first."""
    at = done = 0
    for size in chunks:
        n = size // width
        part, into = content[at : at + size], numbers[done : done + n]
        lowest, second, third, fourth = part[:n], part[n : 2 * n], part[2 * n : 3 * n], part[3 * n : 4 * n]
        for i in range(n):
            low = np.uint32(lowest[i]) | np.uint32(second[i]) << 8
            into[i] = low | np.uint32(third[i]) << 16 | np.uint32(fourth[i]) << 24
        at, done = at + size, done + n
