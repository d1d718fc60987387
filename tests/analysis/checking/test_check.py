"""The check of a file finds what embedding and training would find, and says what to do."""

import logging
import sys

import numpy as np
import pandas as pd
import pytest
import scanpy
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf import check_cells, demo_cells, embed_anndata
from scgpt_hf.analysis.checking.obs_roles import find_group_columns
from scgpt_hf.cli.check import main
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


@pytest.fixture(scope="module")
def cells() -> AnnData:
    return demo_cells()


@pytest.fixture(scope="module")
def model(cells, tmp_path_factory):
    """An untrained model of the genes of the cells; the check does not depend on its weights."""
    folder = tmp_path_factory.mktemp("model")
    processor = ScGPTProcessor.from_genes(list(cells.var_names))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    network = ScGPTForPreTraining(ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes))
    for part in (network, processor):
        part.save_pretrained(folder)
    return folder


def normalized(cells: AnnData) -> AnnData:
    found = cells.copy()
    scanpy.pp.normalize_total(found, target_sum=1e4)
    scanpy.pp.log1p(found)
    return found


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code


@pytest.fixture(autouse=True)
def level_of_the_log():
    level = logging.getLogger("scgpt_hf").level
    yield
    logging.getLogger("scgpt_hf").setLevel(level)


def test_a_good_file_is_described_and_will_be_embedded(cells, model, tmp_path, capsys):
    cells.write_h5ad(tmp_path / "cells.h5ad")
    assert run(tmp_path / "cells.h5ad", "--model", model, "--device", "cpu") == 0
    text = capsys.readouterr().out
    for expected in (
        *("700 cells, 765 columns of counts (h5ad)", "raw counts  in X", "species: human", "765 of 765 genes"),
        *("donors  donor_id (8)", "labels  cell_type (10)", "to embed all cells on cpu", "This file will work."),
    ):
        assert expected in text
    assert max(map(len, text.splitlines()[1:])) <= 80
    report = embed_anndata(cells.copy(), model, progress=False)
    assert report["genes"] == check_cells(cells, model).coverage


@pytest.mark.parametrize("place", ["counts", ".raw"])
def test_counts_beside_a_normalized_x_are_found(cells, place):
    found = normalized(cells)
    if place == ".raw":
        found.raw = cells
    else:
        found.layers[place] = cells.X
    check = check_cells(found)
    assert check.ok
    assert check.layer == place
    assert check.layers == {"X": "normalized", place: "raw counts"}
    assert any("X does not hold the raw counts" in note for note in check.notes)


def test_a_file_without_raw_counts_fails_but_genes_and_columns_are_reported(cells, model, tmp_path, capsys):
    normalized(cells).write_h5ad(tmp_path / "cells.h5ad")
    assert run(tmp_path / "cells.h5ad", "--model", model) == 1
    text = capsys.readouterr().out
    for expected in (
        *("not found (X: normalized)", "765 of 765 genes", "donor_id (8)", "Problem: expected raw counts"),
        "This file will not work as it is.",
    ):
        assert expected in text
    assert "to embed all cells" not in text
    assert len(check_cells(normalized(cells)).problems) == 1


def test_genes_of_another_species_fail(cells, model):
    mouse = cells.copy()
    mouse.var_names = mouse.var_names.str.capitalize()
    check = check_cells(mouse, model)
    assert (check.species, check.model_species) == ("mouse", "human")
    assert ["mouse genes" in problem for problem in check.problems] == [True]
    assert check_cells(mouse).ok  # a model of the mouse can be trained


def test_cells_without_a_known_gene_fail_with_the_option_that_keeps_them(cells, model):
    some = cells.copy()
    matrix = some.X.tolil()
    matrix[[3, 600]] = 0
    some.X = csr_matrix(matrix)
    check = check_cells(some, model)
    assert (check.unknown_cells, check.empty_cells) == (2, 2)
    (problem,) = check.problems
    assert "2 of 700 cells express no gene of the vocabulary, e.g. rows [3, 600]" in problem
    assert "--empty nan" in problem
    assert check_cells(some).ok


def test_a_wrong_count_behind_the_first_cells_is_found(cells):
    many = AnnData(csr_matrix(np.ones((1200, 5), np.float32)), var=cells.var[:5])
    many.X[1100, 2] = 0.5
    check = check_cells(many)
    assert check.layer == "X"
    assert ["0.5" in problem for problem in check.problems] == [True]


@pytest.mark.filterwarnings("ignore:Observation names are not unique")
def test_repeats_are_notes(cells):
    doubled = AnnData(
        cells.X[:, [0, 1, 2, 0]],
        pd.DataFrame(index=["same"] * 2 + [f"cell{i}" for i in range(698)]),
        pd.DataFrame(index=["ENSG00000141510.1", "ENSG00000167286", "ENSG00000010610", "ENSG00000141510.2"]),
    )
    check = check_cells(doubled)
    assert (check.n_columns, check.n_genes, check.repeated_barcodes) == (4, 3, 1)
    assert sum("repeat a gene" in note or "name of an earlier one" in note for note in check.notes) == 2


@pytest.mark.parametrize(("name", "content"), [("cells.h5ad", b"no HDF5"), ("cells.xyz", b""), ("absent.h5ad", None)])
def test_a_file_that_cannot_be_opened_ends_with_its_name(tmp_path, monkeypatch, name, content):
    monkeypatch.setattr(sys, "argv", ["scgpt-hf check"])
    if content is not None:
        (tmp_path / name).write_bytes(content)
    code = run(tmp_path / name)
    assert str(code).startswith("scgpt-hf check: ")
    assert name in str(code)


def test_columns_of_groups_are_found_by_name_and_content():
    n = 30
    obs = pd.DataFrame(
        {
            "total_counts": np.linspace(0, 1, n),
            "n_genes": np.arange(n) + 200,
            "barcode": [f"b{i}" for i in range(n)],
            "Patient ID": ["p1", "p2", "p3"] * 10,
            "sex": pd.Categorical(["f", "m"] * 15),
            "leiden": pd.Categorical([str(i % 4) for i in range(n)]),
            "celltype_l2": ["B"] * 10 + ["T"] * 10 + ["unknown"] * 10,
            "assay": "10x 3' v3",
            "lists": [[1]] * n,
        }
    )
    found = {column.name: (column.role, column.n_groups, column.n_missing) for column in find_group_columns(obs)}
    assert found == {
        "Patient ID": ("donor", 3, 0),
        "assay": ("batch", 1, 0),
        "leiden": ("label", 4, 0),
        "celltype_l2": ("label", 2, 10),
        "sex": ("", 2, 0),
    }
