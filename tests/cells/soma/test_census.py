"""`CensusSource` on local SOMAs, and the errors of addresses, layers, counts and networks that are not usable."""

import re
import shutil
import threading
import tracemalloc

import cellxgene_census
import numpy as np
import pyarrow as pa
import pytest
import requests
import tiledbsoma as soma
from scipy.sparse import csr_matrix, vstack
from scipy.sparse import random as random_sparse

from scgpt_hf.cells.soma import census, chunks
from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.cells.source import open_source
from tests.support.soma_arrays import create_array, write_entries, write_experiment
from tests.support.source_contract import SourceContract


class TestCensus(SourceContract):
    @pytest.fixture
    def open_it(self, small_census):
        opened = []

        def open_it(**settings):
            opened.append(open_source(small_census, **settings))
            return opened[-1]

        yield open_it
        for source in opened:
            source.close()


@pytest.mark.filterwarnings("ignore:Deleting in write mode")  # newer versions have a mode for it
def test_presence_is_unknown_without_the_matrix_or_the_table_of_data_sets(small_census, tmp_path):
    organism = shutil.copytree(small_census / "census_data" / "homo_sapiens", tmp_path / "alone")
    assert open_source(organism).presence(np.array([0, 200])) is None
    copied = shutil.copytree(small_census, tmp_path / "soma")
    with soma.Measurement.open(str(copied / "census_data" / "homo_sapiens" / "ms" / "RNA"), "w") as rna:
        del rna["feature_dataset_presence_matrix"]
    assert open_source(copied).presence(np.array([0, 200])) is None


def test_a_data_set_that_the_census_does_not_list_has_no_known_genes(small_census, tmp_path, caplog):
    copied = shutil.copytree(small_census, tmp_path / "soma")
    rename_dataset(copied, "second", "third")
    presence = open_source(copied).presence(np.array([0, 200]))
    assert presence.measured.sum(axis=1).tolist() == [190, 0]
    assert "['second']" in caplog.text


def test_a_presence_matrix_with_more_rows_than_data_sets_raises(small_census, tmp_path):
    copied = shutil.copytree(small_census, tmp_path / "soma")
    rename_dataset(copied, "second", None)
    with pytest.raises(ValueError, match="feature_dataset_presence_matrix does not fit the 200 genes"):
        open_source(copied).presence(np.array([0, 200]))


def rename_dataset(census, old, new):
    """Rename a data set in the table of data sets, or remove its row."""
    uri = str(census / "census_info" / "datasets")
    with soma.DataFrame.open(uri) as frame:
        schema, table = frame.schema, frame.read().concat().to_pandas()
    table["dataset_id"] = table["dataset_id"].replace({old: new})
    shutil.rmtree(uri)
    with soma.DataFrame.create(uri, schema=schema, domain=[[0, 1]]) as frame:
        frame.write(pa.Table.from_pandas(table.dropna(subset="dataset_id"), schema=schema, preserve_index=False))


@pytest.mark.parametrize(
    ("dtype", "largest"), [("int32", 2**24), ("int64", 2**24), ("uint16", 65_535), ("float64", 2**24)]
)
def test_counts_of_other_types_are_read_exactly_or_not_at_all(tmp_path, dtype, largest):
    for excess in (0, 1):
        uri = create_array(tmp_path / f"x{excess}", dtype={"float64": "double"}.get(dtype, dtype))
        write_entries(uri, [1, 1], [5, 6], np.array([7, largest], dtype) + np.array([0, excess], dtype))
        with soma.SparseNDArray.open(uri) as array:
            if excess and largest == 2**24:
                with pytest.raises(ValueError, match=r"x1: float32 rounds 1 of 2 counts .* 16777217.* to 16777216"):
                    chunks.read_chunk(array, np.arange(10))
            elif not excess:
                assert chunks.read_chunk(array, np.arange(10)).sum_counts()[1] == 7 + largest


@pytest.mark.parametrize("fraction", [1e-60, 3 + 1e-12])
def test_fractions_that_float32_would_round_to_whole_numbers_raise(tmp_path, fraction):
    uri = create_array(tmp_path / "x", dtype="double")
    write_entries(uri, [1, 1], [5, 6], np.array([7, fraction]))
    with soma.SparseNDArray.open(uri) as array, pytest.raises(ValueError, match="float32 rounds 1 of 2 counts"):
        chunks.read_chunk(array, np.arange(10))


@pytest.fixture
def census_copy(small_census, tmp_path):
    return shutil.copytree(small_census, tmp_path / "census") / "census_data" / "homo_sapiens"


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("change", ["another count", "a missing fragment"])
def test_counts_that_contradict_the_totals_in_obs_raise(census_copy, native, change):
    x = census_copy / "ms" / "RNA" / "X" / "raw"
    with CensusSource(str(census_copy)) as source:
        cell_ids = source.obs().index.to_numpy()
        cell = int(cell_ids[4])
        total = source.read(cell_ids[4:5]).counts.sum()
    if change == "another count":
        write_entries(str(x), [cell], [0], np.array([3], np.float32))
        message = (
            rf"X/raw: 1 of {len(cell_ids)} cells .* cell {cell}: .* {total + 3:,.0f} counts, .* raw_sum {total:,.0f};"
        )
    else:
        shutil.rmtree(x / "__fragments")
        shutil.rmtree(x / "__commits")
        (x / "__fragments").mkdir()
        (x / "__commits").mkdir()
        message = rf"X/raw: {len(cell_ids)} of {len(cell_ids)} cells .* 0 genes with 0 counts"
    with CensusSource(str(census_copy), native=native) as source, pytest.raises(OSError, match=message):
        source.read(cell_ids)


def test_totals_of_more_genes_than_var_has_are_not_compared(census_copy, caplog):
    x = census_copy / "ms" / "RNA" / "X" / "raw"
    obs = str(census_copy / "obs")
    with soma.DataFrame.open(obs) as frame:
        table = frame.read().concat()
    place = table.schema.get_field_index("n_measured_vars")
    measured = pa.array(np.full(len(table), 60_000), table.schema.field(place).type)
    with soma.DataFrame.open(obs, "d") as frame:
        frame.delete_cells((slice(0, len(table) - 1),))
    with soma.DataFrame.open(obs, "w") as frame:
        frame.write(table.set_column(place, table.schema.field(place), measured))
    write_entries(str(x), [int(table["soma_joinid"][4].as_py())], [0], np.array([3], np.float32))
    with caplog.at_level("INFO", "scgpt_hf"), CensusSource(str(census_copy)) as source:
        source.read(source.obs().index.to_numpy())
    assert "describes 60000 genes (n_measured_vars)" in caplog.text


@pytest.mark.parametrize("native", [True, False])
def test_a_census_with_repeated_entries_is_read_with_their_sum_and_one_warning(tmp_path, caplog, native):
    write_experiment(tmp_path / "soma", counts_with_zeros(5000))
    layer = tmp_path / "soma" / "ms" / "RNA" / "X" / "raw"
    shutil.rmtree(layer)
    create_array(layer, shape=(5000, 30))
    write_entries(str(layer), [7, 7, 7, 8], [3, 3, 9, 3], np.array([2, 4, 1, 5], np.float32))
    with CensusSource(str(tmp_path / "soma"), native=native) as source:
        for _ in range(2):
            block = source.read(np.arange(5000))
    assert block.indptr[7:10].tolist() == [0, 2, 3]
    assert (block.indices.tolist(), block.data.tolist()) == ([3, 9, 3], [6, 1, 5])
    assert len([record for record in caplog.records if "repeated entries" in record.getMessage()]) == 1


def test_entries_of_genes_that_var_lacks_raise(tmp_path):
    counts = counts_with_zeros(3000)
    write_experiment(tmp_path / "soma", counts)
    layer = tmp_path / "soma" / "ms" / "RNA" / "X" / "raw"
    shutil.rmtree(layer)
    soma.SparseNDArray.create(str(layer), type=pa.float32(), shape=(3000, 70_000)).close()
    write_entries(str(layer), [1, 2], [29, 29], np.ones(2, np.float32))
    with CensusSource(str(tmp_path / "soma")) as source:
        assert source.read(np.arange(3000)).indices.tolist() == [29, 29]
    write_entries(str(layer), [1], [65_566], np.ones(1, np.float32))
    with CensusSource(str(tmp_path / "soma")) as source, pytest.raises(ValueError, match=r"gene 65,566; var has 30"):
        source.read(np.arange(3000))


def test_genes_have_two_columns(small_census):
    assert list(open_source(small_census).genes) == ["feature_id", "feature_name"]


def test_a_source_opens_from_the_address_of_one_organism(small_census):
    for address in (small_census / "census_data" / "homo_sapiens", [str(small_census)], f"file://{small_census}"):
        assert len(open_source(address).obs()) == 270


def counts_with_zeros(n_cells):
    """Counts from 0 to 6 of 30 genes; the zeros are stored."""
    return random_sparse(n_cells, 30, 0.2, format="csr", random_state=0, data_rvs=lambda n: np.arange(n) % 7)


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("min_density", [0.0, 2.0])
def test_reading_ranges_and_reading_lists_of_cells_give_the_same_counts(tmp_path, monkeypatch, n_threads, min_density):
    monkeypatch.setattr(chunks, "MIN_RANGE_DENSITY", min_density)
    counts = counts_with_zeros(5000)
    write_experiment(tmp_path / "soma", counts)
    with CensusSource(str(tmp_path / "soma"), n_threads=n_threads) as source:
        for seed in range(3):
            cell_ids = np.random.default_rng(seed).permutation(5000)[: 10 ** (seed + 1)]
            block = source.read(cell_ids)
            assert (block.counts.toarray() == counts[cell_ids].toarray()).all()
            assert (block.counts.data > 0).all()
            assert block.counts.has_canonical_format


@pytest.mark.parametrize(
    ("largest", "n_genes"), [(256, 2**16), (65_535, 2**16), (65_536, 2**16), (2.0**100, 2**16 + 1)]
)
def test_taken_rows_equal_those_of_the_matrix_whatever_the_width_of_counts_and_genes(tmp_path, largest, n_genes):
    rng = np.random.default_rng(0)  # with an integer, SciPy permutes all 300 million places: 20 s and 2.4 GB
    counts = random_sparse(
        4500, n_genes, 2e-4, format="csr", random_state=rng, data_rvs=lambda n: 1.0 + np.arange(n) % 7
    )
    counts.data[counts.indptr[3100]] = largest
    counts.indices[counts.indptr[4401] - 1] = n_genes - 1
    counts = csr_matrix(counts, dtype=np.float32)
    write_experiment(tmp_path / "soma", counts)
    cell_ids = np.random.default_rng(0).permutation(4500)
    few = np.union1d(cell_ids[:1500], [3100])
    with CensusSource(str(tmp_path / "soma")) as source:
        block = source.read(cell_ids)
        assert (source.read(few).counts != counts[few]).nnz == 0
    groups = [block.take(positions) for positions in np.split(np.arange(4500), [0, 512, 513, 2000])]
    joined = vstack([rows.counts for rows in groups], format="csr")
    for got in (block.counts, block, block.take(np.arange(4500)), joined):
        for name in ("data", "indices", "indptr"):
            assert np.array_equal(getattr(got, name), getattr(counts[cell_ids], name)), name
    fits = largest < 2**16 and n_genes <= 2**16
    dtypes = (np.uint16, np.uint16) if fits else (np.float32, np.int32)
    assert {(rows.data.dtype, rows.indices.dtype) for rows in groups} == {tuple(map(np.dtype, dtypes))}
    some = block.take(np.array([7, 4499, 0]))
    assert (some.counts != counts[cell_ids[[7, 4499, 0]]]).nnz == 0


def test_taking_a_few_cells_leaves_the_others_packed(tmp_path):
    write_experiment(tmp_path / "soma", random_sparse(4000, 2000, 0.1, format="csr", random_state=0, data_rvs=np.ones))
    with CensusSource(str(tmp_path / "soma")) as source:
        block = source.read(np.arange(4000))
    block.take(np.arange(100))
    tracemalloc.start()
    taken = block.take(np.arange(100))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    n_bytes = taken.data.nbytes + taken.indices.nbytes
    assert n_bytes == 4 * taken.indptr[-1] > 0
    assert peak < 3 * n_bytes < block.data.nbytes


def test_close_ends_the_threads_and_the_next_read_opens_the_source_again(small_census):
    others = set(threading.enumerate())
    source = open_source(small_census)
    cell_ids = source.obs().index.to_numpy()
    before = source.read(cell_ids).counts
    own = [thread for thread in set(threading.enumerate()) - others if thread.name.startswith("census-chunk")]
    assert own
    source.close()
    source.close()
    assert not any(thread.is_alive() for thread in own)
    assert (source.read(cell_ids).counts != before).nnz == 0
    source.close()


@pytest.mark.parametrize(("n_cores", "expected"), [(1, 2), (2, 3), (64, 4)])
def test_a_local_census_is_read_by_at_most_one_thread_more_than_cores(small_census, monkeypatch, n_cores, expected):
    monkeypatch.setattr(census, "n_cores", lambda: n_cores)
    others = set(threading.enumerate())
    with open_source(small_census) as source:
        source.read(source.obs().index.to_numpy()[:3])
        started = [thread.name for thread in set(threading.enumerate()) - others]
        assert len([name for name in started if name.startswith("census-chunk")]) == expected


def test_the_filter_is_evaluated_once(small_census, monkeypatch):
    evaluated = []
    select = census.read_matching_obs
    monkeypatch.setattr(census, "read_matching_obs", lambda *args: evaluated.append(args[1]) or select(*args))
    with open_source(small_census, obs_filter="donor_id == 'donor_4'") as source:
        cell_ids = source.obs(["cell_type"]).index.to_numpy()
        source.read(cell_ids[:3])
        assert source.describe()["n_cells"] == len(cell_ids)
    assert len(evaluated) == 1


def test_a_folder_that_is_no_census_raises_with_its_path(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path))):
        open_source(tmp_path)
    soma.Collection.create(str(tmp_path / "empty")).close()
    with pytest.raises(ValueError, match=r"empty.*'census_data'"):
        open_source(tmp_path / "empty")


def test_a_census_of_two_organisms_raises_with_the_address_of_each(tmp_path):
    with soma.Collection.create(str(tmp_path / "two")) as root:
        data = root.add_new_collection("census_data")
        for organism in ("homo_sapiens", "mus_musculus"):
            data.add_new_collection(organism, kind=soma.Experiment)
    with pytest.raises(ValueError, match=r"homo_sapiens.*mus_musculus"):
        open_source(tmp_path / "two")


def test_a_layer_with_fewer_rows_may_be_suggested(tmp_path):
    write_experiment(tmp_path / "soma", random_sparse(3000, 5, 0.5, format="csr", random_state=0))
    with soma.Collection.open(str(tmp_path / "soma" / "ms" / "RNA" / "X"), "w") as layers:
        small = layers.add_new_sparse_ndarray("small", type=pa.float32(), shape=(1500, 5))
        ones = random_sparse(1500, 5, 0.5, format="coo", random_state=1, data_rvs=np.ones, dtype=np.float32)
        small.write(pa.SparseCOOTensor.from_scipy(ones))
    with pytest.raises(ValueError, match="--layer='small'"):
        CensusSource(str(tmp_path / "soma")).read(np.arange(3000))


def test_counts_of_fewer_cells_than_in_obs_raise(tmp_path):
    counts = random_sparse(20, 5, 0.5, format="csr", random_state=0, data_rvs=np.ones)
    write_experiment(tmp_path / "soma", counts)
    layer = tmp_path / "soma" / "ms" / "RNA" / "X" / "raw"
    shutil.rmtree(layer)
    soma.SparseNDArray.create(str(layer), type=pa.float32(), shape=(15, 5)).close()
    with pytest.raises(ValueError, match=r"cell 19.*'raw'.*15 rows"):
        CensusSource(str(tmp_path / "soma")).read(np.arange(3))
    shutil.rmtree(layer)
    soma.DenseNDArray.create(str(layer), type=pa.float32(), shape=(20, 5)).close()
    with pytest.raises(ValueError, match=r"X/raw.*DenseNDArray"):
        CensusSource(str(tmp_path / "soma"))


def test_counts_that_are_not_raw_raise_with_the_name_of_the_layer(tmp_path):
    write_experiment(tmp_path / "soma", random_sparse(20, 5, 0.5, format="csr", random_state=0))
    with pytest.raises(ValueError, match=r"layer 'raw'.*no other layer"):
        CensusSource(str(tmp_path / "soma")).read(np.arange(20))


@pytest.mark.parametrize("wrong", [np.nan, np.inf, 0.5, -1])
def test_a_wrong_count_in_any_chunk_raises_whenever_it_is_read(tmp_path, wrong):
    counts = counts_with_zeros(5000)
    spoiled = counts.copy()
    spoiled.data[spoiled.indptr[4500]] = wrong
    write_experiment(tmp_path / "soma", spoiled, umi=counts, log=counts.log1p())
    with CensusSource(str(tmp_path / "soma")) as source:
        for _ in range(2):
            source.read(np.arange(4500))
            for cell_ids in (np.arange(5000), np.arange(4000, 4600), np.array([4500, 3])):
                with pytest.raises(ValueError, match=rf"found {wrong:g} and 0 more .*'raw'.*look raw: --layer='umi'$"):
                    source.read(cell_ids)
    with CensusSource(str(tmp_path / "soma"), layer="umi") as source:
        source.read(np.arange(5000))


def test_an_experiment_without_the_measurement_rna_raises(tmp_path):
    write_experiment(tmp_path / "soma", random_sparse(20, 5, 0.5, format="csr", random_state=0))
    with soma.open(str(tmp_path / "soma" / "ms"), "d") as measurements:
        del measurements["RNA"]
    with pytest.raises(ValueError, match="'RNA'"):
        CensusSource(str(tmp_path / "soma"))


@pytest.mark.parametrize("missing", ["obs", "ms", "ms/RNA/var", "ms/RNA/X", "ms/RNA/X/raw"])
@pytest.mark.parametrize("unlisted", [True, False])
def test_a_census_with_a_missing_array_raises_with_its_name(tmp_path, missing, unlisted):
    write_experiment(tmp_path / "soma", random_sparse(20, 5, 0.5, format="csr", random_state=0))
    parent, name = (tmp_path / "soma" / missing).parent, missing.rsplit("/", 1)[-1]
    if unlisted:  # as by an interrupted build
        with soma.open(str(parent), "d") as collection:
            del collection[name]
    else:  # as by an interrupted copy
        shutil.rmtree(parent / name)
    with pytest.raises((ValueError, OSError), match=rf"soma.*'{name}'|reading .*soma"):
        CensusSource(str(tmp_path / "soma")).genes  # noqa: B018


def test_without_a_network_the_error_suggests_a_local_copy(monkeypatch):
    def unreachable():
        raise requests.exceptions.ConnectionError("no route to census.cellxgene.cziscience.com")

    monkeypatch.setattr(cellxgene_census, "get_census_version_directory", unreachable)
    with pytest.raises(ConnectionError, match=r"'2025-11-08' \(no route.*aws s3 sync"):
        open_source("census://2025-11-08/homo_sapiens")


@pytest.fixture
def one_release(monkeypatch, small_census):
    releases = {name: {"release_build": "2025-11-08"} for name in ("stable", "2025-11-08")}
    monkeypatch.setattr(cellxgene_census, "get_census_version_directory", lambda: releases)
    monkeypatch.setattr(cellxgene_census, "open_soma", lambda census_version: soma.open(str(small_census)))


@pytest.mark.usefixtures("one_release")
def test_a_release_is_found_by_date_or_alias_and_recorded_by_date():
    for address in ("census://stable/homo_sapiens", "census://2025-11-08", "census://2025-11-08/homo_sapiens/"):
        described = open_source(address).describe()
        assert (described["census_version"], described["organism"]) == ("2025-11-08", "homo_sapiens")


@pytest.mark.usefixtures("one_release")
def test_an_unknown_release_or_organism_raises_with_the_known_ones():
    with pytest.raises(ValueError, match=r"'1999-01-01'.*2025-11-08"):
        open_source("census://1999-01-01/homo_sapiens")
    with pytest.raises(ValueError, match=r"'danio_rerio'.*homo_sapiens"):
        open_source("census://stable/danio_rerio")


def test_a_copy_without_genes_raises_with_the_address_of_var(small_census, tmp_path):
    copy = shutil.copytree(small_census, tmp_path / "soma")
    shutil.rmtree(copy / "census_data" / "homo_sapiens" / "ms" / "RNA" / "var" / "__commits")
    with pytest.raises(ValueError, match="RNA/var has 0 genes"):
        open_source(copy).genes  # noqa: B018


def test_a_folder_that_never_was_a_soma_is_not_called_damaged(tmp_path):
    (tmp_path / "cells.h5ad").touch()
    with pytest.raises(ValueError, match=r"none of the files of a SOMA, but \['cells.h5ad'\]; .*cells\.h5ad") as raised:
        open_source(tmp_path)
    assert "damaged" not in str(raised.value)
