"""Cells in every format that anndata or scanpy read are the same cells; what cannot be read raises."""

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import zarr
from anndata import AnnData
from scipy.sparse import csc_matrix

from scgpt_hf.cells.files.additions import create_rows, open_copy
from scgpt_hf.cells.files.contents import open_anndata
from scgpt_hf.cells.source import open_source
from tests.support import formats

WARNING = "ignore:Writing zarr v2"  # of anndata 0.12, in every call of write_zarr


def write_zarr(cells, path):
    cells.write_zarr(path)


def write_h5ad(cells, path):
    cells.write_h5ad(path)


def write_changed(change):
    def write(cells, path):
        cells.write_h5ad(path)
        formats.store_numbers_as(path, change)

    return write


def write_compressed(write):
    def write_gz(cells, path):
        plain = path.with_name(path.name[:-3])
        write(cells, plain)
        formats.compress(plain)

    return write_gz


def write_10x(**settings):
    return lambda cells, path: formats.write_10x_folder(cells, path, **settings)


FORMATS = {
    "cells.H5AD": write_h5ad,
    "cells.h5": write_h5ad,
    "cells.zarr": write_zarr,
    "any name": write_zarr,
    "cells.h5ad.gz": write_compressed(write_h5ad),
    "old.h5ad": formats.write_old_h5ad,
    "old.h5ad.gz": write_compressed(formats.write_old_h5ad),
    "big.h5ad": write_changed("big-endian"),
    "half.h5ad": write_changed("float16"),
    "filtered_feature_bc_matrix.h5": formats.write_10x_hdf5,
    "filtered_feature_bc_matrix.h5.gz": write_compressed(formats.write_10x_hdf5),
    "filtered_gene_bc_matrices.h5": lambda cells, path: formats.write_10x_hdf5(cells, path, version=2),
    "filtered_feature_bc_matrix": write_10x(),
    "Gene/filtered": write_10x(compressed=False),
    "hg19": write_10x(version=2, compressed=False),
    "hg19 compressed": write_10x(version=2),
    "geo": write_10x(prefix="GSM1_"),
}


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_read_as_the_same_cells(tmp_path, small_cells, name):
    cells = small_cells[0].copy()
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    FORMATS[name](cells, tmp_path / name)
    rows = np.random.default_rng(0).permutation(160)[:50]
    with open_source(tmp_path / name, primary_only=False) as source:
        read = source.read(rows)
        assert source.genes["feature_id"].tolist() == cells.var_names.tolist()
        assert source.genes["feature_name"].tolist() == cells.var["feature_name"].tolist()
        assert (read.counts.toarray() == cells.X.toarray()[rows]).all()
        if "cell_type" in source.obs_columns:
            assert (
                source.read(rows, ["cell_type"]).obs["cell_type"].tolist() == cells.obs["cell_type"].iloc[rows].tolist()
            )
    adata = open_anndata(tmp_path / name)
    assert adata.shape == (160, 190)
    assert (open_source(adata, primary_only=False).read(rows).counts.toarray() == read.counts.toarray()).all()
    adata.file.close()


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("name", ["cells.zarr", "cells.h5ad.gz", "old.h5ad", "big.h5ad", "half.h5ad"])
def test_obs_of_every_format_can_be_filtered(tmp_path, small_cells, name):
    cells = small_cells[0].copy()
    cells.obs["age"] = np.arange(160, dtype=np.float32)
    FORMATS[name](cells, tmp_path / name)
    with open_source(tmp_path / name, obs_filter="age < 30 and cell_type == 'T cell'", primary_only=False) as source:
        expected = cells.obs["cell_type"].to_numpy()[:30] == "T cell"
        assert source.obs().index.tolist() == np.flatnonzero(expected).tolist()


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("name", ["cells.zarr", "cells.h5ad.gz", "cells.H5AD", "hg19", "filtered_feature_bc_matrix.h5"])
def test_results_are_added_to_an_h5ad_copy_of_every_format(tmp_path, small_cells, monkeypatch, name):
    monkeypatch.setattr("scgpt_hf.cells.files.matrices.ROWS_COPIED", 50)
    cells = small_cells[0].copy()
    cells.layers.update({"dense": cells.X.toarray(), "csc": csc_matrix(cells.X)})
    cells.raw = cells
    FORMATS[name](cells, tmp_path / name)
    with open_copy(tmp_path / name, tmp_path / "out.h5ad", overwrite=False) as file:
        create_rows(file, "obsm/X_scgpt", (160, 2))
    read = anndata.read_h5ad(tmp_path / "out.h5ad")
    assert (read.X != cells.X).nnz == 0
    assert read.obsm["X_scgpt"].shape == (160, 2)
    if "matrix" not in name and name != "hg19":
        assert (read.layers["dense"] == cells.X.toarray()).all()
        assert (read.layers["csc"] != cells.X).nnz == (read.raw.X != cells.X).nnz == 0
        assert read.obs["donor_id"].tolist() == cells.obs["donor_id"].tolist()


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("form", ["csc", "dense"])
@pytest.mark.parametrize("name", ["cells.zarr", "cells.h5ad", "big.h5ad", "half.h5ad"])
def test_matrices_by_gene_and_dense_ones_are_read(tmp_path, small_cells, name, form):
    cells = small_cells[0].copy()
    cells.X = csc_matrix(cells.X) if form == "csc" else cells.X.toarray()
    {"cells.h5ad": write_h5ad, **FORMATS}[name](cells, tmp_path / name)
    rows = np.array([7, 150, 3])
    expected = small_cells[0].X.toarray()[rows]
    assert (open_source(tmp_path / name, primary_only=False).read(rows).counts.toarray() == expected).all()


@pytest.mark.filterwarnings(WARNING)
@pytest.mark.parametrize("name", ["cells.zarr", "cells.h5ad", "big.h5ad", "cells.h5ad.gz"])
def test_counts_of_files_that_can_stay_on_disk_stay_there(tmp_path, small_cells, name):
    {"cells.h5ad": write_h5ad, **FORMATS}[name](small_cells[0], tmp_path / name)
    with open_source(tmp_path / name) as source:
        counts = source.parts[0].counts
        assert isinstance(getattr(counts, "group", None), h5py.Group | zarr.Group)
    assert not isinstance(open_anndata(tmp_path / name).X, np.ndarray)


def test_antibodies_are_left_out_and_counted(tmp_path, small_cells, caplog):
    cells = small_cells[0].copy()
    cells.var["feature_types"] = ["Gene Expression"] * 187 + ["Antibody Capture"] * 3
    formats.write_10x_hdf5(cells, tmp_path / "cells.h5")
    formats.write_10x_folder(cells, tmp_path / "folder")
    for name in ("cells.h5", "folder"):
        caplog.clear()
        assert open_source(tmp_path / name).genes["feature_id"].tolist() == cells.var_names[:187].tolist()
        assert "left out {'Antibody Capture': 3}" in caplog.text


def test_sources_of_different_formats_are_joined(tmp_path, small_cells):
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    formats.write_10x_folder(small_cells[1], tmp_path / "10x")
    source = open_source([tmp_path / "cells.h5ad", tmp_path / "10x"], primary_only=False)
    assert len(source.obs()) == 300
    assert source.describe()["kind"] == "h5ad+10x"


def test_old_files_keep_their_raw_counts(tmp_path, small_cells):
    cells = small_cells[0].copy()
    cells.raw = cells
    cells = cells[:, :20].copy()
    cells.X = cells.X.log1p()
    formats.write_old_h5ad(cells, tmp_path / "old.h5ad")
    with open_source(tmp_path / "old.h5ad", layer=".raw", primary_only=False) as source:
        assert (source.read(np.arange(160)).counts != small_cells[0].X).nnz == 0


def test_a_matrix_among_several_is_named_by_its_path(tmp_path, small_cells):
    formats.write_10x_folder(small_cells[0], tmp_path / "geo", prefix="GSM1_")
    formats.write_10x_folder(small_cells[1], tmp_path / "other", prefix="GSM2_")
    for path in (tmp_path / "other").iterdir():
        path.rename(tmp_path / "geo" / path.name)
    with pytest.raises(ValueError, match=r"geo' holds 2 matrices.*GSM1_matrix\.mtx\.gz"):
        open_source(tmp_path / "geo")
    paths = [tmp_path / "geo" / f"GSM{sample}_matrix.mtx.gz" for sample in (1, 2)]
    assert [len(open_source(path).obs()) for path in paths] == [160, 140]
    (tmp_path / "geo" / "GSM1_barcodes.tsv.gz").unlink()
    with pytest.raises(ValueError, match=r"geo' has no GSM1_barcodes\.tsv nor"):
        open_source(paths[0])


@pytest.mark.parametrize("name", ["cells.h5ad.gz", "cells.h5", "cells.zarr", "10x"])
def test_damaged_files_raise_an_error_with_their_name_and_leave_nothing_behind(tmp_path, monkeypatch, name):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "scratch"))
    (tmp_path / "scratch").mkdir()
    path = tmp_path / name
    if name == "10x":
        path.mkdir()
        for file in ("matrix.mtx", "genes.tsv", "barcodes.tsv"):
            (path / file).write_text("damaged")
    elif name == "cells.zarr":
        path.mkdir()
    else:
        path.write_bytes(b"damaged")
    with pytest.raises(ValueError, match=f"{name}'"):
        open_source(path)
    assert not list((tmp_path / "scratch").iterdir())


def test_a_truncated_gz_file_raises(tmp_path, small_cells):
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    path = formats.compress(tmp_path / "cells.h5ad")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cannot decompress .*cells\.h5ad\.gz"):
        open_source(path)


def test_an_anndata_in_memory_may_have_unusual_numbers():
    obs = pd.DataFrame({"age": np.arange(4, dtype=">f8")}, index=list("abcd"))
    adata = AnnData(np.eye(4, 3, dtype=">f4"), obs, pd.DataFrame(index=["ENSG1", "ENSG2", "ENSG3"]))
    source = open_source(adata, obs_filter="age > 1")
    assert source.read(np.array([3, 2])).counts.toarray().tolist() == [[0, 0, 0], [0, 0, 1]]
    assert anndata.AnnData is type(adata)
