"""The gene vocabulary keeps the given ids, matches genes of data, and lists genes in its errors."""

import logging
from typing import Any

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.tokens.vocabulary_scgpt import (
    build_tokenizer,
    check_vocab,
    choose_gene_names,
    map_symbols,
    match_genes,
    vocab_of_genes,
)

ENSEMBL = [f"ENSG{i:011d}" for i in range(20)]
VOCAB = vocab_of_genes(ENSEMBL)


@settings(deadline=None, max_examples=25)
@given(order=st.permutations(["CD3D", "HLA-DRA", "MT-CO1", "RP11-34P13.7", "<pad>", "<cls>"]), eoc=st.booleans())
def test_the_tokenizer_returns_the_given_ids_wherever_the_special_tokens_are(order: list[str], eoc: bool) -> None:
    vocab = {token: index for index, token in enumerate([*order, "<eoc>"] if eoc else order)}
    tokenizer = build_tokenizer(vocab)
    assert tokenizer.get_vocab() == vocab
    assert tokenizer(" ".join(vocab))["input_ids"] == list(vocab.values())
    assert (tokenizer.pad_token_id, tokenizer.cls_token_id) == (vocab["<pad>"], vocab["<cls>"])
    assert tokenizer.convert_tokens_to_ids(["CD3D", "CD3d"]) == [vocab["CD3D"], None]


def test_vocab_of_genes_puts_special_tokens_last() -> None:
    assert vocab_of_genes(["B", "A"]) == {"B": 0, "A": 1, "<pad>": 2, "<cls>": 3, "<eoc>": 4}
    with pytest.raises(ValueError, match=r"2 genes of the vocabulary are repeated, e.g. \['A', 'B'\]"):
        vocab_of_genes(["A", "B", "A", "B", "C"])
    with pytest.raises(ValueError, match=r"\['<cls>'\] are special tokens"):
        vocab_of_genes(["A", "<cls>"])


@pytest.mark.parametrize(
    ("vocab", "message"),
    [
        ({"A": 0, "<cls>": 1}, "has no <pad>"),
        ({"A": 0}, "has no <pad> and no <cls>"),
        ({"<pad>": 0, "<cls>": 1, "A": 1}, r"1 ids of the vocabulary are used twice, e.g. 1 for \['<cls>', 'A'\]"),
        ({"<pad>": 0, "<cls>": 1, "A": 4}, r"run from 0 to 2; found 0 to 4, missing \[2, 3\]"),
        ({"<pad>": 1, "<cls>": 2, "A": 3}, r"found 1 to 3, missing \[0\]"),
        ({"<pad>": 0, "<cls>": 1, "A": -2}, "found -2 to 1"),
        ({"<pad>": 0, "<cls>": 1, "A": "2"}, "must be integers; found '2' for 'A'"),
        ({"<pad>": 0, "<cls>": 1, "A": 2.0}, "must be integers; found 2.0 for 'A'"),
        ({"<pad>": 0, "<cls>": True, "A": 2}, "must be integers; found True for '<cls>'"),
        ({"<pad>": 0, "<cls>": 1, "": 2}, r"ids \[2\] have none"),
        ({"<pad>": 0, "<cls>": 1, None: 2}, r"ids \[2\] have none"),
        ({"<pad>": 0, "<cls>": 1, "<eoc>": 2}, "at least one gene"),
    ],
)
def test_an_invalid_vocabulary_raises(vocab: dict[Any, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_vocab(vocab)
    with pytest.raises(ValueError, match=message):
        build_tokenizer(vocab)


@given(known=st.permutations(range(20)), n_unknown=st.integers(0, 5))
def test_match_genes_returns_the_id_of_each_gene(known: list[int], n_unknown: int) -> None:
    names = [ENSEMBL[i] for i in known] + [f"other {i}" for i in range(n_unknown)]
    assert match_genes(VOCAB, names).tolist() == [*known, *[-1] * n_unknown]


def test_versions_are_ignored_only_if_that_finds_the_gene(caplog: pytest.LogCaptureFixture) -> None:
    vocab = vocab_of_genes(["ENSG00000000001", "ENSG00000000002.7", "AC0001.2"])
    with caplog.at_level(logging.INFO):
        ids = match_genes(
            vocab, ["ENSG00000000001.12", "ENSG00000000002.7", "AC0001.2", "AC0001.3", "ENSG00000000009.1"]
        )
    assert ids.tolist() == [0, 1, 2, -1, -1]
    assert (
        "3 of 5 genes of the data are known, 3 of 3 genes of the vocabulary present; ignored 1 version" in caplog.text
    )
    assert match_genes(vocab_of_genes(["ENSMUSG01", "A"]), ["ENSMUSG01.3", "A"]).tolist() == [0, 1]


def test_special_tokens_are_not_genes() -> None:
    assert match_genes(VOCAB, [*ENSEMBL, "<cls>"]).tolist() == [*range(20), -1]


def test_names_and_versions_of_one_gene_have_one_id_and_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    assert match_genes(VOCAB, [*ENSEMBL, ENSEMBL[0], f"{ENSEMBL[0]}.2", "other", "other"])[-4:].tolist() == [
        0,
        0,
        -1,
        -1,
    ]
    assert f"2 genes of the data have the name of another one, e.g. ['{ENSEMBL[0]}']" in caplog.text


def test_few_known_genes_raise_only_if_few_of_the_vocabulary_are_present_too() -> None:
    many = [f"other {i}" for i in range(1000)]
    assert (match_genes(VOCAB, [*ENSEMBL, *many]) >= 0).sum() == 20  # the whole vocabulary in a large data set
    assert (match_genes(VOCAB, ENSEMBL[:2]) >= 0).all()  # a panel that covers little of the vocabulary
    symbols = ["CD3D", "CD3E", "LYZ", "MS4A1", "NKG7", "PPBP"]
    with pytest.raises(ValueError, match=r"only 0 of the 6 genes .* vocabulary of 20") as error:
        match_genes(VOCAB, symbols)
    for example in (*symbols[:5], *ENSEMBL[:5], "Ensembl ids or symbols", "species"):
        assert example in str(error.value)
    with pytest.raises(ValueError, match="only 1 of the 1,001 genes"):
        match_genes(VOCAB, [ENSEMBL[0], *many])
    with pytest.raises(ValueError, match="only 0 of the 0 genes"):
        match_genes(VOCAB, [])


@pytest.mark.parametrize(("n_known", "warned"), [(2, True), (9, True), (10, False)])
def test_between_a_tenth_and_half_of_the_genes_are_a_warning(
    n_known: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        match_genes(VOCAB, [*ENSEMBL[:n_known], *(f"other {i}" for i in range(1000))])
    assert ("of the vocabulary present" in caplog.text) == warned


def test_a_symbol_maps_to_its_gene_unless_it_is_shared_or_the_name_of_a_gene() -> None:
    assert map_symbols(["a", "b", "c", "d"], ["A", "B", "B", "a"]) == {"A": "a"}
    assert map_symbols(["a", "b"], []) == {}
    with pytest.raises(ValueError, match="each of 2 genes, found 1"):
        map_symbols(["a", "b"], ["A"])


def _adata(var_names: list[str], **columns: list[str]) -> AnnData:
    return AnnData(np.ones((1, len(var_names))), var=pd.DataFrame(columns, index=var_names))


def test_names_come_from_the_column_with_most_known_genes() -> None:
    symbols = [f"S{i}" for i in range(20)]
    assert choose_gene_names(_adata(ENSEMBL), VOCAB) == ENSEMBL
    assert choose_gene_names(_adata(symbols, feature_id=ENSEMBL), VOCAB) == ENSEMBL
    assert choose_gene_names(_adata(symbols, gene_ids=[f"{name}.1" for name in ENSEMBL]), VOCAB)[3] == f"{ENSEMBL[3]}.1"
    assert choose_gene_names(_adata(ENSEMBL, feature_name=symbols), vocab_of_genes(symbols)) == symbols
    assert choose_gene_names(_adata([f"x{i}" for i in range(20)], feature_name=symbols), VOCAB, symbols) == symbols
    assert choose_gene_names(_adata(ENSEMBL, feature_id=ENSEMBL[::-1]), VOCAB) == ENSEMBL  # no column is better
