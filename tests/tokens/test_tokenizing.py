"""Tokenising whole blocks against an obvious version, in both engines; a cell's tokens depend on that cell alone."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.tokens import tokenizing_scgpt
from scgpt_hf.tokens.binning_scgpt import bin_counts
from scgpt_hf.tokens.packing_scgpt import Tokens
from scgpt_hf.tokens.randomness_scgpt import SAMPLING, TIES, SparseCounts, cell_keys, gene_words
from scgpt_hf.tokens.tokenizing_scgpt import (
    Block,
    TokenRule,
    as_block,
    count_known,
    csr_of,
    log_normalize,
    rows_of,
    tokenize_counts,
)

N_VOCAB, CLS_ID = 150, 149
RULES = st.builds(
    TokenRule,
    n_vocab=st.just(N_VOCAB),
    cls_id=st.just(CLS_ID),
    cls_value=st.just(-2.0),
    max_tokens=st.sampled_from([2, 5, 12, 500]),
    n_bins=st.sampled_from([None, 2, 11, 51]),
    ties=st.sampled_from(["random", "midpoint", "upper", "lower"]),
    include_zeros=st.booleans(),
)


def _cells(seed: int, n_cells: int = 8, n_genes: int = 70, fractional: bool = False) -> tuple[csr_matrix, np.ndarray]:
    """Random counts, some cells empty, and columns that are scattered over the vocabulary, some of them unknown."""
    rng = np.random.default_rng(seed)
    counts = rng.poisson(rng.gamma(0.3, 2, (n_cells, n_genes))).astype(np.float32)
    counts[rng.random(n_cells) < 0.2] = 0
    counts[counts > 6] *= 1000
    if fractional:
        counts *= rng.random(counts.shape, np.float32)
    gene_ids = rng.permutation(140)[:n_genes]
    if seed % 2:
        gene_ids.sort()
    return csr_matrix(counts), np.where(rng.random(n_genes) < 0.8, gene_ids, -1)


def _narrow(counts: csr_matrix) -> Block:
    """The same counts as a Census or a cache gives them."""
    assert counts.data.max(initial=0) < 2**16
    return Block(counts.data.astype(np.uint16), counts.indices.astype(np.uint16), counts.indptr, counts.shape)


def _slowly(counts: np.ndarray, gene_ids: np.ndarray, rule: TokenRule, cell_id: int) -> list[tuple[int, float]]:
    """The tokens of one cell, as the rule is told in words."""
    keys = {p: cell_keys(np.array([cell_id]), seed=5, epoch=6, purpose=p) for p in (TIES, SAMPLING)}
    cell = {int(gene): count for gene, count in zip(gene_ids, counts, strict=True) if gene >= 0 and count > 0}
    if not cell:
        return []
    genes, values = np.array(sorted(cell)), np.array([cell[gene] for gene in sorted(cell)])
    if rule.n_bins is not None:
        ends = np.array([0, len(genes)])
        values = bin_counts(values, ends, genes=genes, keys=keys[TIES], n_bins=rule.n_bins, ties=rule.ties)
    tokens = dict(zip(genes.tolist(), values.tolist(), strict=True))
    if rule.include_zeros:
        tokens = {int(gene): 0.0 for gene in gene_ids if gene >= 0} | tokens
    lottery = sorted(tokens, key=lambda gene: int(gene_words(keys[SAMPLING], np.array([gene]))[0]))
    return [(CLS_ID, -2.0), *((gene, tokens[gene]) for gene in sorted(lottery[: rule.max_tokens - 1]))]


def _listed(tokens: Tokens) -> list[list[tuple[int, float]]]:
    pairs = list(zip(tokens.input_ids.tolist(), tokens.values.tolist(), strict=True))
    return [pairs[start:stop] for start, stop in pairwise(tokens.indptr)]


def _assert_equal(first: Tokens, second: Tokens) -> None:
    for key in ("input_ids", "values", "indptr", "cell_ids"):
        ours, theirs = getattr(first, key), getattr(second, key)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**16), rule=RULES, stored=st.sampled_from(["whole", "fractional", "narrow"]))
def test_both_engines_do_what_the_rule_says(seed: int, rule: TokenRule, stored: str) -> None:
    counts, gene_ids = _cells(seed, fractional=stored == "fractional")
    block = as_block(_narrow(counts) if stored == "narrow" else counts)
    ids = np.arange(len(counts.indptr) - 1) * 1000 - 3
    arguments: dict[str, Any] = {"cell_ids": ids, "seed": 5, "epoch": 6}
    compiled = tokenize_counts(block, gene_ids, rule, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing_scgpt, "COMPILED", False)
        _assert_equal(tokenize_counts(block, gene_ids, rule, **arguments), compiled)
    expected = [_slowly(row, gene_ids, rule, cell) for row, cell in zip(counts.toarray(), ids, strict=True)]
    assert _listed(compiled) == [cell for cell in expected if cell]
    assert compiled.cell_ids.tolist() == [cell_id for cell_id, cell in zip(ids, expected, strict=True) if cell]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), rule=RULES)
def test_tokens_do_not_depend_on_neighbours_or_the_order_of_columns(seed: int, rule: TokenRule) -> None:
    counts, gene_ids = _cells(seed)
    rng = np.random.default_rng(seed)
    rows, columns, ids = rng.permutation(8), rng.permutation(70), np.arange(8)
    whole = tokenize_counts(as_block(counts), gene_ids, rule, cell_ids=ids, seed=0, epoch=0)
    moved = csr_matrix(counts.toarray()[rows][:, columns])
    shuffled = tokenize_counts(as_block(moved), gene_ids[columns], rule, cell_ids=ids[rows], seed=0, epoch=0)
    there = dict(zip(shuffled.cell_ids.tolist(), _listed(shuffled), strict=True))
    assert dict(zip(whole.cell_ids.tolist(), _listed(whole), strict=True)) == there
    for cell in range(8):
        alone = tokenize_counts(as_block(counts[cell]), gene_ids, rule, cell_ids=ids[cell : cell + 1], seed=0, epoch=0)
        assert _listed(alone) == ([there[cell]] if cell in there else [])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.int64, np.float64]))
def test_tokens_do_not_depend_on_how_counts_are_stored(seed: int, dtype: type) -> None:
    counts, gene_ids = _cells(seed)
    counts.data = np.minimum(counts.data, 250)
    rule = TokenRule(N_VOCAB, CLS_ID, 0.0, 30, 51, "random", False)
    arguments: dict[str, Any] = {"cell_ids": np.arange(8), "seed": 0, "epoch": 0}
    expected = tokenize_counts(as_block(counts), gene_ids, rule, **arguments)
    _assert_equal(tokenize_counts(as_block(_narrow(counts)), gene_ids, rule, **arguments), expected)
    _assert_equal(tokenize_counts(as_block(counts.astype(dtype)), gene_ids, rule, **arguments), expected)


def test_sampling_takes_every_gene_equally_often() -> None:
    counts, rule = csr_matrix(np.ones((1, 40), np.float32)), TokenRule(N_VOCAB, CLS_ID, 0.0, 11, 51, "midpoint", False)
    block, gene_ids = as_block(counts), np.arange(40)
    often = np.zeros(40)
    for epoch in range(2000):
        tokens = tokenize_counts(block, gene_ids, rule, cell_ids=np.array([3]), seed=0, epoch=epoch)
        assert len(tokens.input_ids) == 11
        often[tokens.input_ids[1:]] += 1
    assert abs(often - 500).max() < 4 * np.sqrt(2000 * 0.25 * 0.75)


@settings(deadline=None)
@given(seed=st.integers(0, 2**16))
def test_count_known_counts_expressed_known_genes(seed: int) -> None:
    counts, gene_ids = _cells(seed)
    expected = ((counts.toarray() > 0) & (gene_ids >= 0)).sum(1)
    assert count_known(as_block(counts), gene_ids).tolist() == expected.tolist()


@given(seed=st.integers(0, 2**32 - 1), first=st.integers(0, 8), n_rows=st.integers(0, 8))
def test_rows_of_are_the_slice_without_a_copy(seed: int, first: int, n_rows: int) -> None:
    counts, _ = _cells(seed)
    stop = min(first + n_rows, 8)
    rows, expected = rows_of(counts, first, max(first, stop)), counts[first : max(first, stop)]
    assert rows.shape == expected.shape
    assert all(np.array_equal(getattr(rows, name), getattr(expected, name)) for name in ("data", "indices", "indptr"))
    assert not rows.data.size or np.shares_memory(rows.data, counts.data)


def test_explicit_zeros_are_not_expressed() -> None:
    counts = csr_matrix((np.array([1, 0, 3], np.float32), [0, 1, 2], [0, 3]), shape=(1, 3))
    rule = TokenRule(N_VOCAB, CLS_ID, 0.0, 30, None, "random", False)
    tokens = tokenize_counts(as_block(counts), np.arange(3), rule, cell_ids=np.zeros(1, int), seed=0, epoch=0)
    assert _listed(tokens) == [[(CLS_ID, 0.0), (0, 1.0), (2, 3.0)]]


def test_no_cells_and_no_genes_give_no_tokens() -> None:
    rule = TokenRule(N_VOCAB, CLS_ID, 0.0, 30, 51, "random", False)
    for shape in ((0, 5), (4, 5)):
        block = as_block(csr_matrix(shape, dtype=np.float32))
        ids = np.arange(shape[0])
        tokens = tokenize_counts(block, np.arange(5), rule, cell_ids=ids, seed=0, epoch=0)
        assert (len(tokens), len(tokens.input_ids), tokens.indptr.tolist()) == (0, 0, [0])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("columns", [[2, 1], [1, 1]])
@pytest.mark.parametrize("stored", [lambda counts: counts, _narrow], ids=["wide", "narrow"])
def test_unsorted_or_repeated_columns_raise(
    columns: list[int], compiled: bool, stored: Callable[[csr_matrix], SparseCounts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing_scgpt, "COMPILED", compiled)
    counts = stored(csr_matrix((np.ones(3, np.float32), [0, *columns], [0, 1, 3]), shape=(2, 3)))
    rule = TokenRule(N_VOCAB, CLS_ID, 0.0, 30, 51, "random", False)
    with pytest.raises(ValueError, match=r"row 1 has unsorted or repeated columns; call counts.sum_duplicates"):
        tokenize_counts(as_block(counts), np.arange(3), rule, cell_ids=np.arange(2), seed=0, epoch=0)


@pytest.mark.parametrize(
    ("bad", "message"), [(-1, "found -1"), (np.nan, "found nan"), (np.inf, "found inf"), (-np.inf, "found -inf")]
)
def test_negative_or_missing_values_raise(bad: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"finite expression ≥ 0, {message} \(1 such entries\)"):
        as_block(csr_of([[1, 2, bad]]))


def test_counts_beyond_float32_stay_exact() -> None:
    assert as_block(csr_of([[1, 2**24 + 1]])).data.tolist() == [1, 2**24 + 1]
    assert as_block(csr_of(np.array([[1, 2]], np.uint16))).data.dtype == np.float32
    assert as_block(csr_of(np.array([[1, 0.1]], np.float16))).data.dtype == np.float64


def test_counts_of_any_kind_become_the_same_rows() -> None:
    dense = np.array([[0, 1, 2], [0, 0, 0], [3, 0, 4]])
    unsorted = csr_matrix((np.array([2, 1, 3, 4]), [2, 1, 0, 2], [0, 2, 2, 4]), shape=(3, 3))
    for counts in (dense, dense.tolist(), csr_matrix(dense), csr_matrix(dense).tocsc(), unsorted):
        block = csr_of(counts)
        assert (block.data.tolist(), block.indices.tolist()) == ([1, 2, 3, 4], [1, 2, 0, 2])
        assert (block.indptr.tolist(), tuple(block.shape)) == ([0, 2, 2, 4], (3, 3))
    assert not unsorted.has_sorted_indices  # what was passed in is left as it was
    with pytest.raises(ValueError, match=r"found \(3,\); for one cell pass counts\[None\]"):
        csr_of([1, 2, 3])


def test_log_normalize_is_log1p_of_counts_per_target_sum() -> None:
    dense = np.array([[0, 1, 3], [0, 0, 0], [5, 0, 0]])
    block = log_normalize(as_block(csr_of(dense)), 1e4)
    assert block.data.dtype == np.float32
    np.testing.assert_allclose(block.data, np.log1p([2500, 7500, 1e4]), rtol=1e-6)
