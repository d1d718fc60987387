"""`.h5ad` files and AnnData fulfil the contract of a source; wrong layers and damaged files raise."""

import errno
import re

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData, concat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.sparse import csc_matrix, csr_matrix

from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.cells.source import open_source
from tests.support.source_contract import SourceContract


def write(folder, cells):
    """Write each AnnData to a file named by its dataset, and return the paths."""
    paths = []
    for part in cells:
        paths.append(folder / f"{part.obs['dataset_id'].iloc[0]}.h5ad")
        part.write_h5ad(paths[-1])
    return paths


@pytest.fixture(scope="module")
def paths(tmp_path_factory, small_cells):
    return write(tmp_path_factory.mktemp("files"), small_cells)


class TestFiles(SourceContract):
    @pytest.fixture
    def open_it(self, paths):
        return lambda **settings: open_source(paths, **settings)


class TestAnnData(SourceContract):
    @pytest.fixture
    def open_it(self, small_cells):
        joined = concat(small_cells, join="outer", fill_value=0, merge="first")
        genes = dict.fromkeys(gene for part in small_cells for gene in part.var_names)
        joined = joined[:, list(genes)].copy()
        joined.var["feature_name"] = [f"GENE{int(gene[4:])}" for gene in joined.var_names]
        return lambda **settings: open_source(joined.copy(), **settings)

    def measured_in(self, small_cells, genes):
        return np.ones((300, len(genes)), dtype=bool)  # one table of genes for all


@pytest.fixture
def cells():
    """Thirty valid cells with five genes, for tests that change them."""
    counts = csr_matrix(np.arange(150, dtype=np.float32).reshape(30, 5) % 4)
    obs = pd.DataFrame({"donor_id": ["a", "b"] * 15}, index=[f"c{i}" for i in range(30)])
    return AnnData(counts, obs, pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(5)]))


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix, lambda counts: counts.toarray()])
def test_counts_are_read_from_every_matrix_format(tmp_path, cells, form):
    expected = cells.X.toarray()
    cells.X = form(cells.X)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    order = np.random.default_rng(0).permutation(30)
    for data in (cells, tmp_path / "cells.h5ad"):
        assert (AnnDataSource(data).read(order).counts.toarray() == expected[order]).all()
    assert (form(csr_matrix(expected)) != cells.X).sum() == 0, "reading changed the AnnData"


@pytest.mark.parametrize("names", [["ENSG1", "ENSG2", "ENSG1", "ENSG3", "ENSG2"], ["A", "B", "A", "C", "B"]])
@pytest.mark.parametrize("form", [csr_matrix, csc_matrix, lambda counts: counts.toarray()])
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_columns_of_one_gene_are_summed(tmp_path, cells, names, form, caplog):
    cells.var_names = names
    counts = cells.X.toarray()
    counts[:, 0] = 0  # the first column of a gene is empty, and another one holds its counts
    cells.X = form(csr_matrix(counts))
    expected = np.stack([counts[:, 2], counts[:, 1] + counts[:, 4], counts[:, 3]], axis=1)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for data in (cells, tmp_path / "cells.h5ad"):
        source, order = AnnDataSource(data), np.random.default_rng(0).permutation(30)
        assert source.genes["feature_id"].tolist() == list(dict.fromkeys(names))
        block = source.read(order)
        assert (block.counts.toarray() == expected[order]).all()
        assert csr_matrix((block.data, block.indices, block.indptr), block.shape).has_canonical_format
        assert f"2 columns have the gene id of an earlier column, e.g. {names[:2]}" in caplog.text
        caplog.clear()


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.integers(0, 299), unique=True, max_size=40))
def test_any_rows_of_a_file_are_read_correctly(tmp_path, small_cells, rows):
    path = tmp_path / "first.h5ad"
    if not path.exists():
        AnnData(csr_matrix(np.arange(600, dtype=np.float32).reshape(300, 2))).write_h5ad(path)
    counts = AnnDataSource(path).read(np.array(rows, dtype=np.int64)).counts.toarray()
    assert counts.tolist() == [[2 * row, 2 * row + 1] for row in rows]


@pytest.mark.parametrize("wrong", [np.nan, -1, 0.5])
def test_wrong_counts_beyond_the_first_cells_raise_when_they_are_read(cells, wrong, monkeypatch):
    monkeypatch.setattr("scgpt_hf.cells.files.layers.CELLS_CHECKED", 10)
    cells.X.data[cells.X.indptr[25]] = wrong
    source = AnnDataSource(cells)
    source.read(np.arange(20))
    with pytest.raises(ValueError, match="AnnData"):
        source.read(np.arange(30))


def test_a_log_layer_raises_and_the_error_suggests_raw_layers(cells):
    cells.layers["umi"] = cells.X.copy()
    cells.raw = cells.copy()
    cells.X = cells.X.log1p()
    with pytest.raises(ValueError, match=r"layer 'X' of AnnData.*--layer='umi' or --layer='.raw'"):
        AnnDataSource(cells)
    del cells.layers["umi"], cells.raw
    with pytest.raises(ValueError, match=r"layer 'X' of AnnData.*no other layer"):
        AnnDataSource(cells)


@pytest.mark.parametrize("layer", ["raw", ".raw", "umi"])
def test_counts_are_read_from_the_requested_layer(tmp_path, cells, layer):
    counts = cells.X.toarray()
    cells.raw = cells.copy()
    cells.layers["umi"] = cells.X.copy()
    cells = cells[:, :3].copy() if layer != "umi" else cells
    cells.X = cells.X.log1p()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for data in (cells, tmp_path / "cells.h5ad"):
        source = AnnDataSource(data, layer=layer)
        assert len(source.genes) == 5
        assert (source.read(np.arange(30)).counts.toarray() == counts).all()


def test_is_primary_data_may_be_text_or_missing(cells):
    without = cells.copy()
    cells.obs["is_primary_data"] = pd.Categorical(["True", "False"] * 15)
    assert len(AnnDataSource(cells).obs()) == 15
    assert len(AnnDataSource(without).obs()) == 30


def test_cells_of_a_file_without_is_primary_data_count_as_primary(tmp_path, small_cells):
    first, second = small_cells[0].copy(), small_cells[1].copy()
    del second.obs["is_primary_data"]
    assert len(AnnDataSource(write(tmp_path, [first, second])).obs()) == 144 + 140


def test_files_and_anndata_without_cells_raise(tmp_path, cells):
    (tmp_path / "text.h5ad").write_text("not hdf5")
    with pytest.raises(ValueError, match=r"text\.h5ad"):
        open_source(tmp_path / "text.h5ad")
    with pytest.raises(ValueError, match="AnnData has no cells"):
        AnnDataSource(cells[:0].copy())


def test_addresses_without_data_raise(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad"):
        open_source(tmp_path / "none.h5ad")
    with pytest.raises(ValueError, match="no address given"):
        open_source([])
    (tmp_path / "cells.csv").write_text("")
    for address in (tmp_path / "cells.csv", [tmp_path, tmp_path / "cells.csv"]):
        with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
            open_source(address)


def test_a_file_without_read_permission_raises_a_permission_error(tmp_path, monkeypatch):
    some = AnnData(np.ones((2, 3), np.float32), var=pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(3)]))
    some.write_h5ad(tmp_path / "cells.h5ad")

    def refuse(path, *_):
        raise PermissionError(errno.EACCES, "unable to open file", str(path))

    monkeypatch.setattr("scgpt_hf.cells.files.contents.h5py.File", refuse)
    with pytest.raises(PermissionError, match=r"cells\.h5ad"):
        open_source(tmp_path / "cells.h5ad")


@pytest.mark.parametrize("form", [csr_matrix, csc_matrix, lambda counts: counts.toarray()])
@pytest.mark.parametrize("on_disk", [True, False])
@pytest.mark.parametrize(("dtype", "wrong"), [("int32", 2**24 + 1), ("int64", 2**24 + 1), ("float64", 2**24 + 1)])
def test_counts_that_float32_would_round_raise(tmp_path, cells, form, on_disk, dtype, wrong):
    counts = cells.X.astype(dtype)
    counts.data[7] = wrong
    cells.X = form(counts)
    cells.write_h5ad(tmp_path / "cells.h5ad")
    with pytest.raises(ValueError, match=r"float32 rounds 1 of .* 16777217.* to 16777216"):
        AnnDataSource(tmp_path / "cells.h5ad" if on_disk else cells).read(np.arange(30))


def test_repeated_entries_are_added_up_with_one_warning(cells, caplog):
    indices, indptr = np.array([1, 1, 3]), np.array([0, 3] + [3] * 29)
    cells.X = csr_matrix((np.array([2, 4, 1], np.float32), indices, indptr), shape=(30, 5))
    source = AnnDataSource(cells)
    for _ in range(2):
        block = source.read(np.arange(30))
    assert (block.indices.tolist(), block.data.tolist()) == ([1, 3], [6, 1])
    assert len([record for record in caplog.records if "repeated entries" in record.getMessage()]) == 1


@pytest.mark.parametrize("kind", ["repeated barcodes", "64-bit offsets", "view", "names of columns", "unused category"])
@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_unusual_but_valid_anndata_are_read(tmp_path, cells, kind):
    expected = cells.X.toarray()
    match kind:
        case "repeated barcodes":
            cells.obs_names = ["AAAC-1"] * 30
        case "64-bit offsets":
            cells.X.indptr, cells.X.indices = cells.X.indptr.astype(np.int64), cells.X.indices.astype(np.int64)
        case "view":
            cells = cells[::2]
            expected = expected[::2]
        case "names of columns":
            cells.var["feature_id"], cells.var.index.name = cells.var_names, "feature_id"
            cells.obs["soma_joinid"] = np.arange(30)[::-1]
        case "unused category":
            cells.obs["group"] = pd.Categorical(["a"] * 30, categories=["a", "b"])
    cells.copy().write_h5ad(tmp_path / "cells.h5ad")
    for data in (cells, tmp_path / "cells.h5ad"):
        with AnnDataSource(data) as source:
            order = np.random.default_rng(0).permutation(len(expected))
            assert (source.read(order).counts.toarray() == expected[order]).all()
            if kind == "unused category":
                assert source.obs(["group"])["group"].cat.categories.tolist() == ["a"]


@pytest.mark.parametrize("repeated", ["entry", "gene"])
@pytest.mark.filterwarnings("ignore:Variable names are not unique")
def test_sums_that_float32_would_round_raise(cells, repeated):
    # 2**24 + 1 is the first whole number that float32 does not have: it becomes 2**24.
    indices, indptr = np.array([1, 1] if repeated == "entry" else [1, 2]), np.array([0, 2] + [2] * 29)
    cells.X = csr_matrix((np.array([2**24, 1], np.float32), indices, indptr), shape=(30, 5))
    if repeated == "gene":
        cells.var_names = ["A", "B", "B", "C", "D"]
    with pytest.raises(ValueError, match="AnnData: the counts of a gene that occurs several times add up to 16777216"):
        AnnDataSource(cells).read(np.arange(30))


def test_a_repeated_column_of_obs_is_named(cells):
    cells.obs = pd.concat([cells.obs, cells.obs], axis="columns")
    with pytest.raises(ValueError, match=r"AnnData: expected each column of obs once, found \['donor_id'\]"):
        open_source(cells)


def test_columns_of_obs_are_named_by_text(cells):
    cells.obs[0] = 7
    source = open_source(cells)
    assert source.obs_columns == ["donor_id", "0"]
    assert (source.obs(["0"])["0"] == 7).all()
    cells.obs["0"] = 8
    with pytest.raises(ValueError, match=r"found \['0'\] more than once"):
        open_source(cells)


@pytest.mark.parametrize(("value", "kind"), [([1, 2], "list"), ({"a": 1}, "dict")])
def test_a_column_of_lists_or_dictionaries_is_left_out_and_logged(cells, caplog, value, kind):
    cells.obs["clones"] = [value] * 29 + [None]
    source = open_source(cells)
    assert source.obs_columns == ["donor_id"]
    assert len(source.read(np.arange(30)).cell_ids) == 30
    assert f"left out the obs column 'clones': its values are of type {kind}" in caplog.text


def test_primary_data_may_be_written_as_in_r(cells):
    cells.obs["is_primary_data"] = pd.Categorical(["TRUE", "FALSE"] * 15)
    assert len(open_source(cells).obs()) == 15
