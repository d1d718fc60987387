"""Gene ids: found in the index or a column of var, without versions, each once, joined over files."""

import logging

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scgpt_hf.cells.genes import find_gene_ids, join_genes

pytestmark = pytest.mark.usefixtures("text_type")


def test_gene_ids_come_from_the_index_or_a_column_or_are_symbols(caplog):
    ensembl = ["ENSG00000000001.5", "ENSG00000000002", "odd"]
    names = ["A", "B", "C"]
    for var in (
        pd.DataFrame({"feature_name": names}, index=ensembl),
        pd.DataFrame({"gene_ids": ensembl}, index=names),
    ):
        genes = find_gene_ids(var, "X")
        assert genes["feature_id"].tolist() == ["ENSG00000000001", "ENSG00000000002", "odd"]
        assert genes["feature_name"].tolist() == names
    with caplog.at_level(logging.INFO):
        assert find_gene_ids(pd.DataFrame(index=names), "symbols.h5ad")["feature_id"].tolist() == names
    assert "symbols.h5ad: found no Ensembl ids" in caplog.text


def test_versions_are_removed_and_counted_in_the_log(caplog):
    with caplog.at_level(logging.INFO):
        genes = find_gene_ids(pd.DataFrame(index=["ENSMUSG00000000001.5", "ENSG00000000002.12"]), "X")
    assert genes["feature_id"].tolist() == ["ENSMUSG00000000001", "ENSG00000000002"]
    assert "the version from 2 Ensembl ids" in caplog.text


@pytest.mark.parametrize("index", [["ENSG1", "ENSG1"], ["ENSG1.1", "ENSG1.2"], ["CD4", "CD4"]])
def test_repeated_gene_ids_are_kept_and_logged(index, caplog):
    assert find_gene_ids(pd.DataFrame(index=index), "X")["feature_id"].nunique() == 1
    assert f"X: 1 columns have the gene id of an earlier column, e.g. ['{index[0].split('.')[0]}']" in caplog.text


def test_empty_ids_are_filled_from_the_index_not_taken_for_one_gene():
    var = pd.DataFrame({"gene_ids": ["ENSG1", "ENSG2", "ENSG3", "ENSG4", "", "nan", None]}, index=list("ABCDEFG"))
    assert find_gene_ids(var, "X")["feature_id"].tolist() == ["ENSG1", "ENSG2", "ENSG3", "ENSG4", "E", "F", "G"]


@pytest.mark.parametrize(
    "lengths",
    [
        pd.array([1200, None], dtype="Int64"),
        [1200.0, float("nan")],
        [1200.0, float("inf")],
        [1200, -1],
        ["1200", "unknown"],
        pd.Categorical(["1200", None]),
        pd.array(["1200", None], dtype="string"),
    ],
    ids=str,
)
def test_missing_lengths_are_zero_and_counted_in_the_log(lengths, caplog):
    with caplog.at_level(logging.INFO):
        genes = find_gene_ids(pd.DataFrame({"feature_length": lengths}, index=["ENSG1", "ENSG2"]), "X")
    assert genes["feature_length"].tolist() == [1200, 0]
    assert "X: 1 of 2 genes have no feature_length" in caplog.text


@given(st.lists(st.lists(st.sampled_from("abcdefgh")), min_size=1, max_size=4))
def test_join_genes_returns_the_position_of_every_gene_of_every_table(tables):
    frames = [pd.DataFrame({"feature_id": pd.Series(table, dtype=object), "feature_name": "x"}) for table in tables]
    union, positions = join_genes(frames)
    assert union["feature_id"].tolist() == list(dict.fromkeys(gene for table in tables for gene in table))
    assert [[union["feature_id"][position] for position in row] for row in positions] == tables
