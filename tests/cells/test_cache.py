"""A cache gives the cells of its source, in any order, and says which of its files is corrupt."""

from pathlib import Path

import anndata
import datasets
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from source_contract import SourceContract

from scgpt_hf.cells.cache import CacheSource, uniform_band_size
from scgpt_hf.cells.cache_jobs import write_cache
from scgpt_hf.cells.cache_manifest import CacheError
from scgpt_hf.cells.source import CellSource, open_source


@pytest.fixture(scope="module")
def everything(small_census: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All 300 cells of the small Census and all its columns, cached."""
    folder, source = tmp_path_factory.mktemp("cache") / "all", open_source(small_census, primary_only=False)
    assert write_cache(source, folder, columns=source.columns)
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
    """4,500 cells: three bands."""
    return open_source(cells(4500))


@pytest.fixture(scope="module")
def cached(many: CellSource, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Them in two shards of two bands and one, of which the first is not full."""
    folder = tmp_path_factory.mktemp("cache") / "many"
    write_cache(many, folder, cell_ids=np.arange(10, 4500), columns=["donor_id", "age", "ratio"], cells_per_shard=2048)
    return folder


@given(seed=st.integers(0, 2**32 - 1), n_cells=st.integers(0, 300), n_threads=st.integers(1, 5))
@settings(deadline=None, max_examples=30)
def test_any_cells_in_any_order_are_what_the_source_gives(many, cached, seed, n_cells, n_threads):
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


def test_more_genes_than_sixteen_bits_number(tmp_path):
    n_genes = 2**16 + 5
    counts = csr_matrix(([3.0, 300.0], ([0, 1], [n_genes - 1, 0])), shape=(2, n_genes), dtype=np.float32)
    var = pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(n_genes)])
    write_cache(open_source(anndata.AnnData(counts, var=var)), tmp_path / "cache")
    assert (open_source(tmp_path / "cache").read(np.array([1, 0])).counts != counts[[1, 0]]).nnz == 0


def test_a_filter_of_the_cache_adds_to_that_of_its_source(small_census, tmp_path):
    write_cache(open_source(small_census, obs_filter="disease == 'normal'"), tmp_path / "cache")
    source = open_source(tmp_path / "cache", obs_filter="donor_id == 'donor_4'")
    expected = open_source(small_census, obs_filter="disease == 'normal' and donor_id == 'donor_4'").obs()
    assert source.obs().index.tolist() == expected.index.tolist()
    assert source.describe()["obs_filter"].count("disease == 'normal'") == 1
    assert source.describe()["n_cells"] == len(expected)


def test_a_plan_over_a_cache_shuffles_single_cells_until_that_takes_too_much_memory():
    assert uniform_band_size(1) == uniform_band_size(2**23) == 1
    assert uniform_band_size(2**23 + 1) == 2
    assert uniform_band_size(160_000_000) == 32


def damage(folder: Path, name: str, how) -> None:
    content = bytearray((folder / name).read_bytes())
    (folder / name).unlink()
    (folder / name).write_bytes(how(content))


def flipped(content: bytearray) -> bytearray:
    content[len(content) // 2] ^= 1
    return content


@pytest.fixture
def copied(cached: Path, tmp_path: Path) -> Path:
    import shutil

    return Path(shutil.copytree(cached, tmp_path / "copied"))


SECOND = "data-00001-of-00002.arrow"


def test_a_changed_byte_is_found_before_the_first_cell_is_read(copied):
    damage(copied, SECOND, flipped)
    source = open_source(copied)
    for _ in range(2):
        with pytest.raises(CacheError, match=rf"{SECOND} is corrupt: expected sha256 .*--rewrite"):
            source.read(np.array([10]))
    assert len(CacheSource(copied, verify=False).read(np.array([10]))) == 1


@pytest.mark.parametrize(
    ("name", "how", "message"),
    [
        (SECOND, lambda content: content[:-8], rf"{SECOND} is corrupt: expected [\d,]+ bytes, found"),
        ("manifest.json", lambda content: content[:-9], r"manifest.json is malformed"),
        ("manifest.json", lambda content: content.replace(b'"format": 1', b'"format": 9'), "format 9, expected 1"),
        ("manifest.json", lambda content: content.replace(b"data-00001", b"../ta-0001"), "no file of the cache's own"),
        ("manifest.json", lambda content: content.replace(b'"cells"', b'"cels"'), "manifest.json is malformed"),
    ],
)
def test_a_cache_that_is_not_whole_is_refused_when_it_is_opened(copied, name, how, message):
    damage(copied, name, how)
    with pytest.raises(CacheError, match=message):
        open_source(copied)


def test_a_missing_shard_is_named(copied):
    (copied / SECOND).unlink()
    with pytest.raises(CacheError, match=rf"{SECOND} is missing"):
        open_source(copied)


def test_other_genes_are_refused(copied):
    damage(copied, "genes.csv", lambda content: content.replace(b"ENSG00000000003", b"ENSG00000000999"))
    with pytest.raises(CacheError, match=r"genes\.csv has other genes than the cache"):
        open_source(copied).genes  # noqa: B018
    (copied / "genes.csv").unlink()
    with pytest.raises(CacheError, match="cannot read the genes"):
        open_source(copied).genes  # noqa: B018


def test_a_shard_that_is_none_is_refused(copied):
    (copied / SECOND).write_bytes(b"\0" * (copied / SECOND).stat().st_size)
    with pytest.raises(ValueError, match=rf"{SECOND} is no whole shard"):
        CacheSource(copied, verify=False).obs()
