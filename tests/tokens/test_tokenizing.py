"""Tokenizing equals a simple reference, with and without numba, and a cell's tokens depend on that cell only."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.tokens import tokenizing_scgpt
from scgpt_hf.tokens.binning_scgpt import bin_cell
from scgpt_hf.tokens.counts_scgpt import SparseCounts, validate_counts
from scgpt_hf.tokens.packing_scgpt import Tokens
from scgpt_hf.tokens.randomness_scgpt import SAMPLING, TIES, cell_keys, random_words
from scgpt_hf.tokens.tokenizing_scgpt import TokenSettings, tokenize_counts

N_VOCAB, CLS_ID = 150, 149
DEFAULTS = TokenSettings(N_VOCAB, CLS_ID, -2.0, max_tokens=30, n_bins=51, ties="random", include_zeros=False)
SETTINGS = st.builds(
    TokenSettings,
    n_vocab=st.just(N_VOCAB),
    cls_id=st.just(CLS_ID),
    cls_value=st.just(-2.0),
    max_tokens=st.sampled_from([2, 5, 12, 500]),
    n_bins=st.sampled_from([None, 2, 11, 51]),
    ties=st.sampled_from(["random", "midpoint", "upper", "lower"]),
    include_zeros=st.booleans(),
)


def _cells(seed: int, n_cells: int = 8, n_genes: int = 70, fractional: bool = False) -> tuple[csr_matrix, np.ndarray]:
    """Return random counts with some empty cells, and the ids of their columns, in any order and partly unknown."""
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


def _narrow(counts: csr_matrix) -> SparseCounts:
    """Return the same counts as a Census or a cache stores them: values and columns in uint16."""
    assert counts.data.max(initial=0) < 2**16
    data, columns = counts.data.astype(np.uint16), counts.indices.astype(np.uint16)
    return SimpleNamespace(data=data, indices=columns, indptr=counts.indptr, shape=counts.shape)


def _reference(
    counts: np.ndarray, gene_ids: np.ndarray, options: TokenSettings, cell_id: int
) -> list[tuple[int, float]]:
    """Return the tokens of one cell, following the module docstring step by step."""
    keys = {p: cell_keys(np.array([cell_id]), seed=5, epoch=6, purpose=p) for p in (TIES, SAMPLING)}
    cell = {int(gene): count for gene, count in zip(gene_ids, counts, strict=True) if gene >= 0 and count > 0}
    if not cell:
        return []
    genes, values = np.array(sorted(cell)), np.array([cell[gene] for gene in sorted(cell)])
    if options.n_bins is not None:
        values = bin_cell(values, genes, keys[TIES], options.n_bins, options.ties)
    tokens = dict(zip(genes.tolist(), values.tolist(), strict=True))
    if options.include_zeros:
        tokens = {int(gene): 0.0 for gene in gene_ids if gene >= 0} | tokens
    by_word = sorted(tokens, key=lambda gene: int(random_words(keys[SAMPLING], np.array([gene]))[0]))
    return [(CLS_ID, -2.0), *((gene, tokens[gene]) for gene in sorted(by_word[: options.max_tokens - 1]))]


def _as_lists(tokens: Tokens) -> list[list[tuple[int, float]]]:
    pairs = list(zip(tokens.input_ids.tolist(), tokens.values.tolist(), strict=True))
    return [pairs[start:stop] for start, stop in pairwise(tokens.indptr)]


def _tokenize(
    counts: SparseCounts,
    gene_ids: np.ndarray,
    options: TokenSettings = DEFAULTS,
    cell_ids: np.ndarray | None = None,
    epoch: int = 6,
) -> Tokens:
    ids = np.arange(counts.shape[0]) if cell_ids is None else cell_ids
    return tokenize_counts(validate_counts(counts), gene_ids, options, cell_ids=ids, seed=5, epoch=epoch)


def _assert_equal(first: Tokens, second: Tokens) -> None:
    for key in ("input_ids", "values", "indptr", "cell_ids"):
        ours, theirs = getattr(first, key), getattr(second, key)
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@settings(deadline=None, max_examples=80)
@given(seed=st.integers(0, 2**16), options=SETTINGS, stored=st.sampled_from(["integer", "fractional", "narrow"]))
def test_kernels_and_numpy_equal_the_reference(seed: int, options: TokenSettings, stored: str) -> None:
    counts, gene_ids = _cells(seed, fractional=stored == "fractional")
    given_counts = _narrow(counts) if stored == "narrow" else counts
    ids = np.arange(8) * 1000 - 3
    compiled = _tokenize(given_counts, gene_ids, options, ids)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizing_scgpt, "COMPILED", False)
        _assert_equal(_tokenize(given_counts, gene_ids, options, ids), compiled)
    rows = zip(counts.toarray(), ids, strict=True)
    expected = [_reference(row, gene_ids, options, cell_id) for row, cell_id in rows]
    assert _as_lists(compiled) == [cell for cell in expected if cell]
    assert compiled.cell_ids.tolist() == [cell_id for cell_id, cell in zip(ids, expected, strict=True) if cell]


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**16), options=SETTINGS)
def test_tokens_do_not_depend_on_other_cells_or_the_order_of_columns(seed: int, options: TokenSettings) -> None:
    counts, gene_ids = _cells(seed)
    rng = np.random.default_rng(seed)
    rows, columns, ids = rng.permutation(8), rng.permutation(70), np.arange(8)
    expected = _tokenize(counts, gene_ids, options, ids)
    by_id = dict(zip(expected.cell_ids.tolist(), _as_lists(expected), strict=True))
    moved = csr_matrix(counts.toarray()[rows][:, columns])
    shuffled = _tokenize(moved, gene_ids[columns], options, ids[rows])
    assert dict(zip(shuffled.cell_ids.tolist(), _as_lists(shuffled), strict=True)) == by_id
    for cell in range(8):
        single = _tokenize(counts[cell], gene_ids, options, ids[cell : cell + 1])
        assert _as_lists(single) == ([by_id[cell]] if cell in by_id else [])


@settings(deadline=None, max_examples=20)
@given(seed=st.integers(0, 2**16), dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.int64, np.float64]))
def test_tokens_do_not_depend_on_how_counts_are_stored(seed: int, dtype: type) -> None:
    counts, gene_ids = _cells(seed)
    counts.data = np.minimum(counts.data, 250)
    expected = _tokenize(counts, gene_ids)
    _assert_equal(_tokenize(_narrow(counts), gene_ids), expected)
    _assert_equal(_tokenize(counts.astype(dtype), gene_ids), expected)


def test_sampling_selects_every_gene_equally_often() -> None:
    counts, options = csr_matrix(np.ones((1, 40), np.float32)), replace(DEFAULTS, max_tokens=11)
    n_sampled = np.zeros(40)
    for epoch in range(2000):
        tokens = _tokenize(counts, np.arange(40), options, epoch=epoch)
        assert len(tokens.input_ids) == 11
        n_sampled[tokens.input_ids[1:]] += 1
    assert abs(n_sampled - 500).max() < 4 * np.sqrt(2000 * 0.25 * 0.75)


def test_explicit_zeros_are_not_expressed() -> None:
    counts = csr_matrix((np.array([1, 0, 3], np.float32), [0, 1, 2], [0, 3]), shape=(1, 3))
    tokens = _tokenize(counts, np.arange(3), replace(DEFAULTS, n_bins=None))
    assert _as_lists(tokens) == [[(CLS_ID, -2.0), (0, 1.0), (2, 3.0)]]


def test_no_cells_and_no_genes_give_no_tokens() -> None:
    for shape in ((0, 5), (4, 5)):
        tokens = _tokenize(csr_matrix(shape, dtype=np.float32), np.arange(5))
        assert (len(tokens), len(tokens.input_ids), tokens.indptr.tolist()) == (0, 0, [0])


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("columns", [[2, 1], [1, 1]])
@pytest.mark.parametrize("stored", [lambda counts: counts, _narrow], ids=["wide", "narrow"])
def test_unsorted_or_repeated_columns_raise(
    columns: list[int], compiled: bool, stored: Callable[[csr_matrix], SparseCounts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizing_scgpt, "COMPILED", compiled)
    counts = stored(csr_matrix((np.ones(3, np.float32), [0, *columns], [0, 1, 3]), shape=(2, 3)))
    with pytest.raises(ValueError, match=r"row 1 has unsorted or repeated columns; call counts.sum_duplicates"):
        _tokenize(counts, np.arange(3))
