"""A cache returns the cells of its source, in any order; damaged or inconsistent files raise an error."""

import json
import shutil
from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save
from scipy.sparse import csr_matrix

from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.cache.reader import CacheSource, uniform_chunk_size
from scgpt_hf.cells.jobs.records import ShardError, hash_file
from scgpt_hf.cells.source import CellSource, open_source
from tests.support.source_contract import SourceContract


@pytest.fixture(scope="module")
def everything(small_census: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 300 cells of the small Census and all its columns, cached."""
    folder, source = tmp_path_factory.mktemp("cache") / "all", open_source(small_census, primary_only=False)
    assert write_cache(source, folder, columns=source.obs_columns)
    return folder


class TestContract(SourceContract):
    @pytest.fixture
    def open_it(self, everything: Path):
        def open_it(**keywords) -> CellSource:
            return open_source(everything, **keywords)

        return open_it


def cells(n_cells: int, n_genes: int = 30, seed: int = 0) -> anndata.AnnData:
    """Cells in about 2 of 3 genes, with counts that need one, two and four bytes."""
    rng = np.random.default_rng(seed)
    counts = rng.choice([0, 1, 2, 254, 255, 256, 65_535, 65_536, 2**24, 2**31], size=(n_cells, n_genes))
    counts[rng.integers(n_cells)] = 0
    obs = pd.DataFrame(
        {
            "donor_id": pd.Categorical(rng.choice(["a", "b", None], n_cells)),
            "age": rng.integers(0, 90, n_cells),
            "ratio": np.where(rng.random(n_cells) < 0.2, np.nan, rng.random(n_cells)),
            "is_primary_data": True,
        },
        index=[str(cell) for cell in range(n_cells)],
    )
    return anndata.AnnData(
        csr_matrix(counts.astype(np.float32)), obs, pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(n_genes)])
    )


@pytest.fixture(scope="module")
def many() -> CellSource:
    """4,500 cells: three chunks."""
    return open_source(cells(4500))


@pytest.fixture(scope="module")
def cached(many: CellSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of these cells in two shards, of two chunks and of one; the first chunk is incomplete."""
    folder = tmp_path_factory.mktemp("cache") / "many"
    write_cache(many, folder, cell_ids=np.arange(10, 4500), columns=["donor_id", "age", "ratio"], cells_per_shard=2048)
    return folder


@given(seed=st.integers(0, 2**32 - 1), n_cells=st.integers(0, 300), n_threads=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_any_cells_in_any_order_equal_those_of_the_source(many, cached, seed, n_cells, n_threads):
    cell_ids = np.random.default_rng(seed).permutation(np.arange(10, 4500))[:n_cells]
    columns = ["age", "donor_id"]
    found, expected = CacheSource(cached, n_threads=n_threads).read(cell_ids, columns), many.read(cell_ids, columns)
    for name in ("data", "indices", "indptr"):
        assert (getattr(found.counts, name) == getattr(expected.counts, name)).all()
    assert found.counts.dtype == np.float32
    assert found.counts.shape == expected.counts.shape
    assert found.obs["age"].tolist() == expected.obs["age"].tolist()
    assert found.obs["donor_id"].astype(object).fillna("-").tolist() == (
        expected.obs["donor_id"].astype(object).fillna("-").tolist()
    )


def test_missing_values_of_obs_stay_missing(many, cached):
    columns = ["age", "donor_id", "ratio"]
    found, expected = CacheSource(cached).obs(columns), many.obs(columns).loc[10:]
    pd.testing.assert_frame_equal(found, expected, check_dtype=False, check_categorical=False)
    assert found["ratio"].isna().any()
    assert found["donor_id"].isna().any()


def test_datasets_opens_the_folder_and_holds_the_same_counts(many, cached):
    rows = datasets.load_from_disk(str(cached))
    assert len(rows) == 4490
    assert rows[0]["cell_id"] == 10
    for row in rows.select([0, 2000, 4489]):
        large = iter(row["large_count"])
        counts = [next(large) if count == 255 else count for count in row["count"]]
        expected = many.read(np.array([row["cell_id"]])).counts
        assert row["gene"] == expected.indices.tolist()
        assert counts == expected.data.tolist()


def test_a_cache_may_have_more_genes_than_fit_16_bits(tmp_path):
    n_genes = 2**16 + 5
    counts = csr_matrix(([3.0, 300.0], ([0, 1], [n_genes - 1, 0])), shape=(2, n_genes), dtype=np.float32)
    var = pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(n_genes)])
    write_cache(open_source(anndata.AnnData(counts, var=var)), tmp_path / "cache")
    assert (open_source(tmp_path / "cache").read(np.array([1, 0])).counts != counts[[1, 0]]).nnz == 0


def test_counts_take_16_bits_if_they_fit(tmp_path):
    counts = csr_matrix([[1, 0, 255], [65_535, 2, 0], [65_536, 0, 3]], dtype=np.float32)
    var = pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(3)])
    write_cache(open_source(anndata.AnnData(counts, var=var)), tmp_path / "cache")
    block = open_source(tmp_path / "cache").read(np.arange(3))
    for cells, kind in (([1, 0], np.uint16), ([0, 2], np.float32), ([2, 1, 0], np.float32)):
        rows = block.take(np.array(cells))
        assert (rows.data.dtype, rows.indices.dtype) == (kind, np.uint16)
        assert (rows.counts != counts[cells]).nnz == 0


def test_a_filter_on_a_cache_is_combined_with_that_of_its_source(small_census, tmp_path):
    write_cache(open_source(small_census, obs_filter="disease == 'normal'"), tmp_path / "cache")
    source = open_source(tmp_path / "cache", obs_filter="donor_id == 'donor_4'")
    expected = open_source(small_census, obs_filter="disease == 'normal' and donor_id == 'donor_4'").obs()
    assert source.obs().index.tolist() == expected.index.tolist()
    assert source.describe()["obs_filter"].count("disease == 'normal'") == 1
    assert source.describe()["n_cells"] == len(expected)


def test_single_cells_are_shuffled_up_to_8_million_cells():
    assert uniform_chunk_size(1) == uniform_chunk_size(2**23) == 1
    assert uniform_chunk_size(2**23 + 1) == 2
    assert uniform_chunk_size(160_000_000) == 32


def damage(folder: Path, name: str, how) -> None:
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).write_bytes(how(content))


def flipped(content: bytearray) -> bytearray:
    content[len(content) // 2] ^= 1
    return content


@pytest.fixture
def copied(cached: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(cached, tmp_path / "copied"))


SECOND = "data-00001-of-00002.arrow"


def test_a_changed_byte_raises_before_the_first_cell_is_read(copied):
    damage(copied, SECOND, flipped)
    source = open_source(copied)
    for _ in range(2):
        with pytest.raises(ShardError, match=rf"{SECOND} is corrupt.*--rewrite"):
            source.read(np.array([10]))
    assert len(CacheSource(copied, verify=False).read(np.array([10]))) == 1


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        (SECOND, lambda content: content[:-8], rf"{SECOND} is corrupt.*bytes"),
        ("manifest.json", lambda content: content[:-9], r"manifest\.json"),
        (
            "manifest.json",
            lambda content: content.replace(b'"format": 1', b'"format": 9'),
            r"manifest\.json.*format 9, expected 1",
        ),
        (
            "manifest.json",
            lambda content: content.replace(b"data-00001", b"../ta-0001"),
            r"manifest\.json.*\.\./ta-0001",
        ),
        ("manifest.json", lambda content: content.replace(b'"cells"', b'"cels"'), r"manifest\.json.*cels"),
    ],
)
def test_an_incomplete_cache_or_a_malformed_manifest_raises_at_opening(copied, name, how, message):
    damage(copied, name, how)
    with pytest.raises(ShardError, match=message):
        open_source(copied)


def test_a_missing_shard_raises(copied):
    (copied / SECOND).unlink()
    with pytest.raises(ShardError, match=rf"{SECOND} is missing"):
        open_source(copied)


def test_other_or_missing_genes_raise(copied):
    damage(copied, "genes.csv", lambda content: content.replace(b"ENSG00000000003", b"ENSG00000000999"))
    with pytest.raises(ShardError, match=r"genes\.csv.*hash"):
        open_source(copied).genes  # noqa: B018
    (copied / "genes.csv").unlink()
    with pytest.raises(ShardError, match=r"genes\.csv"):
        open_source(copied).genes  # noqa: B018


def test_a_missing_or_damaged_presence_raises(copied):
    cell_ids = open_source(copied).obs().index.to_numpy()
    damage(copied, "presence.safetensors", lambda content: content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ShardError, match=r"presence\.safetensors is corrupt"):
        open_source(copied).presence(cell_ids)
    (copied / "presence.safetensors").unlink()
    with pytest.raises(ShardError, match=r"presence\.safetensors is missing"):
        open_source(copied).presence(cell_ids)


def test_a_presence_with_a_valid_hash_but_other_genes_raises(copied):
    path, manifest = copied / "presence.safetensors", copied / "manifest.json"
    path.write_bytes(save({"first_cells": np.zeros(1, int), "datasets": np.zeros(1, int), "measured": np.ones((1, 9))}))
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "presence": hash_file(path)}))
    with pytest.raises(ShardError, match=r"presence\.safetensors does not hold the measured genes"):
        open_source(copied).presence(np.array([0]))


def test_a_cache_of_a_source_without_presence_has_none(copied, everything, small_census, tmp_path, monkeypatch):
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["presence"]  # as earlier versions wrote it
    (copied / "manifest.json").write_text(json.dumps(manifest))
    assert open_source(copied).presence(np.array([0])) is None
    source = open_source(small_census)
    monkeypatch.setattr(source, "presence", lambda cell_ids: None)
    write_cache(source, tmp_path / "new")
    assert open_source(tmp_path / "new").presence(np.array([0])) is None
    assert not (tmp_path / "new" / "presence.safetensors").exists()


def test_a_file_that_is_not_a_shard_raises(copied):
    (copied / SECOND).write_bytes(b"\0" * (copied / SECOND).stat().st_size)
    with pytest.raises(ShardError, match=SECOND):
        CacheSource(copied, verify=False).obs()


def test_a_changed_byte_raises_before_obs_is_read(copied):
    damage(copied, SECOND, flipped)
    with pytest.raises(ShardError, match=rf"{SECOND} is corrupt"):
        CacheSource(copied).obs(["donor_id"])


def rewritten(folder: Path, change, options: pa.ipc.IpcWriteOptions | None = None) -> None:
    """Change the record batches of the second shard, and update its hash in the manifest."""
    path = folder / SECOND
    with pa.ipc.open_stream(path.read_bytes()) as reader:
        batches = [change(batch) for batch in reader]
    path.unlink()
    with pa.ipc.new_stream(str(path), batches[0].schema, options=options) as writer:
        for batch in batches:
            writer.write_batch(batch)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1] |= {"n_bytes": path.stat().st_size, "sha256": hash_file(path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def with_column(name: str, make):
    """Return a function that replaces a column of a record batch by `make(column)`."""

    def change(batch: pa.RecordBatch) -> pa.RecordBatch:
        place = batch.schema.get_field_index(name)
        return batch.set_column(place, name, make(batch.column(place)))

    return change


def with_offsets(column: pa.Array, change) -> pa.Array:
    """Return a column of lists or texts with changed offsets, which are not checked."""
    valid, offsets, *others = column.buffers()
    moved = np.frombuffer(offsets, np.int32).copy()
    moved[:] = change(moved)
    children = [column.values] if pa.types.is_list(column.type) else []
    buffers = [valid, pa.py_buffer(moved), *([] if children else others)]
    return pa.Array.from_buffers(column.type, len(column), buffers, children=children)


def far(offsets: np.ndarray) -> np.ndarray:
    return np.where(np.arange(len(offsets)) == 5, 10**8, offsets)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (with_column("gene", lambda column: with_offsets(column, far)), "offset"),
        (with_column("count", lambda column: with_offsets(column, lambda at: at // 2)), "number of genes"),
        (
            with_column("donor_id", lambda column: with_offsets(column, far)),
            "'donor_id'",
        ),
        (with_column("cell_id", lambda column: column.take(np.arange(len(column))[::-1])), "ascend"),
        (
            with_column("cell_id", lambda column: pa.array(column.to_numpy() + 1)),
            "'first': 4096.*'first': 4097",
        ),
        (
            with_column("gene", lambda column: column.cast(pa.list_(pa.int16()))),
            "int16",
        ),
        (with_column("age", lambda column: column.cast(pa.float32())), "columns"),
        (lambda batch: batch.slice(0, 0), "found 0"),
        (lambda batch: batch.drop_columns(["donor_id"]), "columns"),
    ],
)
def test_a_shard_with_a_valid_hash_but_invalid_contents_raises(copied, change, message, verify):
    rewritten(copied, change)
    with pytest.raises(ShardError, match=message):
        CacheSource(copied, verify=verify).obs(["donor_id"])


def test_a_compressed_shard_raises(copied):
    rewritten(copied, lambda batch: batch, pa.ipc.IpcWriteOptions(compression="zstd"))
    with pytest.raises(ShardError, match=rf"{SECOND}.*compressed"):
        CacheSource(copied).obs()


def test_a_cell_with_a_gene_that_the_cache_does_not_have_raises(copied):
    def beyond(column: pa.ListArray) -> pa.ListArray:
        return pa.ListArray.from_arrays(column.offsets, pa.array(column.values.to_numpy() + 30, pa.uint16()))

    rewritten(copied, with_column("gene", beyond))
    with pytest.raises(ShardError, match=r"30 genes.*59"):
        CacheSource(copied).read(np.array([4100])).take(np.array([0]))


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("cells",), "4490"),
        (("cells",), 4491),
        (("obs_columns",), [None]),
        (("source", "layer"), None),
        (("source", "gene_hash"), 3),
        (("source", "obs_filter"), ["a"]),
        (("source",), []),
        (("shards",), []),
        (("shards", 0, "last_cell"), 4096),
        (("shards", 0, "first_cell"), -1),
        (("shards", 1, "n_cells"), True),
        (("shards", 1, "sha256"), None),
    ],
)
def test_a_manifest_with_wrong_types_or_inconsistent_numbers_raises(copied, place, value):
    manifest = json.loads((copied / "manifest.json").read_text())
    inner = manifest
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    (copied / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ShardError, match=r"manifest\.json is malformed"):
        open_source(copied)
