"""Normalized counts, and the choice of variable genes."""

import numpy as np
import pytest
import scanpy
import torch
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.scoring.normalization import log_normalize, variable_genes


def test_counts_are_normalized_to_ten_thousand(small_cells: list[AnnData]) -> None:
    normalized = log_normalize(small_cells[0].X)
    assert np.allclose(np.expm1(normalized.toarray()).sum(axis=1), 1e4, rtol=1e-4)
    expected = AnnData(small_cells[0].X.astype(np.float32))
    scanpy.pp.normalize_total(expected, target_sum=1e4)
    scanpy.pp.log1p(expected)
    np.testing.assert_allclose(normalized.toarray(), expected.X.toarray(), rtol=1e-5)
    assert log_normalize(csr_matrix((2, 3))).nnz == 0


def test_small_batches_have_no_influence_on_variable_genes(small_cells: list[AnnData]) -> None:
    normalized = log_normalize(small_cells[0].X)
    batches = np.array(["large"] * 80 + ["other"] * 78 + ["tiny"] * 2)
    genes = variable_genes(normalized, batches, 30)
    assert len(genes) == 30
    assert (np.diff(genes) > 0).all()
    np.testing.assert_array_equal(genes, variable_genes(normalized[:158], batches[:158], 30))


def test_genes_are_ranked_over_all_cells_if_all_batches_are_small(small_cells: list[AnnData]) -> None:
    normalized = log_normalize(small_cells[0].X)
    one_batch = variable_genes(normalized, np.array(["one"] * 160), 30)
    np.testing.assert_array_equal(variable_genes(normalized, np.arange(160).astype(str), 30), one_batch)


def test_all_expressed_genes_are_taken_if_there_are_few(small_cells: list[AnnData]) -> None:
    normalized = log_normalize(small_cells[0].X)
    np.testing.assert_array_equal(
        variable_genes(normalized, np.array(["one"] * 160)), np.flatnonzero(normalized.getnnz(axis=0))
    )
    with pytest.raises(ValueError, match="no gene is expressed in these 3 cells"):
        variable_genes(csr_matrix((3, 5), dtype=np.float32), np.array(["a"] * 3))


def test_the_number_of_threads_of_torch_stays_as_it_was(small_cells: list[AnnData]) -> None:
    """The compiled kernels of scanpy set it to the number of cores, which would change the numbers of a run."""
    before, other = torch.get_num_threads(), 3
    torch.set_num_threads(other)
    try:
        normalized = log_normalize(small_cells[0].X)
        assert torch.get_num_threads() == other
        variable_genes(normalized, np.array(["one"] * 160), 30)
        assert torch.get_num_threads() == other
    finally:
        torch.set_num_threads(before)
