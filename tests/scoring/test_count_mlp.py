"""The small network with the model's count decoder."""

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from sklearn.metrics import silhouette_score

from scgpt_hf.scoring.count_mlp import CountMLP, fit_count_mlp
from scgpt_hf.scoring.probing import predict_held_out


@pytest.fixture(scope="module")
def network(training_cells) -> CountMLP:
    return fit_count_mlp(*training_cells[:3], steps=200)


def test_training_makes_it_separate_cell_types_of_a_set_that_it_has_not_seen(network, training_cells, other_cells):
    untrained = fit_count_mlp(*training_cells[:3], steps=0)
    before, after = (one.embed(other_cells.counts, other_cells.genes) for one in (untrained, network))
    assert after.shape == (500, 128)
    assert after.dtype == np.float32
    silhouettes = [silhouette_score(embedding, other_cells.labels) for embedding in (before, after)]
    assert silhouettes[1] > silhouettes[0] + 0.1
    assert predict_held_out(after, other_cells.labels, other_cells.batches, "kNN").macro_f1 > 0.95


def test_it_depends_on_its_arguments_alone_and_leaves_the_random_state_as_it_was(training_cells):
    state = torch.get_rng_state()
    networks = [fit_count_mlp(*training_cells[:3], seed=seed, steps=5) for seed in (1, 1, 2)]
    assert torch.equal(torch.get_rng_state(), state)
    first, second, other = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["layers.0.weight"], other["layers.0.weight"])


def test_a_cell_has_the_same_embedding_alone_and_with_others_and_genes_in_any_order(network, other_cells):
    together = network.embed(other_cells.counts, other_cells.genes)
    np.testing.assert_allclose(network.embed(other_cells.counts[3], other_cells.genes)[0], together[3], atol=1e-5)
    order = np.random.default_rng(0).permutation(len(other_cells.genes))
    shuffled = network.embed(other_cells.counts[:, order], [other_cells.genes[column] for column in order])
    np.testing.assert_allclose(shuffled, together, atol=1e-4)


def test_a_panel_of_genes_does_not_inflate_values(network, other_cells):
    """Of a cell whose panel genes have their average share, the values are those of the complete transcriptome."""
    read = [gene for gene in network.genes if gene in set(other_cells.genes)]
    panel, share = read[: len(read) // 2], dict(zip(network.genes, network.share.tolist(), strict=True))
    counts = csr_matrix(np.array([[share[gene] * 1e6 for gene in panel]], np.float32))
    inputs = {}
    hook = network.layers[0].register_forward_pre_hook(lambda _, arguments: inputs.update(values=arguments[0]))
    network.embed(counts, panel)
    hook.remove()
    expected = [np.log1p(1000 * share[gene]) if gene in set(panel) else 0 for gene in network.genes]
    np.testing.assert_allclose(inputs["values"][0], expected, rtol=1e-3)


def test_cells_without_known_counts_are_finite(network):
    assert np.isfinite(network.embed(csr_matrix((2, 1), dtype=np.float32), network.genes[:1])).all()
    assert network.embed(csr_matrix((0, 1), dtype=np.float32), network.genes[:1]).shape == (0, 128)


def test_a_file_holds_all_of_it(network, other_cells, tmp_path):
    network.save(tmp_path / "count_mlp.safetensors")
    loaded = CountMLP.load(tmp_path / "count_mlp.safetensors")
    np.testing.assert_array_equal(
        loaded.embed(other_cells.counts, other_cells.genes), network.embed(other_cells.counts, other_cells.genes)
    )


def test_a_file_of_another_size_raises(network, tmp_path):
    network.genes.append("one more")
    try:
        network.save(tmp_path / "count_mlp.safetensors")
    finally:
        network.genes.pop()
    with pytest.raises(ValueError, match=r"count_mlp\.safetensors is damaged or holds something else"):
        CountMLP.load(tmp_path / "count_mlp.safetensors")
