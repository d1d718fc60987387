"""The native reader: open a local sparse array, and read the entries of a range of its cells.

`open_native` decides whether an array can be read without TileDB. `NativeArray.read_entries` finds the tiles of a range
with the help of `fragments.py`, reads their bytes and decodes them.

A field of a tile is a sequence of chunks of up to 64 KiB, each compressed by Zstandard on its own. Decoding takes four
steps, each for a few tiles and all three fields at once:

1. `_find_all_frames` walks over the chunk headers and copies the Zstandard frames behind one another.
2. One call of `pyarrow.decompress` decompresses them all: a decoder continues with the next frame where one ends.
3. `_unshuffle` puts the bytes of shuffled numbers together again.
4. `_find_outside` checks that the entries of each tile are within its bounding box. The frames have no checksum, so a
   flipped bit that still decompresses is found only by such checks: this one, that of `chunks.py` that entries ascend,
   and that of `totals.py` with the totals in obs.

The loops are compiled and release the GIL. They check every size that they use, because a damaged file would otherwise
make them read or write out of bounds.

Source: `tile.md` of the format specification of TileDB; see `fragments.py`.
"""

import logging
import os
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa
import tiledbsoma as soma
from numpy.typing import NDArray

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.compiled import compiled
from scgpt_hf.cells.soma.native.fragments import Field, Fragment, UnsupportedArrayError, list_fields, list_fragments

logger = logging.getLogger(__name__)

Array: TypeAlias = NDArray[Any]
Bytes: TypeAlias = NDArray[np.uint8]
Entries: TypeAlias = tuple[Array, Array, Array]  # cell ids, genes and counts, shape (entries,) each

SWITCH = "SCGPT_HF_NATIVE_READER"  # environment variable; "0" turns the native reader off

# Tiles decompressed at once: 10 MB of a Census. With fewer tiles, the threads would compete for the GIL more often.
_TILES_PER_STEP = 8

_HEADER = 12  # bytes: three sizes at the beginning of a chunk, see `_find_frames`
_FILTER_DATA = 16  # bytes that the filters add behind the header, at least; 8 more if the numbers are shuffled


@dataclass(frozen=True)
class NativeArray:
    """A local sparse array of cells and genes that can be read without TileDB; `open_native` creates it.

    It holds offsets, not open files, so several threads may read at the same time.

    Attributes:
        uri: of the array, for error messages.
        shape: number of cells and of genes.
        fields: how cell ids, genes and counts are stored, in this order.
        fragments: fragments in the order in which they were written.
    """

    uri: str
    shape: tuple[int, ...]
    fields: list[Field]
    fragments: list[Fragment]

    def read_entries(self, first: int, last: int) -> Iterator[Entries]:
        """Yield the entries of a range of cells, a few tiles at a time, in the order in which they are stored.

        A tile may hold entries of cells outside the range; they are yielded too.

        Args:
            first: the first cell id of the range.
            last: the last cell id of the range, included.

        Yields:
            Cell ids (int64), genes (uint32 or uint64) and counts (float32). Shape (entries,) each.

        Raises:
            OSError: a file is damaged or cannot be read, or a tile holds entries that contradict its metadata.
        """
        lowest, highest = self._spans
        for number in np.flatnonzero((lowest <= last) & (highest >= first)):
            fragment = self.fragments[number]
            tiles = fragment.find_tiles(first, last)
            # of each field, the offsets of these tiles and the bytes from the first tile to the last
            offsets = [of_field[tiles.start : tiles.stop + 1] for of_field in fragment.offsets]
            stored = [
                _read_bytes(fragment.folder / field.file, of_field[0], of_field[-1])
                for field, of_field in zip(self.fields, offsets, strict=True)
            ]
            for tile in range(0, len(tiles), _TILES_PER_STEP):
                edges = [of_field[tile : tile + _TILES_PER_STEP + 1] - of_field[0] for of_field in offsets]
                parts = [content[edge[0] : edge[-1]] for content, edge in zip(stored, edges, strict=True)]
                these = slice(tiles.start + tile, min(tiles.start + tile + _TILES_PER_STEP, tiles.stop))
                yield _decode_tiles(parts, self.fields, fragment.boxes[these], fragment.sizes[these])

    @cached_property
    def _spans(self) -> tuple[Int64Array, Int64Array]:
        """The lowest and the highest cell id of each fragment, of which an array of 100 million cells has thousands."""
        spans = [(fragment.lowest[0], fragment.highest[-1]) for fragment in self.fragments]
        lowest, highest = np.array(spans, np.int64).reshape(-1, 2).T
        return lowest, highest


def open_native(array: soma.SparseNDArray, *, enabled: bool = True) -> NativeArray | None:
    """Return a native reader of a local array, or None, with an INFO line, if TileDB has to read it.

    An array qualifies if it is on a local disk, laid out as a Census is (`layout.x_storage`), written in one of
    `fragments.FORMAT_VERSIONS`, without missing values, and neither deleted from nor evolved. Set the environment
    variable `SCGPT_HF_NATIVE_READER=0` to have TileDB read every array.

    Args:
        array: an array opened for reading.
        enabled: False has the same effect as `SCGPT_HF_NATIVE_READER=0`.
    """
    try:
        _require_enabled(enabled)
        fields = list_fields(array)
        fragments = list_fragments(array, fields)
    # Damaged metadata and options that this package does not know fail in many ways. TileDB gets the array then, and
    # reports the damage if there is any.
    except (
        OSError,
        ValueError,
        TypeError,
        AttributeError,
        ArithmeticError,
        LookupError,
        struct.error,
        zlib.error,
    ) as error:
        logger.info("TileDB reads %s, not the faster native reader: %s", array.uri, error)
        return None
    return NativeArray(array.uri, array.shape, fields, fragments)


def _require_enabled(enabled: bool) -> None:
    """Raise if the caller or the environment turned the native reader off."""
    if not enabled:
        raise UnsupportedArrayError("native=False was passed")
    if os.environ.get(SWITCH) == "0":
        raise UnsupportedArrayError(f"{SWITCH}=0 is set")


def _read_bytes(path: Path, start: int, stop: int) -> Bytes:
    """Return bytes of a file; raise an OSError if it is too short."""
    with path.open("rb") as file:
        file.seek(start)
        content = np.frombuffer(file.read(stop - start), np.uint8)
    if len(content) < stop - start:
        raise OSError(f"{path} ends before byte {stop:,}")
    return content


def _decode_tiles(parts: Sequence[Bytes], fields: Sequence[Field], boxes: Int64Array, n_entries: Int64Array) -> Entries:
    """Return the entries of some neighboring tiles.

    Args:
        parts: the stored bytes of each field.
        fields: how cell ids, genes and counts are stored.
        boxes: lowest and highest cell id, lowest and highest gene of each tile. Shape (tiles, 4).
        n_entries: number of entries of each tile. Shape (tiles,).

    Returns:
        Cell ids (int64), genes (uint32, or uint64 if they are not shuffled) and counts (float32).
        Shape (entries,) each.

    Raises:
        OSError: the bytes are damaged, or contradict the bounding boxes or the numbers of entries.
    """
    n_stored = [len(part) for part in parts]
    frames, n_chunks = np.empty(sum(n_stored), np.uint8), np.zeros(len(fields), np.int64)
    # room for as many chunk sizes as there could be at most, one row for each field
    sizes = np.empty((len(fields), max(n_stored) // (_HEADER + _FILTER_DATA) + 1), np.int64)
    shuffled, widths = zip(*((field.shuffled, field.dtype.itemsize) for field in fields), strict=True)
    n_bytes = _find_all_frames(tuple(parts), shuffled, widths, frames, sizes, n_chunks)
    if n_chunks.min() < 0:
        raise OSError(f"the chunks of {fields[int(n_chunks.argmin())].file} are damaged: their sizes do not agree")
    chunk_sizes = [of_field[:n] for of_field, n in zip(sizes, n_chunks, strict=True)]
    ends = np.cumsum([of_field.sum() for of_field in chunk_sizes])
    content = pa.decompress(pa.py_buffer(frames[:n_bytes]), int(ends[-1]), codec="zstd", asbytes=False)
    contents = np.split(np.frombuffer(content, np.uint8), ends[:-1])
    cell_ids, genes, counts = (_to_numbers(*of_field) for of_field in zip(contents, chunk_sizes, fields, strict=True))
    if not len(cell_ids) == len(genes) == len(counts) == n_entries.sum():
        raise OSError(
            f"found {len(cell_ids):,} cell ids, {len(genes):,} genes and {len(counts):,} counts of "
            f"{n_entries.sum():,} entries"
        )
    if (tile := _find_outside(cell_ids, genes, np.cumsum(n_entries), boxes)) >= 0:
        first, last, first_gene, last_gene = boxes[tile].tolist()
        raise OSError(
            f"a tile of cells {first:,} to {last:,} and genes {first_gene:,} to {last_gene:,} has an entry of another"
        )
    return cell_ids, genes, counts


def _to_numbers(content: Bytes, chunk_sizes: Int64Array, field: Field) -> Array:
    """Return the numbers of a field from its decompressed chunks."""
    if not field.shuffled:
        return content.view(field.dtype)
    numbers = np.empty(len(content) // field.dtype.itemsize, np.uint32)
    if _unshuffle(content, chunk_sizes, field.dtype.itemsize, numbers):
        raise OSError(f"{field.file} has numbers of 2**32 or more, which no gene has")
    return numbers.view(np.float32) if field.dtype == np.float32 else numbers


@compiled
def _find_all_frames(parts, shuffled, widths, frames, sizes, n_chunks):  # type: ignore[no-untyped-def]
    """Call `_find_frames` for each field; fill the number of chunks of each, and return the number of bytes copied.

    One compiled call for all fields, because a thread has to get the GIL back after each: beside a busy thread, up to a
    seventh more cells are read this way (measured).
    """
    n_bytes = 0
    for field in range(len(parts)):
        remaining = frames[n_bytes:]
        n_chunks[field], n_more = _find_frames(parts[field], shuffled[field], widths[field], remaining, sizes[field])
        n_bytes += n_more
    return n_bytes


@compiled
def _find_frames(stored, shuffled, width, frames, sizes):  # type: ignore[no-untyped-def]
    """Copy the Zstandard frames of all chunks of a field behind one another, and fill the decompressed size of each.

    A tile begins with its number of chunks, 8 bytes. All further numbers have 4 bytes. A chunk is:

        offset  if not shuffled                     if shuffled
        0       size of the chunk, decompressed     the same
        4       stored size of its frames           the same
        8       size of what follows this header    the same
                up to the frames
        12      0 (compressed pieces of metadata)   1
        16      1 (compressed pieces of numbers)    1
        20      decompressed and stored size of     decompressed (always 8) and stored size of the shuffle filter's
                the numbers                         own metadata: two numbers that state that it shuffled one piece
        28      frame of the numbers                decompressed and stored size of the numbers
        36                                          frame of the metadata, frame of the numbers

    Returns:
        The number of chunks, or −1 if the sizes contradict each other or this layout; the number of bytes copied.
    """
    n_about = _FILTER_DATA + 8 * shuffled
    at = n_chunks = n_bytes = n_left = 0
    while at < len(stored):
        if n_left == 0:  # a tile begins
            n_left, at = _read_uint32(stored, at) + (_read_uint32(stored, at + 4) << 32), at + 8
        size, sizes_at, begin = _read_uint32(stored, at), at + n_about + 4, at + _HEADER + n_about
        end = begin + _read_uint32(stored, at + 4)
        valid = _read_uint32(stored, at + 8) == n_about
        valid &= _read_uint32(stored, at + 12) == shuffled and _read_uint32(stored, at + 16) == 1
        if shuffled:
            valid &= _read_uint32(stored, at + 20) == 8
            begin += _read_uint32(stored, at + 24)  # skip the frame of the metadata
        valid &= _read_uint32(stored, sizes_at) == size and _read_uint32(stored, sizes_at + 4) == end - begin
        if not valid or size % width or end > len(stored):
            return -1, 0
        source, target = stored[begin:end], frames[n_bytes : n_bytes + end - begin]
        for i in range(len(source)):  # a loop, which becomes one copy: numba copies a slice byte by byte
            target[i] = source[i]
        sizes[n_chunks] = size
        n_bytes, n_chunks, n_left, at = n_bytes + len(source), n_chunks + 1, n_left - 1, end
    return (n_chunks if n_left == 0 else -1), n_bytes


@compiled
def _read_uint32(stored, at):  # type: ignore[no-untyped-def]
    """Return the little-endian number of 4 bytes at an offset; beyond the end a number that no size can equal."""
    if at + 4 > len(stored):
        return 2**62
    return stored[at] | stored[at + 1] << 8 | stored[at + 2] << 16 | np.int64(stored[at + 3]) << 24


@compiled
def _unshuffle(content, chunk_sizes, width, numbers):  # type: ignore[no-untyped-def]
    """Fill the lower 4 bytes of numbers of `width` bytes, which are stored apart in each chunk, all lowest ones first.

    Return the union of the bits of all upper bytes, which genes have (8 bytes, but they are below 2**31, see
    `fragments.py`) and counts have not.
    """
    at = done = 0
    upper = np.uint64(0)
    for size in chunk_sizes:
        n = size // width
        chunk, filled = content[at : at + size], numbers[done : done + n]
        lowest, second, third, fourth = chunk[:n], chunk[n : 2 * n], chunk[2 * n : 3 * n], chunk[3 * n : 4 * n]
        for i in range(n):
            low = np.uint32(lowest[i]) | np.uint32(second[i]) << 8
            filled[i] = low | np.uint32(third[i]) << 16 | np.uint32(fourth[i]) << 24
        rest = chunk[4 * n :]
        n_eights = len(rest) // 8
        eights = rest[: 8 * n_eights].view(np.uint64)  # 8 bytes at a time are faster
        for i in range(n_eights):
            upper |= eights[i]
        for i in range(8 * n_eights, len(rest)):
            upper |= np.uint64(rest[i])
        at, done = at + size, done + n
    return upper


@compiled
def _find_outside(cell_ids, genes, stops, boxes):  # type: ignore[no-untyped-def]
    """Return the first tile with an entry outside its bounding box, or −1.

    The loops only find extremes, which the compiler vectorizes; comparing each entry takes twice as long (measured).
    """
    start = 0
    for tile in range(len(stops)):
        tile_ids, tile_genes = cell_ids[start : stops[tile]], genes[start : stops[tile]]
        first_cell, last_cell = boxes[tile, 0], boxes[tile, 1]
        first_gene, last_gene = genes.dtype.type(boxes[tile, 2]), genes.dtype.type(boxes[tile, 3])
        lowest, highest = first_cell, last_cell
        for i in range(len(tile_ids)):
            lowest, highest = min(lowest, tile_ids[i]), max(highest, tile_ids[i])
        lowest_gene, highest_gene = first_gene, last_gene
        for i in range(len(tile_genes)):
            lowest_gene, highest_gene = min(lowest_gene, tile_genes[i]), max(highest_gene, tile_genes[i])
        if lowest < first_cell or highest > last_cell or lowest_gene < first_gene or highest_gene > last_gene:
            return tile
        start = stops[tile]
    return -1
