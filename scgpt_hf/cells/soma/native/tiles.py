"""The entries of some cells of a sparse array, decompressed without TileDB.

TileDB makes 20 bytes of every entry, in columns as long as its buffers; `chunks.py` keeps four. Here a few tiles at a
time become columns, and their memory serves for the next ones. The same entries take two thirds of the time (measured).

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
from scgpt_hf.cells.soma.native.fragments import Field, PlainArray

_TILES_AT_ONCE = 8  # 10 MB of a Census, decompressed; with fewer, threads would ask for the GIL more often
_HEAD, _ABOUT = 12, 16  # bytes before a chunk; see `_find_frames`

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
    with path.open("rb") as file:
        file.seek(begin)
        stored = np.frombuffer(file.read(end - begin), np.uint8)
    if len(stored) < end - begin:
        raise OSError(f"{path} ends before byte {end:,}")
    return stored


def _decode(parts: Sequence[Bytes], fields: Sequence[Field], n_genes: int) -> list[Array]:
    """Return the numbers of each field of some tiles."""
    n_stored = [len(part) for part in parts]
    frames, n_chunks = np.empty(sum(n_stored), np.uint8), np.zeros(len(fields), np.int64)
    sizes = np.empty((len(fields), max(n_stored) // (_HEAD + _ABOUT) + 1), np.int64)
    shuffled, widths = zip(*((field.shuffled, field.kind.itemsize) for field in fields), strict=True)
    n_bytes = _find_all(tuple(parts), shuffled, widths, frames, sizes, n_chunks)
    if n_chunks.min() < 0:
        raise OSError(f"a chunk of {fields[int(n_chunks.argmin())].file} is not stored as it should be")
    chunks = [of_field[:n] for of_field, n in zip(sizes, n_chunks, strict=True)]
    ends = np.cumsum([of_field.sum() for of_field in chunks])
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
def _find_all(parts, shuffled, widths, frames, sizes, n_chunks):  # type: ignore[no-untyped-def]
    """Do for each field what `_find_frames` does, one behind another, and fill the number of chunks of each.

    At once, for threads ask for the GIL after each call: beside a busy one up to a seventh more is read (measured).

    Returns:
        The bytes copied.
    """
    n_bytes = 0
    for field in range(len(parts)):
        into = frames[n_bytes:]
        n_chunks[field], n_more = _find_frames(parts[field], shuffled[field], widths[field], into, sizes[field])
        n_bytes += n_more
    return n_bytes


@njit(nogil=True, cache=True)
def _find_frames(stored, shuffled, width, frames, sizes):  # type: ignore[no-untyped-def]
    """Copy the Zstandard frames of all chunks one behind another, and fill the size of each chunk, decompressed.

    A tile begins with the number of its chunks, 8 bytes. A chunk is, in numbers of 4 bytes:

        0   its size | its size as stored | the size of what is from 12 on
        12  parts of shuffling's own numbers, 0 or 1 | parts of numbers, 1 | two sizes of each: as it is, and as stored

    and then the frames of these parts. Shuffling's own numbers, two of them, say that it shuffled one part.

    Returns:
        The number of chunks, or −1 if they do not lie there like this; the bytes copied.
    """
    n_about = _ABOUT + 8 * shuffled
    at = n_chunks = n_bytes = n_left = 0
    while at < len(stored):
        if n_left == 0:
            n_left, at = _number(stored, at) + (_number(stored, at + 4) << 32), at + 8
        size, sizes_at, begin = _number(stored, at), at + n_about + 4, at + _HEAD + n_about
        end = begin + _number(stored, at + 4)
        sound = _number(stored, at + 8) == n_about
        sound &= _number(stored, at + 12) == shuffled and _number(stored, at + 16) == 1
        if shuffled:
            sound &= _number(stored, at + 20) == 8
            begin += _number(stored, at + 24)
        sound &= _number(stored, sizes_at) == size and _number(stored, sizes_at + 4) == end - begin
        if not sound or size % width or end > len(stored):
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
    """Fill the lower 32 bits of numbers of so many bytes, which lie apart in each chunk: all lowest ones first.

    Genes need no more (`fragments.py` sees to that), and counts have no more.
    """
    at = done = 0
    for size in chunks:
        n = size // width
        part, into = content[at : at + size], numbers[done : done + n]
        lowest, second, third, fourth = part[:n], part[n : 2 * n], part[2 * n : 3 * n], part[3 * n : 4 * n]
        for i in range(n):
            low = np.uint32(lowest[i]) | np.uint32(second[i]) << 8
            into[i] = low | np.uint32(third[i]) << 16 | np.uint32(fourth[i]) << 24
        at, done = at + size, done + n
