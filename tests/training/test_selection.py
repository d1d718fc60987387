"""Cells and genes are selected by columns that options name; an error about a column names its option."""

import logging

import pytest

from scgpt_hf.cells.source import open_source
from scgpt_hf.training import selection
from scgpt_hf.training.selection import select_cells_and_genes
from scgpt_hf.training.settings import DataSettings


@pytest.fixture
def source(small_cells):
    cells = small_cells[0].copy()
    cells.obs = cells.obs.rename(columns={"donor_id": "patient"})
    return open_source(cells)


@pytest.mark.parametrize(
    ("settings", "column", "option"),
    [
        ({}, "donor_id", "--donor_key"),
        ({"donor_key": "patient", "batch_key": "lane"}, "lane", "--batch_key"),
        ({"donor_key": "patient", "gene_selection": "hvg", "hvg_batch_key": "lane"}, "lane", "--hvg_batch_key"),
    ],
)
def test_an_absent_column_raises_with_the_option_that_names_another(source, settings, column, option):
    with pytest.raises(ValueError, match=f"no column '{column}'; name another one with {option}; .*'patient'"):
        select_cells_and_genes(source, DataSettings(**settings), seed=0)


def test_variable_genes_are_ranked_within_donors_whatever_the_name_of_their_column(source, small_cells, caplog):
    settings = {"gene_selection": "hvg", "n_hvg": 30, "min_gene_counts": 1, "validation_fraction": 0.5}
    expected = select_cells_and_genes(open_source(small_cells[0]), DataSettings(**settings), seed=0)
    with caplog.at_level(logging.INFO):
        found = select_cells_and_genes(source, DataSettings(donor_key="patient", **settings), seed=0)
    assert found.genes == expected.genes
    assert "ranked within each patient" in caplog.text


def test_a_dry_run_over_many_cells_chooses_genes_on_a_sample_of_the_training_cells(small_cells, monkeypatch):
    source, settings = open_source(small_cells[0]), DataSettings(min_gene_counts=1, validation_fraction=0.5)
    expected = select_cells_and_genes(source, settings, seed=0)
    few = select_cells_and_genes(source, settings, seed=0, sample=True)
    assert (few.n_gene_cells, few.genes) == (None, expected.genes)

    monkeypatch.setattr(selection, "MAX_GENE_CELLS", len(expected.parts["train"]) - 1)
    monkeypatch.setattr(selection, "_first_cells", lambda source, train, seed: train[:3])
    found = select_cells_and_genes(source, settings, seed=0, sample=True)
    assert found.n_gene_cells == 3
    assert found.parts["train"].tolist() == expected.parts["train"].tolist()
    expressed = source.read(expected.parts["train"][:3]).counts.sum(axis=0).A1 > 0
    assert found.genes == source.genes["feature_id"][expressed].tolist()
