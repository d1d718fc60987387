"""Which bytes of which files hold the entries of a cell, in a sparse array that TileDB wrote to a local disk.

TileDB reads any array. `open_plain` takes only one that is stored as a Census is, where nothing was deleted or changed
since; `tiles.py` then makes entries of the bytes.

Source: the format specification of TileDB, https://github.com/TileDB-Inc/TileDB/tree/main/format_spec:
`array_file_hierarchy.md`, `fragment.md`, `generic_tile.md`, `array_format_history.md`.
"""

import json
import logging
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tiledbsoma as soma

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.soma.layout import TILE

logger = logging.getLogger(__name__)

VERSIONS = (20, 21, 22)  # of the format, from TileDB 2.17 on; of these a footer is laid out as here

_MOST_GENES = 2**31  # all that is kept of a gene is its lower half
_METADATA = "__fragment_metadata.tdb"
_FIXED = struct.Struct("<2B4q2Q2B")  # of a footer, what follows the name of the schema; then there are numbers
_N_FIELDS = 4  # of a footer: the attribute, a place that is not used any more, two dimensions
_GENERIC = struct.Struct("<IQQBQBI")  # the head of a generic tile
_GZIP = bytes([0, 0, 1, 0, 1, 0, 0, 0, 1])  # its filters: on chunks of 64 KiB one filter, gzip


class Field(NamedTuple):
    """How one of the three numbers of an entry is stored.

    Attributes:
        file: its name in each fragment.
        place: its place among the fields of a footer.
        kind: of the numbers.
        shuffled: whether the bytes of the numbers of a chunk lie apart, all lowest ones first.
    """

    file: str
    place: int
    kind: np.dtype[Any]
    shuffled: bool


class Fragment(NamedTuple):
    """What was written at once: tiles of entries, ordered by the chunks of their cells.

    Attributes:
        folder: of its files.
        highest: the highest cell id in each tile or any before it. Shape (tiles,).
        lowest: the lowest cell id in each tile or any after it. Shape (tiles,).
        begins: of each field where each tile begins in its file, and the size of the file. Shape (tiles + 1,) each.
    """

    folder: Path
    highest: Int64Array
    lowest: Int64Array
    begins: list[Int64Array]

    def tiles(self, first: int, last: int) -> range:
        """Return tiles with all entries of the cells from first to last, and entries of others."""
        if self.lowest[0] > last or self.highest[-1] < first:  # at once, for there may be thousands of fragments
            return range(0)
        return range(int(np.searchsorted(self.highest, first)), int(np.searchsorted(self.lowest, last, "right")))


class PlainArray(NamedTuple):
    """A sparse array of cells and genes whose files can be read as they are.

    Attributes:
        shape: cells and genes.
        fields: of cell ids, genes and counts.
        fragments: in the order they were written.
    """

    shape: tuple[int, ...]
    fields: list[Field]
    fragments: list[Fragment]


class _NotPlainError(ValueError):
    """What keeps an array from being read from its files."""


def open_plain(array: soma.SparseNDArray) -> PlainArray | None:
    """Return where the entries of an array lie, or None if it is left to TileDB, and log why, for debugging."""
    folder = Path(array.uri.removeprefix("file://"))
    try:
        fields = _fields(array)
        _require_plain_folder(folder)
        names = _committed(folder / "__commits", array.tiledb_timestamp_ms)
        fragments = [_open_fragment(folder / "__fragments" / name, fields) for name in names]
    # of damage, which has many faces, TileDB shall tell
    except (OSError, ValueError, ArithmeticError, LookupError, struct.error, zlib.error) as error:
        logger.debug("%s is read by TileDB: %s", array.uri, error)
        return None
    return PlainArray(array.shape, fields, fragments)


def _fields(array: soma.SparseNDArray) -> list[Field]:
    config = array.schema_config_options()
    dims, attrs = json.loads(config.dims), json.loads(config.attrs)
    layout = [config.allows_duplicates, config.cell_order, config.tile_order, *(dim["tile"] for dim in dims.values())]
    if layout != [True, "row-major", "row-major", str(TILE), str(TILE)]:
        raise _NotPlainError(f"duplicates, orders and tiles are {layout}")
    if array.type != pa.float32() or array.shape[1] > _MOST_GENES:
        raise _NotPlainError(f"it has {array.type} of {array.shape[1]:,} genes")

    def field(file: str, place: int, kind: type, filters: list[dict[str, Any]]) -> Field:
        names = [step["name"] for step in filters]
        if names != ["ZSTD"] and (names != ["BYTESHUFFLE", "ZSTD"] or file == "d0.tdb"):
            raise _NotPlainError(f"the filters of {file} are {names}")
        return Field(file, place, np.dtype(kind), names[0] == "BYTESHUFFLE")

    return [
        field("d0.tdb", 2, np.int64, dims["soma_dim_0"]["filters"]),
        field("d1.tdb", 3, np.uint64, dims["soma_dim_1"]["filters"]),
        field("a0.tdb", 0, np.float32, attrs["soma_data"]["filters"]),
    ]


def _require_plain_folder(folder: Path) -> None:
    """Raise if there may be a schema or fragments that are not where they are looked for."""
    if not folder.is_absolute():
        raise _NotPlainError("its address is relative, to a folder that TileDB chooses")
    if (folder / "__array_schema.tdb").exists() or any(folder.glob("*.ok")):
        raise _NotPlainError("it was begun in a format before 12")
    if sum(path.name != "__enumerations" for path in (folder / "__schema").iterdir()) > 1:
        raise _NotPlainError("its schema was changed")


def _committed(folder: Path, until: int) -> list[str]:
    """Return the names of the fragments that were written whole by then, in milliseconds, the oldest first."""

    def listed(suffix: str) -> set[str]:
        return {Path(line).name for path in folder.glob(f"*{suffix}") for line in path.read_text().splitlines()}

    commits = {path.name for path in folder.glob("__*") if path.suffix not in (".con", ".ign")}
    commits |= listed(".con") - listed(".ign")  # lists of commits, and of those in such lists that are gone
    if others := {Path(commit).suffix for commit in commits} - {".wrt"}:
        raise _NotPlainError(f"there are {others} among its commits")
    times = {Path(commit).stem: [int(time) for time in commit.split("_")[2:4]] for commit in commits}
    if any(last > until for _, last in times.values()):
        raise _NotPlainError("some of it was written later than it is looked at")
    return sorted(times, key=lambda name: (times[name][0], name))


def _open_fragment(folder: Path, fields: list[Field]) -> Fragment:
    data = (folder / _METADATA).read_bytes()
    footer = data[len(data) - 8 - int.from_bytes(data[-8:], "little") : -8]
    version, n_letters = struct.unpack_from("<IQ", footer)
    *_, with_times, with_deleted = _FIXED.unpack_from(footer, 12 + n_letters)
    if version not in VERSIONS or with_deleted:
        raise _NotPlainError(f"{folder.name} is of version {version}, or has entries that were deleted")
    numbers = np.frombuffer(footer, "<i8", offset=12 + n_letters + _FIXED.size)
    n_fields = _N_FIELDS + with_times  # of merged fragments there is also when each entry was written: in the past
    sizes, (tree, *offsets) = numbers[:n_fields], numbers[3 * n_fields : 4 * n_fields + 1].tolist()
    for field in fields:
        if (size := (folder / field.file).stat().st_size) != sizes[field.place]:
            raise _NotPlainError(f"{folder.name}/{field.file} is of {size:,} bytes, not {sizes[field.place]:,}")
    begins = [
        np.append(np.frombuffer(_generic_tile(data, offsets[place]), "<i8", offset=8), sizes[place])
        for place in (field.place for field in fields)
    ]
    lowest, highest, *_ = _leaves(_generic_tile(data, tree)).T
    return Fragment(folder, np.maximum.accumulate(highest), np.minimum.accumulate(lowest[::-1])[::-1].copy(), begins)


def _generic_tile(data: bytes, at: int) -> bytes:
    """Return what the generic tile that begins there holds."""
    *_, encrypted, n_filters = _GENERIC.unpack_from(data, at)
    at += _GENERIC.size
    if encrypted or data[at : at + len(_GZIP)] != _GZIP:
        raise _NotPlainError("its metadata are stored in another way")
    at += n_filters
    (n_chunks,), at = struct.unpack_from("<Q", data, at), at + 8
    chunks = []
    for _ in range(n_chunks):
        _, n_bytes, n_about = struct.unpack_from("<3I", data, at)
        at += 12 + n_about
        chunks.append(zlib.decompress(data[at : at + n_bytes]))
        at += n_bytes
    return b"".join(chunks)


def _leaves(tree: bytes) -> Int64Array:
    """Return the last level of an R-tree: lowest and highest cell id and gene of each tile. Shape (tiles, 4)."""
    (_, n_levels), at, n_boxes = struct.unpack_from("<2I", tree), 8, 0
    for _ in range(n_levels):
        at += n_boxes * 32
        (n_boxes,), at = struct.unpack_from("<Q", tree, at), at + 8
    return np.frombuffer(tree, "<i8", n_boxes * 4, at).reshape(-1, 4)
