"""The layer with raw counts is found where exactly one is named for it; counts are rounded only on request."""

import pickle

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.cells.cache.jobs import plan_cache
from scgpt_hf.cells.cache.reader import CacheSource
from scgpt_hf.cells.jobs.shard_jobs import write_shards
from scgpt_hf.cells.source import open_source


@pytest.fixture
def cells():
    """Forty cells whose counts are in no layer yet; X is normalized."""
    counts = csr_matrix(np.random.default_rng(0).poisson(2, (40, 6)).astype(np.float32))
    obs = pd.DataFrame({"donor_id": ["a", "b"] * 20}, index=[f"c{i}" for i in range(40)])
    found = AnnData(counts, obs, pd.DataFrame(index=[f"ENSG{i:011d}" for i in range(6)]), uns={"counts": counts})
    sums = np.maximum(counts.sum(axis=1), 1)
    found.X = csr_matrix(np.log1p(counts.multiply(1e4 / sums)), dtype=np.float32)
    return found


def counts_of(cells, **settings):
    with open_source(cells, **settings) as source:
        return source.read(np.arange(40)).counts.toarray()


def add_raw(cells):
    raw = cells.copy()
    raw.X = cells.uns["counts"]
    cells.raw = raw


@pytest.mark.parametrize("name", [".raw", "counts", "raw_counts", "Raw Counts", "umi"])
@pytest.mark.parametrize("on_disk", [False, True])
def test_counts_are_found_where_only_one_layer_has_them(tmp_path, cells, caplog, name, on_disk):
    if name == ".raw":
        add_raw(cells)
    else:
        cells.layers[name] = cells.uns["counts"].copy()
    cells.layers["scaled"] = cells.X * 2
    cells.write_h5ad(tmp_path / "cells.h5ad")
    address = tmp_path / "cells.h5ad" if on_disk else cells
    assert (counts_of(address) == cells.uns["counts"].toarray()).all()
    lines = [record.message for record in caplog.records if "X does not hold raw counts" in record.message]
    assert len(lines) == 1
    assert name in lines[0]
    assert open_source(address).describe()["layer"] == name


def test_x_is_used_if_it_holds_raw_counts(cells, caplog):
    cells.layers["counts"] = cells.uns["counts"] * 2
    cells.X = cells.uns["counts"]
    assert (counts_of(cells) == cells.uns["counts"].toarray()).all()
    assert "does not hold" not in caplog.text


def test_counts_are_found_where_x_is_missing(tmp_path, cells):
    cells.layers["counts"] = cells.uns["counts"].copy()
    cells.X = None
    cells.write_h5ad(tmp_path / "cells.h5ad")
    for address in (cells, tmp_path / "cells.h5ad"):
        assert (counts_of(address) == cells.uns["counts"].toarray()).all()


def test_several_layers_with_counts_raise_until_one_is_chosen(cells):
    add_raw(cells)
    cells.layers["counts"] = cells.uns["counts"].copy()
    with pytest.raises(ValueError, match=r"--layer='counts' or --layer='.raw'"):
        open_source(cells)
    assert (counts_of(cells, layer="counts") == cells.uns["counts"].toarray()).all()


def test_a_layer_whose_name_does_not_say_counts_is_only_suggested(cells):
    cells.layers["spliced"] = cells.uns["counts"].copy()
    with pytest.raises(ValueError, match="look raw: --layer='spliced'"):
        open_source(cells)


def test_a_requested_layer_without_counts_raises_although_another_has_them(cells):
    cells.layers["counts"] = cells.uns["counts"].copy()
    with pytest.raises(ValueError, match="layer 'X' of AnnData"):
        open_source(cells, layer="X")


def test_each_file_of_several_has_its_own_layer(tmp_path, cells):
    normalized, plain = cells.copy(), cells.copy()
    normalized.layers["counts"] = cells.uns["counts"].copy()
    plain.X = cells.uns["counts"]
    paths = [tmp_path / "normalized.h5ad", tmp_path / "plain.h5ad"]
    normalized.write_h5ad(paths[0])
    plain.write_h5ad(paths[1])
    source = open_source(paths)
    assert source.describe()["layer"] == "counts, X"
    assert (source.read(np.arange(80)).counts.toarray() == np.tile(cells.uns["counts"].toarray(), (2, 1))).all()


def fractional(cells):
    """Return counts as RSEM or SoupX estimate them, with halves among them."""
    noise = np.random.default_rng(1).choice([-0.5, -0.25, 0, 0.5, 0.125], cells.shape)
    return np.maximum(cells.uns["counts"].toarray() * 10 + noise, 0).astype(np.float32)


@pytest.mark.parametrize("on_disk", [False, True])
def test_fractional_counts_raise_until_they_are_rounded(tmp_path, cells, caplog, on_disk):
    cells.X = csr_matrix(fractional(cells))
    cells.write_h5ad(tmp_path / "cells.h5ad")
    address = tmp_path / "cells.h5ad" if on_disk else cells
    with pytest.raises(ValueError, match=r"fractional.*round them: --round_counts"):
        open_source(address)
    with open_source(address, round_counts=True) as source:
        block = source.read(np.arange(40))
        assert (block.counts.toarray() == np.rint(fractional(cells))).all()
        assert block.counts.nnz == np.count_nonzero(np.rint(fractional(cells))), "stored zeros"
        assert source.describe()["round_counts"] is True
        assert pickle.loads(pickle.dumps(source)).describe() == source.describe()
    assert "layer 'X' of" in caplog.text
    assert "rounding counts" in caplog.text
    assert (cells.X.toarray() == fractional(cells)).all(), "reading changed the AnnData"


@pytest.mark.parametrize("log", [False, True])
def test_normalized_values_are_not_rounded(cells, log):
    cells.X = cells.X if log else cells.X.expm1()
    with pytest.raises(ValueError, match=r"cannot round layer 'X' of AnnData: all cells have the same sum") as error:
        open_source(cells, round_counts=True)
    assert "--round_counts" not in str(error.value)
    cells.layers["counts"] = fractional(cells)
    assert (counts_of(cells, round_counts=True) == np.rint(fractional(cells))).all()


def test_whole_counts_are_preferred_to_rounded_ones(cells):
    cells.X = fractional(cells)
    cells.layers["counts"] = cells.uns["counts"].copy()
    assert (counts_of(cells, round_counts=True) == cells.uns["counts"].toarray()).all()


@pytest.mark.parametrize("wrong", [-0.25, np.nan])
def test_rounding_does_not_hide_wrong_counts(cells, wrong):
    cells.X = fractional(cells)
    cells.X[3, 2] = wrong
    with pytest.raises(ValueError, match=r"negative|not finite"):
        open_source(cells, round_counts=True)


def test_a_cache_records_that_its_counts_were_rounded(tmp_path, cells):
    cells.X = fractional(cells)
    assert write_shards(plan_cache(open_source(cells, round_counts=True), tmp_path / "cache"))
    for source in (CacheSource(tmp_path / "cache"), open_source(tmp_path / "cache", round_counts=True)):
        assert source.describe()["round_counts"] is True
        assert (source.read(np.arange(40)).counts.toarray() == np.rint(fractional(cells))).all()


def test_a_backed_anndata_is_read_like_one_in_memory(tmp_path, cells):
    cells.layers["counts"] = cells.uns["counts"].copy()
    cells.write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    assert (counts_of(backed) == cells.uns["counts"].toarray()).all()
    backed.file.close()
