"""The native reader returns what TileDB returns, and leaves every array that it does not support to TileDB."""

import dataclasses
import errno
import logging
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.soma.address import open_census
from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.cells.soma.chunks import read_chunk
from scgpt_hf.cells.soma.layout import TILE
from scgpt_hf.cells.soma.native import fragments, open_native
from scgpt_hf.cells.soma.native.reader import SWITCH
from tests.support import ROOT
from tests.support.soma_arrays import (
    DIMS,
    N_CELLS,
    N_GENES,
    assert_native_equals_tiledb,
    create_array,
    create_odd_array,
    write_entries,
    write_random_entries,
)

FIXTURES = ROOT / "tests" / "fixtures"
FLOAT = pa.field("soma_data", pa.float32(), nullable=False)
FUTURE = datetime(2100, 1, 1, tzinfo=UTC)  # so that the fixtures open whatever the clock of the machine


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def check(uri, cell_ids=None):
    with soma.SparseNDArray.open(uri) as array:
        assert_native_equals_tiledb(array, cell_ids)


def check_left_to_tiledb(uri, caplog, reason):
    """The array is not opened, and one INFO line names it and the reason."""
    caplog.clear()
    with caplog.at_level(logging.INFO, "scgpt_hf"), soma.SparseNDArray.open(uri) as array:
        assert open_native(array) is None
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    assert uri in record.getMessage()
    assert reason in record.getMessage()


@pytest.mark.parametrize("version", fragments.FORMAT_VERSIONS)
def test_arrays_of_every_supported_format_version_are_read_as_by_tiledb(version):
    folder = FIXTURES / f"tiledb_format_{version}"
    assert {path.name.rsplit("_", 1)[-1] for path in (folder / "__fragments").iterdir()} == {str(version)}
    with soma.SparseNDArray.open(str(folder), tiledb_timestamp=FUTURE) as array:
        assert_native_equals_tiledb(array)
        assert sum(len(table) for table in array.read().tables()) == 450 * 25


@pytest.mark.parametrize("version", fragments.FORMAT_VERSIONS)
def test_an_unknown_format_version_is_left_to_tiledb_with_an_info_line(tmp_path, caplog, version):
    folder = shutil.copytree(FIXTURES / f"tiledb_format_{version}", tmp_path / "x")
    for file in folder.rglob("__fragment_metadata.tdb"):
        data = bytearray(file.read_bytes())
        footer_at = len(data) - 8 - int.from_bytes(data[-8:], "little")
        assert data[footer_at] == version
        data[footer_at] = 23
        file.write_bytes(data)
    with soma.SparseNDArray.open(str(FIXTURES / f"tiledb_format_{version}"), tiledb_timestamp=FUTURE) as array:
        array_at_folder = SimulatedArray(array, str(folder))
        with caplog.at_level(logging.INFO, "scgpt_hf"):
            assert open_native(array_at_folder) is None
    assert "format version 23" in caplog.text
    assert str(folder) in caplog.text


class SimulatedArray:
    """An array with another URI."""

    def __init__(self, array, uri):
        self.array, self.uri = array, uri

    def __getattr__(self, name):
        return getattr(self.array, name)


def test_a_fragment_of_many_tiles(tmp_path, rng):
    uri = create_array(tmp_path / "x", capacity=1000)
    write_random_entries(uri, rng)
    check(uri)


def test_tiles_of_several_compressed_chunks(tmp_path, rng):
    uri = create_array(tmp_path / "x")
    write_random_entries(uri, rng, stop=300, n_entries=150_000)
    check(uri)


def test_overlapping_fragments_that_are_out_of_order(tmp_path, rng):
    uri = create_array(tmp_path / "x", capacity=500)
    for first, stop in ((3000, 5000), (0, 2500), (1000, 4000)):
        write_random_entries(uri, rng, first, stop, n_entries=9000)
    check(uri)


@pytest.mark.parametrize("steps", [["commits"], ["fragments"], ["fragments", "commits"], ["commits", "fragments"]])
def test_consolidated_arrays_as_in_the_census(tmp_path, rng, steps):
    uri = create_array(tmp_path / "x")
    for first in (0, 1000, 3000):
        write_random_entries(uri, rng, first, first + 2000)
    for step in steps:
        with soma.SparseNDArray.open(uri, "w") as array:
            array._handle.consolidate_and_vacuum([step])
    write_random_entries(uri, rng)
    check(uri)


@pytest.mark.parametrize("odd", [0, np.nan, np.inf, -1, 0.5, 255, 65535, 65536, 2**24])
def test_counts_of_any_value(tmp_path, rng, odd):
    uri = create_array(tmp_path / "x")
    counts = np.full(9000, 2, np.float32)
    counts[::7] = odd
    write_entries(uri, rng.integers(0, N_CELLS, 9000), rng.integers(0, N_GENES, 9000), counts)
    check(uri)


def test_more_genes_than_16_bits_hold(tmp_path, rng):
    uri = create_array(tmp_path / "x", shape=(300, 70_000))
    write_entries(uri, rng.integers(0, 300, 5000), rng.integers(65_000, 70_000, 5000), np.ones(5000, np.float32))
    check(uri)


COMPRESSED = {"filters": ["ZstdFilter"], "tile": TILE}
SHUFFLED = {"filters": ["ByteShuffleFilter", "ZstdFilter"], "tile": TILE}
GZIPPED = {"filters": ["GzipFilter"], "tile": TILE}


def test_numbers_that_are_not_shuffled(tmp_path, rng):
    dims = {"soma_dim_0": COMPRESSED, "soma_dim_1": COMPRESSED}
    uri = create_array(tmp_path / "x", dims=dims, attrs={"soma_data": COMPRESSED})
    write_random_entries(uri, rng)
    check(uri)


def test_an_empty_array_and_empty_chunks(tmp_path, rng):
    uri = create_array(tmp_path / "x")
    check(uri)
    write_random_entries(uri, rng, stop=TILE)
    check(uri)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_cells_of_a_chunk(tmp_path_factory, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    uri = create_array(tmp_path_factory.mktemp("any") / "x", capacity=data.draw(st.sampled_from([7, 100, 8192, 9000])))
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, N_CELLS - 2))
        stop = data.draw(st.integers(first + 1, N_CELLS))
        write_random_entries(uri, rng, first, stop, data.draw(st.integers(1, 3000)))
    cells = data.draw(st.sets(st.integers(0, TILE - 1), min_size=1, max_size=50))
    check(uri, cell_ids=np.sort(np.array(list(cells))) + TILE)


@pytest.mark.parametrize(
    ("storage", "reason"),
    [
        ({"allows_duplicates": False}, "duplicates"),
        ({"cell_order": "col-major"}, "column-major"),
        ({"dtype": "int32"}, "int32"),
        ({"dims": {"soma_dim_0": {"tile": 100}, "soma_dim_1": {"tile": TILE}}}, "'100'"),
        ({"attrs": {"soma_data": GZIPPED}}, "GZIP"),
        ({"dims": {"soma_dim_0": SHUFFLED, "soma_dim_1": SHUFFLED}}, "d0.tdb"),
        ({"shape": (N_CELLS, 2**31 + 1)}, "2,147,483,649 genes"),
    ],
)
def test_a_schema_that_is_not_that_of_a_census_is_left_to_tiledb(tmp_path, rng, caplog, storage, reason):
    uri = create_array(tmp_path / "x", **storage)
    write_random_entries(uri, rng, n_entries=100, dtype=np.int32 if "dtype" in storage else np.float32)
    check_left_to_tiledb(uri, caplog, reason)


def test_an_array_with_deleted_cells_is_left_to_tiledb(tmp_path, rng, caplog):
    uri = create_array(tmp_path / "x")
    write_random_entries(uri, rng)
    with soma.SparseNDArray.open(uri, "d") as array:
        array.delete_cells((slice(0, 99), slice(None)))
    check_left_to_tiledb(uri, caplog, ".del")


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("__commits/__1_1_a_22.vac", ".vac"),
        ("__commits/__1_1_a_22.upd", ".upd"),
        ("__schema/__1_1_b", "evolved"),
        ("__1_1_a_8.ok", "before version 12"),
    ],
)
def test_an_array_whose_folder_has_further_commits_or_schemas_is_left_to_tiledb(tmp_path, rng, caplog, file, reason):
    uri = create_array(tmp_path / "x")
    write_random_entries(uri, rng)
    with soma.SparseNDArray.open(uri) as array, caplog.at_level(logging.INFO, "scgpt_hf"):
        assert open_native(array)
        (tmp_path / "x" / file).touch()
        assert open_native(array) is None
    assert reason in caplog.text


def test_files_of_other_programs_are_ignored(tmp_path, rng):
    uri = create_array(tmp_path / "x")
    write_random_entries(uri, rng)
    (tmp_path / "x" / "__commits" / ".DS_Store").touch()
    check(uri)


def test_an_array_with_a_relative_path_is_left_to_tiledb(tmp_path, rng, caplog):
    uri = create_array(tmp_path / "x")
    write_random_entries(uri, rng)
    with soma.SparseNDArray.open(uri) as array, caplog.at_level(logging.INFO, "scgpt_hf"):
        assert open_native(SimulatedArray(array, uri))
        assert open_native(SimulatedArray(array, "x")) is None
    assert "relative" in caplog.text


@pytest.mark.parametrize(("place", "of_what"), [(0, "version"), (4, "length of a name"), (222, "offset of the R-tree")])
def test_damaged_fragment_metadata_are_left_to_tiledb(tmp_path, rng, place, of_what):
    uri = create_array(tmp_path / "x")
    write_random_entries(uri, rng)
    (file,) = (tmp_path / "x").rglob("__fragment_metadata.tdb")
    data = file.read_bytes()
    at = len(data) - 8 - int.from_bytes(data[-8:], "little") + place
    with soma.SparseNDArray.open(uri) as array:
        assert open_native(array)
        file.write_bytes(data[:at] + b"\xff" * 8 + data[at + 8 :])
        assert open_native(array) is None, of_what
        file.write_bytes(data[:-200])
        assert open_native(array) is None


def test_a_fragment_with_a_time_in_the_future_is_left_to_tiledb(tmp_path, caplog):
    uri = create_array(tmp_path / "x")
    write_entries(uri, [0], [0], [1.0], time=datetime.now(UTC) + timedelta(days=1))
    check_left_to_tiledb(uri, caplog, "after the time at which it is opened")


@pytest.mark.parametrize("name", ["d0.tdb", "d1.tdb", "a0.tdb"])
def test_a_fragment_with_an_incomplete_file_is_left_to_tiledb(tmp_path, rng, caplog, name):
    uri = create_array(tmp_path / "x")
    write_random_entries(uri, rng)
    (file,) = (tmp_path / "x").rglob(name)
    file.write_bytes(file.read_bytes()[:-1])
    check_left_to_tiledb(uri, caplog, name)


@pytest.mark.parametrize(
    ("attributes", "dims", "reason"),
    [
        ([pa.field("soma_data", pa.float32(), nullable=True)], DIMS, "without missing values"),
        ([FLOAT, pa.field("further", pa.float32(), nullable=False)], DIMS, "further"),
        ([FLOAT], DIMS[::-1], "soma_dim_1: int64 not null, soma_dim_0"),
    ],
)
def test_other_attributes_and_dimensions_are_left_to_tiledb(tmp_path, caplog, attributes, dims, reason):
    uri = create_odd_array(tmp_path / "x", attributes, dims=dims)
    check_left_to_tiledb(uri, caplog, reason)
    with soma.SparseNDArray.open(uri) as array:
        if attributes[0].nullable:
            with pytest.raises(ValueError, match=r"x: 1 of 2 stored counts are missing \(null\)"):
                read_chunk(array, np.arange(TILE))
        else:
            chunk = read_chunk(array, np.arange(TILE))
            assert chunk.n_stored[[3, 4]].tolist() == [1, 1]
            assert (chunk.words & 0xFFFF).tolist() == [5, 6]


def test_an_attribute_without_filters_is_left_to_tiledb(tmp_path, rng, caplog):
    uri = create_array(tmp_path / "x", attrs={"soma_data": {"filters": []}})
    write_random_entries(uri, rng, n_entries=100)
    check_left_to_tiledb(uri, caplog, "the filters of a0.tdb are []")


def test_schema_options_of_an_unknown_form_are_left_to_tiledb(tmp_path, rng, caplog, monkeypatch):
    uri = create_array(tmp_path / "x")
    write_random_entries(uri, rng, n_entries=100)
    monkeypatch.setattr(fragments.json, "loads", lambda _: None)
    check_left_to_tiledb(uri, caplog, "NoneType")


def test_metadata_that_contradict_each_other_are_left_to_tiledb(tmp_path, rng):
    uri = create_array(tmp_path / "x", capacity=1000)
    write_random_entries(uri, rng)
    with soma.SparseNDArray.open(uri) as array:
        native = open_native(array)
        (fragment,) = native.fragments
        for changed in (
            {"boxes": fragment.boxes + np.array([0, N_CELLS, 0, 0])},
            {"boxes": fragment.boxes + np.array([0, 0, 0, N_GENES])},
            {"boxes": fragment.boxes[:, [1, 0, 3, 2]]},
            {"offsets": [offsets[::-1] for offsets in fragment.offsets]},
        ):
            with pytest.raises(fragments.UnsupportedArrayError):
                fragments._require_consistent(fragment._replace(**changed), array.shape)


def rewritten(uri, edit, name):
    """Rewrite a file of the only fragment: the numbers of its only compressed chunk are changed by `edit`."""
    (path,) = Path(uri).rglob(name)
    data = path.read_bytes()
    field = {"d0.tdb": (28, np.int64, False), "d1.tdb": (36, np.uint64, True)}[name]
    n_header, dtype, shuffled = field
    head = 8 + n_header
    n_about = int.from_bytes(data[8 + 24 : 8 + 28], "little") if shuffled else 0
    begin = head + n_about
    size = int.from_bytes(data[8:12], "little")
    content = np.frombuffer(pa.decompress(data[begin:], size, codec="zstd"), np.uint8)
    numbers = (content.reshape(8, -1).T.copy().reshape(-1) if shuffled else content.copy()).view(dtype)
    edit(numbers)
    changed = numbers.view(np.uint8)
    changed = changed.reshape(-1, 8).T.copy().reshape(-1) if shuffled else changed
    frame = bytes(pa.compress(changed.tobytes(), "zstd", asbytes=True))
    header = bytearray(data[:begin])
    stored = (len(data[begin:]), len(frame))
    header[8 + 4 : 8 + 8] = (int.from_bytes(header[12:16], "little") - stored[0] + stored[1]).to_bytes(4, "little")
    place = head - 4
    assert int.from_bytes(header[place : place + 4], "little") == stored[0]
    header[place : place + 4] = stored[1].to_bytes(4, "little")
    return path, bytes(header) + frame


def swap(numbers):
    numbers[[4, 5]] = numbers[[5, 4]]


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("d1.tdb", lambda genes: genes.__setitem__(7, genes[7] + 2**32), r"d1.tdb has numbers of 2\*\*32 or more"),
        ("d1.tdb", lambda genes: genes.__setitem__(7, 2999), "genes 0 to 99 has an entry of another"),
        ("d0.tdb", lambda cells: cells.__setitem__(7, 1999), "a tile of cells 0 to 9 .* has an entry of another"),
        ("d1.tdb", swap, "not in the order"),
        ("d0.tdb", lambda cells: cells.__setitem__(slice(0, 100), 1), "not in the order"),
    ],
)
def test_entries_that_contradict_the_metadata_of_their_tile_raise(tmp_path, name, edit, message):
    uri = create_array(tmp_path / "x")
    cells, genes = np.repeat(np.arange(10), 100), np.tile(np.arange(100), 10)
    write_entries(uri, cells, genes, np.ones(1000, np.float32))
    check(uri)
    with soma.SparseNDArray.open(uri) as array:
        native = open_native(array)
    path, content = rewritten(uri, edit, name)
    path.write_bytes(content)
    # the metadata state the size of the file at opening; the bytes are read later
    grown = [
        np.append(offsets[:-1], file.stat().st_size)
        for offsets, file in zip(
            native.fragments[0].offsets, (path.parent / f.file for f in native.fields), strict=True
        )
    ]
    native = dataclasses.replace(native, fragments=[native.fragments[0]._replace(offsets=grown)])
    with pytest.raises(OSError, match=message):
        read_chunk(native, np.arange(TILE))


@pytest.mark.parametrize("is_native", [True, False])
def test_genes_that_var_does_not_have_raise(tmp_path, rng, is_native):
    uri = create_array(tmp_path / "x")
    write_entries(uri, [1, 1, 2], [5, 99, 100], np.ones(3, np.float32))
    with soma.SparseNDArray.open(uri) as array:
        reader = open_native(array) if is_native else array
        assert read_chunk(reader, np.arange(TILE), n_genes=101).n_stored.sum() == 3
        with pytest.raises(ValueError, match=r"x: 1 entries have genes .* e.g. gene 100; var has 100 genes"):
            read_chunk(reader, np.arange(TILE), n_genes=100)


@pytest.mark.parametrize("is_native", [True, False])
@pytest.mark.parametrize(("n_writes", "count"), [(1, 2), (2, 60_000), (3, 70_000)])
def test_repeated_entries_are_added_up(tmp_path, is_native, n_writes, count):
    uri = create_array(tmp_path / "x")
    for _ in range(n_writes):
        write_entries(uri, [3, 3, 3, 4], [7, 7, 8, 7], np.array([count, 1, 5, 6], np.float32))
    with soma.SparseNDArray.open(uri) as array:
        chunk = read_chunk(open_native(array) if is_native else array, np.arange(TILE))
    assert np.diff(chunk.indptr)[[3, 4]].tolist() == [2, 1]
    assert chunk.n_stored[[3, 4]].tolist() == [3 * n_writes, n_writes]
    assert chunk.n_repeated == 4 * n_writes - 3
    assert chunk.sum_counts()[[3, 4]].tolist() == [n_writes * (count + 6), n_writes * 6]
    assert chunk.has_raw_counts


@pytest.fixture
def census(small_census, tmp_path):
    return shutil.copytree(small_census, tmp_path / "census") / "census_data" / "homo_sapiens"


def is_read_natively(source):
    return source._native_array is not None


def test_the_native_reader_can_be_turned_off_by_argument_or_environment(census, caplog, monkeypatch):
    with CensusSource(str(census)) as source:
        assert is_read_natively(source)
        expected = source.read(source.obs().index.to_numpy())
    assert "native reader" not in caplog.text
    with caplog.at_level(logging.INFO, "scgpt_hf"), CensusSource(str(census), native=False) as source:
        for _ in range(2):
            assert (source.read(expected.cell_ids).counts != expected.counts).nnz == 0
        assert not is_read_natively(source)
    with open_census(str(census), native=False) as source:
        assert not is_read_natively(source)
    monkeypatch.setenv(SWITCH, "0")
    with caplog.at_level(logging.INFO, "scgpt_hf"), CensusSource(str(census)) as source:
        assert (source.read(expected.cell_ids).counts != expected.counts).nnz == 0
        assert not is_read_natively(source)
    lines = [record.getMessage() for record in caplog.records if "native reader" in record.getMessage()]
    assert len(lines) == 2, "one line for each source"
    assert "native=False" in lines[0]
    assert f"{SWITCH}=0" in lines[1]


# the first nine numbers of 4 bytes of a file: the number of chunks of a tile, and the header of its first chunk
DAMAGES = {
    **{f"bytes {at} to {at + 3}": lambda data, at=at: data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :]
       for at in range(0, 36, 4)},
    "zeros after byte 48": lambda data: data[:48] + bytes(len(data) - 48),
    "last byte missing": lambda data: data[:-1],
}  # fmt: skip


@pytest.mark.parametrize("name", ["d0.tdb", "d1.tdb", "a0.tdb"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_files_damaged_after_opening_raise_an_error_with_the_address(census, name, damage):
    with CensusSource(str(census)) as source:
        assert is_read_natively(source)
        for file in (census / "ms" / "RNA" / "X" / "raw").rglob(name):
            file.write_bytes(DAMAGES[damage](file.read_bytes()))
        with pytest.raises(OSError, match=r"X/raw"):
            source.read(source.obs().index.to_numpy())


def test_files_emptied_after_opening_raise_an_error_with_the_address(census):
    with CensusSource(str(census)) as source:
        assert is_read_natively(source)
        for file in (census / "ms" / "RNA" / "X" / "raw").rglob("[ad][01].tdb"):
            file.write_bytes(b"")
        with pytest.raises(OSError, match=r"X/raw .* ends before byte"):
            source.read(source.obs().index.to_numpy())


def test_files_without_read_permission(census, monkeypatch):
    def refuse(*_args, **_settings):
        raise PermissionError(errno.EACCES, "Permission denied", "d0.tdb")

    with CensusSource(str(census)) as source:
        cell_ids = source.obs().index.to_numpy()
        monkeypatch.setattr(Path, "open", refuse)
        assert not is_read_natively(source)  # the metadata cannot be read either: TileDB may have other means
        monkeypatch.undo()
        source.close()
        assert is_read_natively(source)
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(PermissionError, match=r"X/raw .*Permission denied: 'd0.tdb'$"):
            source.read(cell_ids)


def test_a_source_opened_again_after_close_finds_the_new_fragments(census):
    uri = str(census / "ms" / "RNA" / "X" / "raw")
    with CensusSource(str(census)) as source:
        cell_ids = source.obs().index.to_numpy()
        write_entries(uri, cell_ids[:1], [0], [0.0])  # another count would contradict the totals in obs
        before = source.read(cell_ids).counts
        with soma.SparseNDArray.open(uri, "w") as array:
            array._handle.consolidate_and_vacuum(["fragments"])
        with pytest.raises(FileNotFoundError, match="X/raw"):
            source.read(cell_ids)
        source.close()
        assert (source.read(cell_ids).counts != before).nnz == 0
        assert is_read_natively(source)


def test_removed_files_raise(census):
    with CensusSource(str(census)) as source:
        cell_ids = source.obs().index.to_numpy()
        shutil.rmtree(census / "ms" / "RNA" / "X" / "raw")
        with pytest.raises(FileNotFoundError, match="X/raw"):
            source.read(cell_ids)
