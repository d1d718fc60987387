"""Test how the genes of a source are matched to a vocabulary."""

import pandas as pd
import pytest

from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


def genes_of(*rows: tuple[str, str]) -> pd.DataFrame:
    return pd.DataFrame(rows, columns=["feature_id", "feature_name"])


def test_genes_are_matched_by_id_then_by_symbol() -> None:
    genes = genes_of(
        ("ENSG00000000001.4", "A"), ("x1", "TP53"), ("x2", "TP53"), ("x3", "CD3D"), ("CD3D", "other"), ("x4", "none")
    )
    processor = ScGPTProcessor.from_genes(["ENSG00000000001", "CD3D", "TP53", "LYZ"])
    match = match_source_genes(genes, processor)
    assert match.gene_ids.tolist() == [0, 2, 2, -1, 1, -1]
    assert match.coverage == {"by_id": 2, "by_symbol": 1, "duplicates": 2, "unknown": 1, "vocabulary": 4}
    # GENCODE's name of a gene on both X and Y is no id of the vocabulary; its symbol is
    genes = genes_of(("ENSG00000000001", "A"), ("ENSG00000002586.20_PAR_Y", "LYZ"))
    assert match_source_genes(genes, processor).gene_ids.tolist() == [0, 3]


def test_genes_of_one_symbol_have_one_id_unless_another_is_matched_by_id() -> None:
    genes = genes_of(
        ("CD3D", "CD3D"), ("x1", "LYZ"), ("ENSG2", "LYZ"), ("x2", "TP53"), ("x3", "TP53"), ("TP53", "none")
    )
    processor = ScGPTProcessor.from_genes(["ENSG1", "ENSG2", "ENSG3"], symbols=["CD3D", "LYZ", "TP53"])
    match = match_source_genes(genes, processor)
    assert match.gene_ids.tolist() == [0, -1, 1, 2, 2, -1]
    assert match.coverage == {"by_id": 1, "by_symbol": 2, "duplicates": 2, "unknown": 1, "vocabulary": 3}


@pytest.mark.parametrize(
    "genes",
    [
        genes_of(("ENSMUSG00000000001", "GENE1"), ("ENSMUSG00000000002", "GENE2")),
        genes_of(("Cd3d", "Cd3d"), ("Lyz2", "Lyz2"), ("H2afz", "H2afz")),
    ],
    ids=["ids", "symbols"],
)
def test_the_error_points_out_mouse_genes(genes: pd.DataFrame) -> None:
    with pytest.raises(ValueError, match="mouse genes, e.g. .*" + genes["feature_name"].iloc[0]):
        match_source_genes(genes, ScGPTProcessor.from_genes(["ENSG00000000001", "ENSG00000000002"]))


HUMAN_IDS = ScGPTProcessor.from_genes(["ENSG00000000001", "ENSG00000000002"], symbols=["CD3D", "LYZ"])
HUMAN_SYMBOLS = ScGPTProcessor.from_genes(["CD3D", "LYZ"])
MOUSE_IDS = ScGPTProcessor.from_genes(["ENSMUSG00000000001", "ENSMUSG00000000002"], symbols=["Cd3d", "Lyz2"])
MOUSE_SYMBOLS = ScGPTProcessor.from_genes(["Cd3d", "Lyz2"])
MOUSE_IN_CAPITALS = genes_of(("ENSMUSG00000000001", "CD3D"), ("ENSMUSG00000000002", "LYZ"))
HUMAN = genes_of(("ENSG00000000001", "CD3D"), ("ENSG00000000002", "LYZ"))
MOUSE = genes_of(("ENSMUSG00000000001", "Cd3d"), ("ENSMUSG00000000002", "Lyz2"))
PIG = genes_of(("ENSSSCG00000000001", "CD3D"), ("ENSSSCG00000000002", "LYZ"))


@pytest.mark.parametrize(
    ("genes", "processor", "message"),
    [
        (MOUSE_IN_CAPITALS, HUMAN_IDS, "Ensembl ids of mouse genes.*model is one of human cells"),
        (MOUSE_IN_CAPITALS, HUMAN_SYMBOLS, "Ensembl ids of mouse genes.*model is one of human cells"),
        (MOUSE, HUMAN_IDS, "the data have mouse genes"),
        (MOUSE, HUMAN_SYMBOLS, "the data have mouse genes"),
        (HUMAN, MOUSE_IDS, "the data have human genes"),
        (HUMAN, MOUSE_SYMBOLS, "the data have human genes"),
        (PIG, HUMAN_IDS, "Ensembl ids of pig genes.*model is one of human cells"),
    ],
)
def test_cells_of_another_species_are_refused(genes: pd.DataFrame, processor: ScGPTProcessor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        match_source_genes(genes, processor)


@pytest.mark.parametrize(
    ("genes", "processor"),
    [
        (MOUSE, MOUSE_IDS),
        (MOUSE, MOUSE_SYMBOLS),
        (HUMAN, HUMAN_IDS),
        (HUMAN, HUMAN_SYMBOLS),
        (PIG, ScGPTProcessor.from_genes(["CD3D", "LYZ"])),  # symbols in capitals name no species
    ],
)
def test_cells_of_the_same_species_are_matched(genes: pd.DataFrame, processor: ScGPTProcessor) -> None:
    assert match_source_genes(genes, processor).gene_ids.tolist() == [0, 1]


@pytest.mark.parametrize(
    "genes",
    [
        genes_of(("cd3d", "cd3d"), ("tp53", "tp53"), ("lyz", "lyz")),
        genes_of(("ensg00000000001", "cd3d"), ("ensg00000000002", "tp53"), ("x", "x")),
    ],
    ids=["symbols", "ids"],
)
def test_the_error_points_out_names_in_another_letter_case(genes: pd.DataFrame) -> None:
    processor = ScGPTProcessor.from_genes(["ENSG00000000001", "ENSG00000000002"], symbols=["CD3D", "TP53"])
    first = genes["feature_id"].iloc[0]
    with pytest.raises(ValueError, match=f"in letter case: '{first}' is its '{first.upper()}'"):
        match_source_genes(genes, processor)
    with pytest.raises(ValueError, match="only 0 of the 1 genes") as raised:
        match_source_genes(genes_of(("other", "other")), processor)
    assert "letter case" not in str(raised.value)
