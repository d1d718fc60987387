"""What is read from TileDB's files is what TileDB reads, and what is not plain is left to it."""

import errno
import shutil
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import tiledbsoma as soma
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.cells.soma.chunks import read_chunk
from scgpt_hf.cells.soma.layout import TILE, x_storage
from scgpt_hf.cells.soma.native import fragments
from scgpt_hf.cells.soma.native.fragments import open_plain
from scgpt_hf.cells.soma.native.tiles import read_entries

N_CELLS, N_GENES = 5000, 3000


def create(folder, *, kind="float", shape=(N_CELLS, N_GENES), **storage):
    """An empty array as a Census has it, but for what is said."""
    config = x_storage()
    config["tiledb"]["create"].update(storage)
    kind = pa.type_for_alias(kind)
    soma.SparseNDArray.create(str(folder), type=kind, shape=shape, platform_config=config).close()
    return str(folder)


def write(uri, cells, genes, counts, time=None):
    """One more fragment."""
    with soma.SparseNDArray.open(uri, "w", tiledb_timestamp=time) as array:
        columns = {"soma_dim_0": cells, "soma_dim_1": genes, "soma_data": counts}
        array.write(pa.table({name: pa.array(column) for name, column in columns.items()}))


def write_at_random(uri, rng, first=0, last=N_CELLS, n_entries=40_000, kind=np.float32):
    counts = np.minimum(rng.geometric(0.6, n_entries), 200).astype(kind)
    write(uri, rng.integers(first, last, n_entries), rng.integers(0, N_GENES, n_entries), counts)


def assert_read_as_by_tiledb(uri, *, plain=True, cell_ids=None):
    """All chunks, or the given cells of one, are the same to the bit."""
    with soma.SparseNDArray.open(uri) as array:
        opened = open_plain(array)
        assert (opened is not None) == plain
        if plain:
            for first in range(0, array.shape[0], TILE) if cell_ids is None else [None]:
                asked = np.arange(first, min(first + TILE, array.shape[0])) if cell_ids is None else cell_ids
                for ours, theirs in zip(read_chunk(opened, asked), read_chunk(array, asked), strict=True):
                    assert ours.dtype == theirs.dtype
                    np.testing.assert_array_equal(ours, theirs)


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_a_fragment_of_many_tiles(tmp_path, rng):
    uri = create(tmp_path / "x", capacity=1000)
    write_at_random(uri, rng)
    assert_read_as_by_tiledb(uri)


def test_tiles_of_several_chunks(tmp_path, rng):
    uri = create(tmp_path / "x")
    write_at_random(uri, rng, last=300, n_entries=150_000)
    assert_read_as_by_tiledb(uri)


def test_fragments_one_over_another_and_out_of_order(tmp_path, rng):
    uri = create(tmp_path / "x", capacity=500)
    for first, last in ((3000, 5000), (0, 2500), (1000, 4000)):
        write_at_random(uri, rng, first, last, n_entries=9000)
    assert_read_as_by_tiledb(uri)


@pytest.mark.parametrize("steps", [["commits"], ["fragments"], ["fragments", "commits"], ["commits", "fragments"]])
def test_consolidated_as_the_census_is(tmp_path, rng, steps):
    uri = create(tmp_path / "x")
    for first in (0, 1000, 3000):
        write_at_random(uri, rng, first, first + 2000)
    for step in steps:
        with soma.SparseNDArray.open(uri, "w") as array:
            array._handle.consolidate_and_vacuum([step])
    write_at_random(uri, rng)
    assert_read_as_by_tiledb(uri)


@pytest.mark.parametrize("odd", [0, np.nan, np.inf, -1, 0.5, 255, 65535, 65536, 2**24])
def test_counts_of_any_size(tmp_path, rng, odd):
    uri = create(tmp_path / "x")
    counts = np.full(9000, 2, np.float32)
    counts[::7] = odd
    write(uri, rng.integers(0, N_CELLS, 9000), rng.integers(0, N_GENES, 9000), counts)
    assert_read_as_by_tiledb(uri)


def test_more_genes_than_16_bits_hold(tmp_path, rng):
    uri = create(tmp_path / "x", shape=(300, 70_000))
    write(uri, rng.integers(0, 300, 5000), rng.integers(65_000, 70_000, 5000), np.ones(5000, np.float32))
    assert_read_as_by_tiledb(uri)


PLAIN = {"filters": ["ZstdFilter"], "tile": TILE}
APART = {"filters": ["ByteShuffleFilter", "ZstdFilter"], "tile": TILE}


def test_without_bytes_apart(tmp_path, rng):
    uri = create(tmp_path / "x", dims={"soma_dim_0": PLAIN, "soma_dim_1": PLAIN}, attrs={"soma_data": PLAIN})
    write_at_random(uri, rng)
    assert_read_as_by_tiledb(uri)


def test_nothing_in_an_array_or_in_a_band(tmp_path, rng):
    uri = create(tmp_path / "x")
    assert_read_as_by_tiledb(uri)
    write_at_random(uri, rng, last=TILE)
    assert_read_as_by_tiledb(uri)


@settings(max_examples=30, deadline=None)
@given(st.data())
def test_any_cells_of_a_band(tmp_path_factory, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    uri = create(tmp_path_factory.mktemp("any") / "x", capacity=data.draw(st.sampled_from([7, 100, 8192, 9000])))
    for _ in range(data.draw(st.integers(1, 3))):
        first = data.draw(st.integers(0, N_CELLS - 2))
        write_at_random(uri, rng, first, data.draw(st.integers(first + 1, N_CELLS)), data.draw(st.integers(1, 3000)))
    cells = data.draw(st.sets(st.integers(0, TILE - 1), min_size=1, max_size=50))
    assert_read_as_by_tiledb(uri, cell_ids=np.sort(np.array(list(cells))) + TILE)


GZIP = {"filters": ["GzipFilter"], "tile": TILE}


@pytest.mark.parametrize(
    "storage",
    [
        {"allows_duplicates": False},
        {"cell_order": "col-major"},
        {"kind": "int32"},
        {"dims": {"soma_dim_0": {"tile": 100}, "soma_dim_1": {"tile": TILE}}},
        {"attrs": {"soma_data": GZIP}},
        {"dims": {"soma_dim_0": APART, "soma_dim_1": APART}},
        {"shape": (N_CELLS, 2**31 + 1)},
    ],
)
def test_what_no_census_has_is_left_to_tiledb(tmp_path, rng, storage):
    uri = create(tmp_path / "x", **storage)
    write_at_random(uri, rng, n_entries=100, kind=np.int32 if "kind" in storage else np.float32)
    assert_read_as_by_tiledb(uri, plain=False)


def test_deleted_cells_are_left_to_tiledb(tmp_path, rng):
    uri = create(tmp_path / "x")
    write_at_random(uri, rng)
    with soma.SparseNDArray.open(uri, "d") as array:
        array.delete_cells((slice(0, 99), slice(None)))
    assert_read_as_by_tiledb(uri, plain=False)


@pytest.mark.parametrize(
    "left", ["__commits/__1_1_a_22.vac", "__commits/__1_1_a_22.upd", "__schema/__1_1_b", "__1_1_a_8.ok"]
)
def test_what_a_reader_would_have_to_look_up_is_left_to_tiledb(tmp_path, rng, left):
    uri = create(tmp_path / "x")
    write_at_random(uri, rng)
    with soma.SparseNDArray.open(uri) as array:
        assert open_plain(array)
        (tmp_path / "x" / left).touch()
        assert open_plain(array) is None


def test_a_file_that_is_not_tiledbs_does_not_matter(tmp_path, rng):
    uri = create(tmp_path / "x")
    write_at_random(uri, rng)
    (tmp_path / "x" / "__commits" / ".DS_Store").touch()
    assert_read_as_by_tiledb(uri)


def test_a_relative_address_is_left_to_tiledb(tmp_path, rng, monkeypatch):
    write_at_random(create(tmp_path / "x"), rng)
    monkeypatch.chdir(tmp_path)
    with soma.SparseNDArray.open(str(tmp_path / "x")) as array:
        assert open_plain(array)
        monkeypatch.setattr(soma.SparseNDArray, "uri", "x")
        assert open_plain(array) is None


@pytest.mark.parametrize("at", [0, 4, 222])
def test_a_damaged_footer_is_left_to_tiledb(tmp_path, rng, at):
    """At the version, the length of a name, and the place of the R-tree."""
    uri = create(tmp_path / "x")
    write_at_random(uri, rng)
    (file,) = (tmp_path / "x").rglob("__fragment_metadata.tdb")
    data = file.read_bytes()
    place = len(data) - 8 - int.from_bytes(data[-8:], "little") + at
    with soma.SparseNDArray.open(uri) as array:
        assert open_plain(array)
        file.write_bytes(data[:place] + b"\xff" * 8 + data[place + 8 :])
        assert open_plain(array) is None
        file.write_bytes(data[:-200])
        assert open_plain(array) is None


def test_a_fragment_of_the_future_is_left_to_tiledb(tmp_path, rng):
    uri = create(tmp_path / "x")
    write(uri, [0], [0], [1.0], time=datetime.now(UTC) + timedelta(days=1))
    assert_read_as_by_tiledb(uri, plain=False)


def test_an_unknown_version_is_left_to_tiledb(tmp_path, rng, monkeypatch):
    uri = create(tmp_path / "x")
    write_at_random(uri, rng)
    monkeypatch.setattr(fragments, "VERSIONS", (23,))
    assert_read_as_by_tiledb(uri, plain=False)


@pytest.mark.parametrize("name", ["d0.tdb", "d1.tdb", "a0.tdb"])
def test_a_fragment_that_lacks_a_part_is_left_to_tiledb(tmp_path, rng, name):
    uri = create(tmp_path / "x")
    write_at_random(uri, rng)
    (file,) = (tmp_path / "x").rglob(name)
    file.write_bytes(file.read_bytes()[:-1])
    assert_read_as_by_tiledb(uri, plain=False)


def test_genes_beyond_the_last_raise(tmp_path, rng):
    uri = create(tmp_path / "x")
    write_at_random(uri, rng)
    with soma.SparseNDArray.open(uri) as array:
        opened = open_plain(array)
    with pytest.raises(OSError, match="entries without a cell, gene or count, or of genes beyond the 100 there are"):
        list(read_entries(opened._replace(shape=(N_CELLS, 100)), 0, 10))


@pytest.fixture
def census(small_census, tmp_path):
    return shutil.copytree(small_census, tmp_path / "census") / "census_data" / "homo_sapiens"


HEADS = [lambda data, at=at: data[:at] + b"\xff\xff\xff\x7f" + data[at + 4 :] for at in range(0, 36, 4)]


@pytest.mark.parametrize("name", ["d0.tdb", "d1.tdb", "a0.tdb"])
@pytest.mark.parametrize("damage", [*HEADS, lambda data: data[:48] + bytes(len(data) - 48), lambda data: data[:-1]])
def test_files_damaged_while_they_are_read_raise_with_their_address(census, name, damage):
    with CensusSource(str(census)) as source:
        assert source._plain
        for file in (census / "ms" / "RNA" / "X" / "raw").rglob(name):
            file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(OSError, match=r"reading .*X/raw failed: .*; is it damaged, or written to\? Check the disk"):
            source.read(source.obs().index.to_numpy())


def test_files_emptied_while_they_are_read_raise(census):
    with CensusSource(str(census)) as source:
        assert source._plain
        for file in (census / "ms" / "RNA" / "X" / "raw").rglob("[ad][01].tdb"):
            file.write_bytes(b"")
        with pytest.raises(OSError, match=r"reading .*X/raw failed: .* ends before byte .*; is it damaged"):
            source.read(source.obs().index.to_numpy())


def test_files_that_may_not_be_read_raise_as_the_system_says(census, monkeypatch):
    def refuse(*_args, **_settings):
        raise PermissionError(errno.EACCES, "Permission denied", "d0.tdb")

    with CensusSource(str(census)) as source:
        cell_ids = source.obs().index.to_numpy()
        monkeypatch.setattr(Path, "open", refuse)
        assert source._plain is None  # and TileDB reads it all the same
        monkeypatch.undo()
        source.close()
        assert source._plain
        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(PermissionError, match=r"reading .*X/raw failed: .*Permission denied: 'd0.tdb'$"):
            source.read(cell_ids)


def test_a_source_that_was_closed_looks_anew(census):
    uri = str(census / "ms" / "RNA" / "X" / "raw")
    with CensusSource(str(census)) as source:
        cell_ids = source.obs().index.to_numpy()
        write(uri, cell_ids[:1], [0], [1.0])
        before = source.read(cell_ids).counts
        with soma.SparseNDArray.open(uri, "w") as array:
            array._handle.consolidate_and_vacuum(["fragments"])
        with pytest.raises(FileNotFoundError, match=r"reading .*X/raw failed: .*No such file"):
            source.read(cell_ids)
        source.close()
        assert (source.read(cell_ids).counts != before).nnz == 0
        assert source._plain


def test_files_that_are_gone_raise(census):
    with CensusSource(str(census)) as source:
        cell_ids = source.obs().index.to_numpy()
        shutil.rmtree(census / "ms" / "RNA" / "X" / "raw")
        with pytest.raises(FileNotFoundError, match=r"X/raw cannot be found: .*; if it was there before, put it back"):
            source.read(cell_ids)
