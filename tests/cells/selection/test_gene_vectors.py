"""Gene vectors from correlations: against dense formulas, for samples of cells and genes, on any number of threads."""

import os
import subprocess
import sys

import numpy as np
import pytest

from scgpt_hf.cells.selection import gene_vectors as module
from scgpt_hf.cells.selection.gene_vectors import gene_vectors
from tests.support import ROOT
from tests.support.memory_source import MemorySource, make_cells

GENES = np.arange(40)


@pytest.fixture(scope="module")
def source():
    return make_cells([150, 90], n_genes=50)


def correlations(source, cells, genes):
    """Correlations of the genes over cells of a source, (genes, genes)."""
    counts = source.counts.toarray()[np.isin(source.cell_ids, cells)][:, genes].astype(np.float64)
    return np.corrcoef(np.log1p(counts * 10_000 / counts.sum(1, keepdims=True)), rowvar=False)


def test_inner_products_of_complete_vectors_are_the_square_root_of_the_correlations(source):
    vectors = gene_vectors(source, source.cell_ids, GENES, 40, seed=0)
    roots = vectors @ vectors.T  # Σ u_k u_kᵀ √λ_k
    np.testing.assert_allclose(roots @ roots, correlations(source, source.cell_ids, GENES), atol=1e-3)


def test_components_are_the_leading_eigenvectors_in_descending_order(source):
    vectors = gene_vectors(source, source.cell_ids, GENES, 5, seed=0)
    eigenvalues, eigenvectors = np.linalg.eigh(correlations(source, source.cell_ids, GENES))
    for component in range(5):
        found, expected = vectors[:, component], eigenvectors[:, -1 - component]
        assert np.sum(found**2) == pytest.approx(eigenvalues[-1 - component] ** 0.5, rel=1e-3)
        assert abs(found @ expected) / np.linalg.norm(found) == pytest.approx(1, abs=1e-3)


def test_more_genes_than_landmarks_are_placed_by_their_correlations_with_these(source, monkeypatch):
    monkeypatch.setattr(module, "MAX_LANDMARKS", 25)
    vectors = gene_vectors(source, source.cell_ids, GENES, 6, seed=0)
    counts = source.counts.toarray()[:, GENES].astype(np.float64)
    sd = np.log1p(counts * 10_000 / counts.sum(1, keepdims=True)).std(0)
    landmarks = np.sort(np.argsort(-sd)[:25])
    every = correlations(source, source.cell_ids, GENES)
    eigenvalues, eigenvectors = np.linalg.eigh(every[np.ix_(landmarks, landmarks)])
    eigenvalues, eigenvectors = eigenvalues[::-1][:6], eigenvectors[:, ::-1][:, :6]
    expected = every[:, landmarks] @ eigenvectors / eigenvalues * eigenvalues**0.25
    signs = np.sign((vectors[landmarks] * expected[landmarks]).sum(0))
    np.testing.assert_allclose(vectors * signs, expected, atol=2e-3)


def test_only_the_given_cells_are_read_in_any_order(source):
    train = source.cell_ids[::2]
    vectors = gene_vectors(source, train, GENES, 8, seed=0)
    other = make_cells([150, 90], n_genes=50)
    other.counts = other.counts.tolil()
    other.counts[1::2] = 7
    other.counts = other.counts.tocsr()
    assert np.array_equal(gene_vectors(other, train[::-1], GENES, 8, seed=3), vectors)


def test_the_seed_determines_the_sample(source, monkeypatch):
    monkeypatch.setattr(module, "MAX_CELLS", 60)
    source.reads.clear()
    first, again, other = (gene_vectors(source, source.cell_ids, GENES, 8, seed=seed) for seed in (0, 0, 1))
    assert sum(source.reads) == 3 * 60
    assert np.array_equal(first, again)
    assert not np.allclose(np.abs(first), np.abs(other), atol=1e-2)


def test_few_cells_give_few_components_and_a_constant_gene_a_zero_vector():
    counts = np.random.default_rng(0).poisson(3.0, (6, 12)) + 1
    counts[:, 4] = 0
    source = MemorySource(counts, list("aabbcc"))
    vectors = gene_vectors(source, source.cell_ids, np.arange(12), 20, seed=0)
    assert vectors.shape == (12, 5)  # six cells have five differences
    assert np.flatnonzero(~vectors.any(1)).tolist() == [4]
    assert np.isfinite(vectors).all()


def test_cells_without_any_difference_raise():
    source = MemorySource(np.ones((5, 7)), list("aabbc"))
    with pytest.raises(ValueError, match="no gene varies between the 5 sampled"):
        gene_vectors(source, source.cell_ids, np.arange(7), 4, seed=0)


_PRINT_HASH = """
import hashlib
from scgpt_hf.cells.selection.gene_vectors import gene_vectors
from tests.support.memory_source import make_cells
import numpy as np
source = make_cells([600, 500], n_genes=400)
vectors = gene_vectors(source, source.cell_ids, np.arange(400), 64, seed=0)
print(hashlib.sha256(vectors.tobytes()).hexdigest())
"""


def test_the_number_of_threads_does_not_change_a_bit():
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    hashes = set()
    for n_threads in ("1", "4"):
        environment = os.environ | dict.fromkeys(names, n_threads)
        command = [sys.executable, "-c", _PRINT_HASH]
        hashes.add(subprocess.run(command, env=environment, cwd=ROOT, check=True, capture_output=True).stdout)
    assert len(hashes) == 1
