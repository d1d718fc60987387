"""Counts: conversion to CSR, validation, normalization and the ids that depend on a cell's content."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.tokens.counts_scgpt import (
    content_ids,
    count_known_genes,
    log_normalize,
    to_csr,
    validate_counts,
)


def _counts(seed: int, n_cells: int = 8, n_genes: int = 70) -> csr_matrix:
    rng = np.random.default_rng(seed)
    return csr_matrix(rng.poisson(rng.gamma(0.3, 2, (n_cells, n_genes))).astype(np.float32))


@settings(deadline=None)
@given(seed=st.integers(0, 2**16))
def test_count_known_genes_counts_expressed_known_genes(seed: int) -> None:
    counts, gene_ids = _counts(seed), np.random.default_rng(seed).integers(-1, 1, 70)
    expected = ((counts.toarray() > 0) & (gene_ids >= 0)).sum(1)
    assert count_known_genes(validate_counts(counts), gene_ids).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("bad", "message"), [(-1, "found -1"), (np.nan, "found nan"), (np.inf, "found inf"), (-np.inf, "found -inf")]
)
def test_negative_or_missing_values_raise(bad: float, message: str) -> None:
    with pytest.raises(ValueError, match=rf"finite expression ≥ 0, {message} \(1 such entries\)"):
        validate_counts(to_csr([[1, 2, bad]]))


def test_counts_beyond_float32_stay_exact() -> None:
    assert validate_counts(to_csr([[1, 2**24 + 1]])).data.tolist() == [1, 2**24 + 1]
    assert validate_counts(to_csr(np.array([[1, 2]], np.uint16))).data.dtype == np.float32
    assert validate_counts(to_csr(np.array([[1, 0.1]], np.float16))).data.dtype == np.float64


def test_to_csr_gives_the_same_rows_for_every_kind_of_input() -> None:
    dense = np.array([[0, 1, 2], [0, 0, 0], [3, 0, 4]])
    unsorted = csr_matrix((np.array([2, 1, 3, 4]), [2, 1, 0, 2], [0, 2, 2, 4]), shape=(3, 3))
    for counts in (dense, dense.tolist(), csr_matrix(dense), csr_matrix(dense).tocsc(), unsorted):
        block = to_csr(counts)
        assert (block.data.tolist(), block.indices.tolist()) == ([1, 2, 3, 4], [1, 2, 0, 2])
        assert (block.indptr.tolist(), tuple(block.shape)) == ([0, 2, 2, 4], (3, 3))
    assert not unsorted.has_sorted_indices  # the input is not changed
    with pytest.raises(ValueError, match=r"found \(3,\); for one cell pass counts\[None\]"):
        to_csr([1, 2, 3])


def test_log_normalize_is_log1p_of_counts_per_target_sum() -> None:
    dense = np.array([[0, 1, 3], [0, 0, 0], [5, 0, 0]])
    block = log_normalize(validate_counts(to_csr(dense)), 1e4)
    assert block.data.dtype == np.float32
    np.testing.assert_allclose(block.data, np.log1p([2500, 7500, 1e4]), rtol=1e-6)


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_content_ids_follow_the_cell_through_any_order_of_rows_and_columns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    counts = csr_matrix(rng.poisson(0.7, (6, 12)).astype(np.float32))
    gene_ids = np.where(rng.random(12) < 0.8, np.arange(12), -1)
    rows, columns = rng.permutation(6), rng.permutation(12)
    ids = content_ids(counts, gene_ids)
    moved = csr_matrix(counts.toarray()[rows][:, columns])
    np.testing.assert_array_equal(content_ids(moved, gene_ids[columns]), ids[rows])
    np.testing.assert_array_equal(content_ids(counts.astype(np.int64), gene_ids), ids)


def test_content_ids_see_known_genes_and_counts_only() -> None:
    base = csr_matrix(np.array([[1, 2, 0, 3]], np.float32))
    gene_ids = np.array([0, 1, 2, -1])
    same = csr_matrix(np.array([[1, 2, 0, 9]], np.float32))
    explicit_zero = csr_matrix((np.array([1, 2, 0], np.float32), [0, 1, 2], [0, 3]), shape=(1, 4))
    swapped = csr_matrix(np.array([[2, 1, 0, 3]], np.float32))
    assert content_ids(same, gene_ids) == content_ids(base, gene_ids) == content_ids(explicit_zero, gene_ids)
    assert content_ids(swapped, gene_ids) != content_ids(base, gene_ids)
