"""Baselines: normalisation and variable genes, principal components, and scVI."""

import sys

import numpy as np
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.analysis.evaluation.baseline_embeddings import (
    BASELINES,
    SCVI,
    log_normalize,
    principal_components,
    scvi_embedding,
    variable_genes,
)


def test_counts_are_normalised_to_ten_thousand(small_cells: list[AnnData]) -> None:
    normalized = log_normalize(small_cells[0].X)
    assert np.allclose(np.expm1(normalized.toarray()).sum(axis=1), 1e4, rtol=1e-4)


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


def test_a_query_is_projected_onto_the_components_of_the_reference() -> None:
    features = np.random.default_rng(0).normal(size=(30, 8))
    components, projected = principal_components(features, 0, features[:5])
    assert components.shape == (30, 7)
    assert np.allclose(components[:5], projected, atol=1e-5)
    with pytest.raises(ValueError, match=r"at least two cells and two genes, found shape \(1, 8\)"):
        principal_components(features[:1], 0)


def test_missing_scvi_tools_raise_with_the_command_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "scgpt_hf\[scvi\]"'):
        scvi_embedding(csr_matrix((3, 4)), np.array(["a", "a", "b"]), 0)
    assert SCVI in BASELINES


@pytest.mark.slow
def test_scvi_gives_ten_latent_variables_that_depend_on_the_seed_only(small_cells: list[AnnData]) -> None:
    pytest.importorskip("scvi")
    counts, batches = small_cells[0].X, small_cells[0].obs["donor_id"].to_numpy(str)
    first, second = (scvi_embedding(counts, batches, 1, max_epochs=2, enable_progress_bar=False) for _ in range(2))
    assert first.shape == (160, 10)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, second)
