"""Baselines: principal components, and scVI."""

import sys

import numpy as np
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.analysis.evaluation.baseline_embeddings import (
    BASELINES,
    SCVI,
    principal_components,
    scvi_embedding,
)


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
