"""The interface of the native reader: open a local sparse array, and read the entries of a range of its cells.

The reader makes one pass over the compressed bytes and keeps a few tiles decompressed at a time, in memory that it uses
again for the next ones. TileDB fills buffers of 20 bytes per entry first. See `fragments.py` for the files and
`tiles.py` for the bytes.
"""

import logging
import os
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiledbsoma as soma

from scgpt_hf.cells.soma.native.fragments import Field, Fragment, UnsupportedArrayError, list_fields, list_fragments
from scgpt_hf.cells.soma.native.tiles import Bytes, Entries, decode_tiles

logger = logging.getLogger(__name__)

SWITCH = "SCGPT_HF_NATIVE_READER"  # environment variable; "0" turns the native reader off

# Tiles decompressed at once: 10 MB of a Census. With fewer tiles, the threads would compete for the GIL more often.
_TILES_PER_STEP = 8


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
        for fragment in self.fragments:
            tiles = fragment.find_tiles(first, last)
            if not tiles:
                continue
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
                yield decode_tiles(parts, self.fields, fragment.boxes[these], fragment.sizes[these])


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
