"""A PCA that is fitted to some cells and applied to others."""

from pathlib import Path

import numpy as np
import pytest
from scipy.sparse import csr_matrix

from scgpt_hf.scoring.fitted_pca import FittedPCA, fit_pca
from scgpt_hf.scoring.normalization import log_normalize
from scgpt_hf.scoring.probing import predict_held_out


@pytest.fixture(scope="module")
def pca(training_cells) -> FittedPCA:
    return fit_pca(training_cells.counts, training_cells.genes, training_cells.batches)


def test_it_separates_cell_types_of_a_set_that_it_has_not_seen(pca, other_cells):
    embedding = pca.transform(other_cells.counts, other_cells.genes)
    assert embedding.shape == (500, 50)
    assert embedding.dtype == np.float32
    found = predict_held_out(embedding, other_cells.labels, other_cells.batches, "kNN")
    assert found.macro_f1 > 0.8


def test_it_is_the_pca_of_its_own_cells(pca, training_cells):
    embedding = pca.transform(training_cells.counts, training_cells.genes)
    columns = [training_cells.genes.index(gene) for gene in pca.genes]
    features = log_normalize(training_cells.counts)[:, columns].toarray()
    centered = features - features.mean(axis=0)
    variances = np.linalg.eigvalsh(centered.T @ centered)[::-1][:50] / len(centered)
    np.testing.assert_allclose(embedding.var(axis=0), variances, rtol=1e-3)
    np.testing.assert_allclose(embedding.mean(axis=0), 0, atol=1e-3)


def test_genes_may_come_in_any_order_and_missing_ones_do_not_move_a_cell(pca, other_cells):
    order = np.random.default_rng(0).permutation(len(other_cells.genes))
    shuffled = pca.transform(other_cells.counts[:, order], [other_cells.genes[column] for column in order])
    np.testing.assert_allclose(shuffled, pca.transform(other_cells.counts, other_cells.genes), atol=1e-4)
    only_unread = [gene for gene in other_cells.genes if gene not in set(pca.genes)]
    columns = [other_cells.genes.index(gene) for gene in [*only_unread, pca.genes[0]]]
    without = pca.transform(other_cells.counts[:, columns], [*only_unread, pca.genes[0]])
    first = log_normalize(other_cells.counts[:, columns])[:, -1].toarray() - pca.mean[0]
    np.testing.assert_allclose(without, first * pca.components[:, 0], atol=1e-5)


def test_the_same_arguments_give_the_same_pca_and_selected_genes_are_used(training_cells):
    selected = training_cells.genes[5:205]
    first, second = (fit_pca(*training_cells[:3], 3, selected=[*selected, "no such gene"]) for _ in range(2))
    assert first.genes == selected
    np.testing.assert_array_equal(first.components, second.components)


def test_a_file_holds_all_of_it(pca, other_cells, tmp_path):
    pca.save(tmp_path / "baselines" / "pca.safetensors")
    loaded = FittedPCA.load(tmp_path / "baselines" / "pca.safetensors")
    np.testing.assert_array_equal(
        loaded.transform(other_cells.counts, other_cells.genes), pca.transform(other_cells.counts, other_cells.genes)
    )


def test_files_and_genes_that_cannot_be_used_raise(pca, tmp_path: Path):
    with pytest.raises(FileNotFoundError, match="a pretraining run writes it at its end"):
        FittedPCA.load(tmp_path / "pca.safetensors")
    (tmp_path / "pca.safetensors").write_bytes(b"not a file of tensors")
    with pytest.raises(ValueError, match=r"pca\.safetensors is damaged"):
        FittedPCA.load(tmp_path / "pca.safetensors")
    counts = csr_matrix(np.ones((2, 2), np.float32))
    with pytest.raises(ValueError, match=r"none of the 2,000 genes is in the data: expected such as .*found \['a'"):
        pca.transform(counts, ["a", "b"])
    with pytest.raises(ValueError, match="expected each gene once, found 'a' twice"):
        pca.transform(counts, ["a", "a"])
