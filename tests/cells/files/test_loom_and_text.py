"""Cells of .loom files, and of tables of text in either direction, are the same cells; other tables raise."""

import sys
from importlib import metadata

import loompy
import numpy as np
import pandas as pd
import pytest
from packaging import version

from scgpt_hf.cells.files.additions import create_rows, open_copy
from scgpt_hf.cells.files.contents import open_anndata
from scgpt_hf.cells.source import open_source

# anndata 0.13 advises against loom, and loompy uses a function that Python 3.12 advises against.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*Loom isn:FutureWarning"),
    pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning"),
]


@pytest.fixture
def table(small_cells):
    """Counts of 160 cells, by Ensembl id."""
    cells = small_cells[0]
    return pd.DataFrame(cells.X.toarray().astype(int), cells.obs_names, cells.var_names)


def write_loom(path, counts, genes, cells, layers=None):
    loompy.create(str(path), {"": counts.T, **(layers or {})}, genes, cells)


def assert_same_cells(path, table):
    rows = np.random.default_rng(0).permutation(len(table))[:50]
    with open_source(path, primary_only=False) as source:
        assert source.genes["feature_id"].tolist() == table.columns.tolist()
        assert (source.read(rows).counts.toarray() == table.to_numpy()[rows]).all()
    adata = open_anndata(path)
    assert adata.obs_names.tolist() == table.index.tolist()
    assert (adata.X.toarray() == table.to_numpy()).all()


@pytest.mark.parametrize("by_gene", [True, False])
@pytest.mark.parametrize("name", ["counts.csv", "counts.TSV", "counts.txt.gz", "counts.csv.gz"])
def test_a_table_is_read_in_either_direction(tmp_path, table, name, by_gene):
    separator = "," if "csv" in name else "\t"
    (table.T if by_gene else table).to_csv(tmp_path / name, sep=separator)
    assert_same_cells(tmp_path / name, table)


def test_a_table_of_symbols_with_the_header_of_r_is_read(tmp_path, table):
    table = table.set_axis(["ACTB", "GAPDH", *(f"GENE{gene}" for gene in range(2, table.shape[1]))], axis="columns")
    lines = table.T.to_csv(sep="\t").splitlines()
    lines[0] = lines[0].removeprefix("\t")  # write.table names only the columns
    (tmp_path / "GSM1_counts.txt").write_text("\n".join(lines))
    assert_same_cells(tmp_path / "GSM1_counts.txt", table)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("cell,x,y\na,1,2\n", r"cannot decide whether the rows \['a'\] … or the columns \['x', 'y'\] … are genes"),
        ("cell,GAPDH,type\na,1,T cell\n", r"found other values in the columns \['type'\]"),
        ("cell,GAPDH\na,0.5\n", "found 0.5"),
        ("", "table of counts"),
        ("\x89PNG", "cannot decide|table of counts"),
    ],
)
def test_a_file_that_is_no_table_of_counts_raises(tmp_path, text, message):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=message) as raised:
        open_source(tmp_path / "table.csv")
    assert "table.csv" in str(raised.value)


def test_a_loom_file_is_read_with_its_layers(tmp_path, table):
    counts = table.to_numpy()
    genes = {"Gene": np.array([f"GENE{i}" for i in range(190)]), "Accession": table.columns.to_numpy(str)}
    cells = {"CellID": table.index.to_numpy(str), "clusters": np.resize(["a", "b"], 160)}
    write_loom(tmp_path / "velocyto.loom", counts, genes, cells, {"spliced": counts.T // 2})
    assert_same_cells(tmp_path / "velocyto.loom", table)
    with open_source(tmp_path / "velocyto.loom", layer="spliced", obs_filter="clusters == 'b'") as source:
        assert source.obs().index.tolist() == list(range(1, 160, 2))
        assert (source.read(np.array([5])).counts.toarray() == counts[5] // 2).all()
    with open_copy(tmp_path / "velocyto.loom", tmp_path / "out.h5ad", overwrite=False) as file:
        create_rows(file, "obsm/X_scgpt", (160, 2))
    copy = open_anndata(tmp_path / "out.h5ad")
    assert (copy.X[:].toarray() == counts).all()
    assert copy.obs["clusters"].tolist() == cells["clusters"].tolist()
    copy.file.close()


@pytest.mark.skipif(
    version.parse(metadata.version("anndata")) >= version.parse("0.13"),
    reason="write_loom of anndata 0.13 also gives loompy X as a layer without a name, which loompy refuses",
)
def test_a_loom_file_of_anndata_keeps_its_names(tmp_path, small_cells, table):
    cells = small_cells[0].copy()
    for frame in (cells.obs, cells.var):
        for column in frame.select_dtypes("string"):
            frame[column] = frame[column].astype(object)  # loompy cannot write the text type of pandas 3
        frame.index = frame.index.astype(object)
    cells.write_loom(tmp_path / "cells.loom")
    assert_same_cells(tmp_path / "cells.loom", table)


def test_without_loompy_or_with_a_damaged_file_one_sentence_names_the_file(tmp_path, table, monkeypatch):
    names = {"Gene": table.columns.to_numpy(str)}, {"CellID": table.index.to_numpy(str)}
    write_loom(tmp_path / "cells.loom", table.to_numpy(), *names)
    damaged = tmp_path / "damaged.loom"
    damaged.write_bytes((tmp_path / "cells.loom").read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"damaged\.loom"):
        open_source(damaged)
    monkeypatch.setitem(sys.modules, "loompy", None)
    with pytest.raises(ValueError, match=r"cells\.loom.*pip install 'scgpt_hf\[loom\]'"):
        open_source(tmp_path / "cells.loom")
