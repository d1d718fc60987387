"""Find the bytes that hold the entries of some cells in the files of a sparse array of TileDB.

An array is a folder. Each write adds a fragment, which is another folder:

    __schema/                                    one file for each version of the schema
    __commits/T1_T2_ID_VERSION.wrt               an empty file for each complete fragment
    __fragments/T1_T2_ID_VERSION/
        d0.tdb  d1.tdb  a0.tdb                   cell ids, genes and counts, tile after tile
        __fragment_metadata.tdb                  where each tile begins, and which cells and genes it spans

Reading takes three steps. `list_fields` checks that the schema is that of a Census. `list_fragments` finds the complete
fragments, reads the metadata of each and checks that they agree. `Fragment.find_tiles` then returns the tiles with the
entries of a range of cells. Whatever differs from what a Census has raises `UnsupportedArrayError`, and the array is
left to TileDB.

Source: the format specification of TileDB, https://github.com/TileDB-Inc/TileDB/tree/main/format_spec:
`array_file_hierarchy.md`, `fragment.md`, `generic_tile.md`, `array_format_history.md`.
"""

import json
import struct
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import tiledbsoma as soma

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.soma.layout import TILE

# Versions of the format whose footers are laid out as `_open_fragment` expects; TileDB 2.17 to 2.30 write them.
# tests/fixtures has an array of each.
FORMAT_VERSIONS = (20, 21, 22)

# `reader.py` decodes only the lower half of the 8 bytes of a gene, and requires that the upper half is 0.
_MAX_GENES = 2**31

# Names, types and order of the dimensions and the attribute of a Census. None may have missing values: TileDB stores
# which values are missing in one more file, which this package does not read.
_COLUMNS = [
    ("soma_dim_0", pa.int64(), False),
    ("soma_dim_1", pa.int64(), False),
    ("soma_data", pa.float32(), False),
]

# The footer of a fragment: version and length of the schema's name, the name, then these fixed fields (dense, no
# non-empty domain, first and last cell and gene, number of tiles, entries of the last tile, has timestamps, has
# deletions), then numbers of 8 bytes.
_FOOTER_START = struct.Struct("<IQ")
_FOOTER_FIXED = struct.Struct("<2B4q2Q2B")
_N_FIELDS = 4  # of a footer: a0, an unused place for coordinates of old formats, d0, d1

# The header of a generic tile: version, stored size, size, data type, size of a value, encryption, bytes of filters.
_TILE_HEADER = struct.Struct("<IQQBQBI")
_GZIP_FILTER = bytes([0, 0, 1, 0, 1, 0, 0, 0, 1])  # chunks of 64 KiB (4 bytes), one filter (4 bytes), gzip (1 byte)


class UnsupportedArrayError(ValueError):
    """The array is stored in a way that only TileDB can read; the message says which."""


class Field(NamedTuple):
    """How one of the three numbers of an entry (cell id, gene, count) is stored.

    Attributes:
        file: name of its file in each fragment.
        place: its index among the fields of a footer.
        dtype: dtype of the stored numbers.
        shuffled: whether the bytes of the numbers are stored apart: all lowest bytes of a chunk first, then all second
            ones, and so on. Similar bytes compress better.
    """

    file: str
    place: int
    dtype: np.dtype[Any]
    shuffled: bool


class Fragment(NamedTuple):
    """The tiles of one write.

    Tiles of a fragment are ordered by the chunk of their cells, but tiles of one chunk overlap. The running maximum and
    minimum below ascend, so a binary search finds the tiles of a range.

    Attributes:
        folder: folder of its files.
        highest: the highest cell id in this tile and all before it. Shape (tiles,).
        lowest: the lowest cell id in this tile and all after it. Shape (tiles,).
        offsets: for each field, the offset of each tile in its file, and the size of the file. Shape (tiles + 1,) each.
        boxes: lowest and highest cell id, lowest and highest gene of each tile. Shape (tiles, 4).
        sizes: number of entries of each tile. Shape (tiles,).
    """

    folder: Path
    highest: Int64Array
    lowest: Int64Array
    offsets: list[Int64Array]
    boxes: Int64Array
    sizes: Int64Array

    def find_tiles(self, first: int, last: int) -> range:
        """Return the tiles with all entries of cells `first` to `last`; entries of other cells may be among them."""
        return range(int(np.searchsorted(self.highest, first)), int(np.searchsorted(self.lowest, last, "right")))


def list_fields(array: soma.SparseNDArray) -> list[Field]:
    """Return how cell ids, genes and counts are stored.

    Raises:
        UnsupportedArrayError: the schema is not that of a Census.
    """
    config = array.schema_config_options()
    dims, attrs = json.loads(config.dims), json.loads(config.attrs)
    layout = [config.allows_duplicates, config.cell_order, config.tile_order, *(dim["tile"] for dim in dims.values())]
    expected = [True, "row-major", "row-major", str(TILE), str(TILE)]
    if layout != expected:
        raise UnsupportedArrayError(f"duplicates, cell order, tile order and tile sizes are {layout}, not {expected}")
    columns = [(field.name, field.type, field.nullable) for field in array.schema]
    if columns != _COLUMNS or array.shape[1] > _MAX_GENES:
        found = str(array.schema).replace("\n", ", ")
        raise UnsupportedArrayError(
            f"it holds {found} of {array.shape[1]:,} genes, not int64 cell ids, int64 genes of up to 2**31 and float "
            "counts, without missing values"
        )

    def make_field(file: str, place: int, dtype: type, filters: list[dict[str, Any]] | None) -> Field:
        names = [step["name"] for step in filters or []]  # None: there are no filters
        # cell ids use all 8 bytes and are never shuffled in a Census, so `reader.py` does not decode that
        if names != ["ZSTD"] and (names != ["BYTESHUFFLE", "ZSTD"] or file == "d0.tdb"):
            raise UnsupportedArrayError(f"the filters of {file} are {names}")
        return Field(file, place, np.dtype(dtype), names[0] == "BYTESHUFFLE")

    return [
        make_field("d0.tdb", 2, np.int64, dims["soma_dim_0"]["filters"]),
        make_field("d1.tdb", 3, np.uint64, dims["soma_dim_1"]["filters"]),
        make_field("a0.tdb", 0, np.float32, attrs["soma_data"]["filters"]),
    ]


def list_fragments(array: soma.SparseNDArray, fields: list[Field]) -> list[Fragment]:
    """Return the fragments of a local array, the oldest first.

    Args:
        array: an array opened for reading.
        fields: fields that `list_fields` has returned.

    Raises:
        UnsupportedArrayError: a fragment is not stored as a Census stores them, or there may be others elsewhere.
        OSError, ValueError, ArithmeticError, LookupError, struct.error, zlib.error: files are missing or damaged.
    """
    folder = Path(array.uri.removeprefix("file://"))
    _require_current_layout(folder)
    names = _list_committed(folder / "__commits", array.tiledb_timestamp_ms)
    capacity = array.schema_config_options().capacity
    fragments = [_open_fragment(folder / "__fragments" / name, fields, capacity) for name in names]
    for fragment in fragments:
        _require_consistent(fragment, array.shape)
    return fragments


def _require_current_layout(folder: Path) -> None:
    """Raise if a schema or a fragment may be in a place where this module does not look."""
    if not folder.is_absolute():
        raise UnsupportedArrayError("its path is relative, and TileDB decides to which folder")
    if (folder / "__array_schema.tdb").exists() or any(folder.glob("*.ok")):
        raise UnsupportedArrayError("it was created in a format before version 12")
    if sum(path.name != "__enumerations" for path in (folder / "__schema").iterdir()) > 1:
        raise UnsupportedArrayError("its schema was evolved")


def _list_committed(folder: Path, until_ms: int) -> list[str]:
    """Return the names of the complete fragments, the oldest first."""

    def read_lists(suffix: str) -> set[str]:
        return {Path(line).name for path in folder.glob(f"*{suffix}") for line in path.read_text().splitlines()}

    commits = {path.name for path in folder.glob("__*") if path.suffix not in (".con", ".ign")}
    # Consolidating commits replaces many files by a list of their names (.con); when a listed fragment goes later, its
    # name is added to a list of names to ignore (.ign).
    commits |= read_lists(".con") - read_lists(".ign")
    if others := {Path(commit).suffix for commit in commits} - {".wrt"}:  # .del: deletions, .vac: not yet vacuumed
        raise UnsupportedArrayError(f"there are {sorted(others)} files among its commits")
    # a name is __T1_T2_ID_VERSION: of a consolidated fragment, T1 and T2 are the times of its first and last write
    times = {Path(commit).stem: [int(time) for time in commit.split("_")[2:4]] for commit in commits}
    if any(last > until_ms for _, last in times.values()):
        raise UnsupportedArrayError("it was written to after the time at which it is opened")
    return sorted(times, key=lambda name: (times[name][0], name))


def _open_fragment(folder: Path, fields: list[Field], capacity: int) -> Fragment:
    """Read the metadata of a fragment: its footer, the offsets of its tiles and their bounding boxes.

    `capacity` is the number of entries of each tile but the last.
    """
    data = (folder / "__fragment_metadata.tdb").read_bytes()
    # the last 8 bytes of the file are the size of the footer before them
    footer = data[len(data) - 8 - int.from_bytes(data[-8:], "little") : -8]
    version, n_letters = _FOOTER_START.unpack_from(footer)
    at = _FOOTER_START.size + n_letters
    *_, n_tiles, n_last, has_timestamps, has_deletions = _FOOTER_FIXED.unpack_from(footer, at)
    if version not in FORMAT_VERSIONS:
        raise UnsupportedArrayError(f"{folder.name} is of format version {version}, not one of {FORMAT_VERSIONS}")
    if has_deletions:
        raise UnsupportedArrayError(f"{folder.name} has deleted entries")
    numbers = np.frombuffer(footer, "<i8", offset=at + _FOOTER_FIXED.size)
    # A consolidated fragment has the time of each entry as a further field. All are in the past, so it is not read.
    n_fields = _N_FIELDS + has_timestamps
    # The numbers are, for each field: size of its file, and of two files that only variable-size and nullable fields
    # have; then the offset in `data` of the R-tree, and for each field that of its table of tile offsets.
    sizes, (tree_at, *tables_at) = numbers[:n_fields], numbers[3 * n_fields : 4 * n_fields + 1].tolist()
    for field in fields:
        if (size := (folder / field.file).stat().st_size) != sizes[field.place]:
            raise UnsupportedArrayError(
                f"{folder.name}/{field.file} has {size:,} bytes, its metadata expect {sizes[field.place]:,}"
            )
    offsets = [
        # a table begins with its length, 8 bytes; the file's size marks the end of the last tile
        np.append(np.frombuffer(_read_generic_tile(data, tables_at[place]), "<i8", offset=8), sizes[place])
        for place in (field.place for field in fields)
    ]
    boxes = _read_boxes(_read_generic_tile(data, tree_at))
    if not len(boxes) == n_tiles == len(offsets[0]) - 1 or not 0 < n_last <= capacity:
        raise UnsupportedArrayError(
            f"{folder.name} has {n_tiles:,} tiles, {len(boxes):,} bounding boxes, {len(offsets[0]) - 1:,} offsets, and "
            f"{n_last:,} entries in its last tile, of up to {capacity:,}"
        )
    sizes = np.full(n_tiles, capacity, np.int64)
    sizes[-1] = n_last
    lowest, highest = boxes[:, 0], boxes[:, 1]
    return Fragment(
        folder, np.maximum.accumulate(highest), np.minimum.accumulate(lowest[::-1])[::-1].copy(), offsets, boxes, sizes
    )


def _require_consistent(fragment: Fragment, shape: tuple[int, ...]) -> None:
    """Raise unless the tiles are one after the other in each file, and their bounding boxes within the array."""
    if any((np.diff(of_field) <= 0).any() or of_field[0] != 0 for of_field in fragment.offsets):
        raise UnsupportedArrayError(f"the offsets of the tiles of {fragment.folder.name} do not ascend from 0")
    lowest, highest = fragment.boxes[:, ::2], fragment.boxes[:, 1::2]
    if (lowest < 0).any() or (lowest > highest).any() or (highest >= shape).any():
        raise UnsupportedArrayError(f"{fragment.folder.name} has tiles outside an array of shape {shape}")


def _read_generic_tile(data: bytes, at: int) -> bytes:
    """Return the content of the generic tile at an offset: a header, its filters, and gzipped chunks of 64 KiB."""
    *_, encrypted, n_filter_bytes = _TILE_HEADER.unpack_from(data, at)
    at += _TILE_HEADER.size
    if encrypted or data[at : at + len(_GZIP_FILTER)] != _GZIP_FILTER:
        raise UnsupportedArrayError("its metadata are encrypted, or not compressed by gzip")
    at += n_filter_bytes
    (n_chunks,), at = struct.unpack_from("<Q", data, at), at + 8
    chunks = []
    for _ in range(n_chunks):
        _, n_bytes, n_about = struct.unpack_from("<3I", data, at)  # size, stored size, size of the filter's own data
        at += 12 + n_about
        chunks.append(zlib.decompress(data[at : at + n_bytes]))
        at += n_bytes
    return b"".join(chunks)


def _read_boxes(tree: bytes) -> Int64Array:
    """Return the leaves of an R-tree: lowest and highest cell id, lowest and highest gene of each tile.

    The tree is stored level by level from the root; each level begins with its number of boxes. Shape (tiles, 4).
    """
    (_, n_levels), at, n_boxes = struct.unpack_from("<2I", tree), 8, 0  # children of a node, levels
    for _ in range(n_levels):
        at += n_boxes * 32  # skip the level before
        (n_boxes,), at = struct.unpack_from("<Q", tree, at), at + 8
    return np.frombuffer(tree, "<i8", n_boxes * 4, at).reshape(-1, 4)
