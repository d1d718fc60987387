"""The count decoder and the shortcut to `<cls>`: likelihoods against slow versions, both layouts, initial values."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scgpt_hf.model.count_decoder_scgpt import multinomial_nll, negative_binomial_nll

WITH_COUNTS = {
    "loss_weights": {"gep": 1.0, "counts": 1.0},
    "count_head_size": 8,
    "cls_shortcut": True,
    "shortcut_size": 8,
}


@st.composite
def cells(draw):
    n_cells, n_genes, seed = draw(st.integers(1, 5)), draw(st.integers(2, 9)), draw(st.integers(0, 2**32 - 1))
    random = torch.Generator().manual_seed(seed)
    logits = torch.randn(n_cells, n_genes, generator=random, dtype=torch.float64, requires_grad=True)
    measured = torch.rand(n_cells, n_genes, generator=random) > 0.3
    measured[:, 0] = True  # a cell without any measured gene has no likelihood
    counts = torch.randint(0, 4, (n_cells, n_genes), generator=random).double()
    counts[:, 0] += 1
    return logits, measured, counts


def entries_of(counts):
    at = counts.nonzero(as_tuple=True)
    return at[1], counts[at], at[0]


@given(cells())
def test_multinomial_nll_is_the_log_softmax_of_the_measured_genes(given_cells):
    logits, measured, counts = given_cells
    found = multinomial_nll(logits, measured, *entries_of(counts))
    for cell in range(len(logits)):
        log_share = logits[cell][measured[cell]].log_softmax(0)
        torch.testing.assert_close(found[cell], -(counts[cell][measured[cell]] * log_share).sum())
    found.sum().backward()
    assert logits.grad.isfinite().all()
    assert (logits.grad[~measured] == 0).all()


@given(cells())
def test_negative_binomial_nll_is_that_of_torch_zeros_included(given_cells):
    logits, measured, counts = given_cells
    log_dispersion = torch.linspace(-1, 1, logits.shape[1], dtype=torch.float64)
    found = negative_binomial_nll(logits, measured, log_dispersion, *entries_of(counts))
    counts = counts * measured
    log_mean = logits.masked_fill(~measured, -torch.inf).log_softmax(1) + counts.sum(1, keepdim=True).log()
    expected = torch.distributions.NegativeBinomial(
        log_dispersion.exp().expand_as(log_mean), logits=log_mean.clamp(min=-500) - log_dispersion
    )
    torch.testing.assert_close(found, -(expected.log_prob(counts) * measured).sum(1))


def targets(n_cells, seed=0):
    rng = np.random.default_rng(seed)
    dense = torch.from_numpy(rng.poisson(0.5, size=(n_cells, 20)).astype(np.float32))
    dense[:, 17:] = 0  # special tokens
    dense[:, 0] += 1
    ids, counts, cell_of_entry = entries_of(dense)
    return {"count_ids": ids, "count_values": counts, "count_cells": cell_of_entry}


@pytest.mark.parametrize("likelihood", ["multinomial", "nb"])
def test_packed_equals_padded_with_shortcut_and_counts(model, padded, packed, likelihood):
    network = model(**WITH_COUNTS, count_likelihood=likelihood).eval()
    counts = targets(4)
    del padded["domain_ids"], packed["domain_ids"]
    one, other = network(**{**padded, **counts}), network(**{**packed, **counts})
    torch.testing.assert_close(one.losses["counts"], other.losses["counts"], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(one.cell_embedding, other.cell_embedding, rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_add_up_to_its_loss(model, padded):
    network, counts = model(**WITH_COUNTS).eval(), targets(4)
    del padded["domain_ids"]
    n_labels = (padded["labels"] != -100).sum()
    whole = network(**{**padded, **counts}, num_items_in_batch=n_labels, num_cells_in_batch=4).losses
    parts = []
    for cells in (slice(0, 1), slice(1, 4)):
        own = (counts["count_cells"] >= cells.start) & (counts["count_cells"] < cells.stop)
        part = {name: values[own] for name, values in counts.items()}
        part["count_cells"] = part["count_cells"] - cells.start
        batch = {name: values[cells] for name, values in padded.items() if name not in counts}
        parts.append(network(**batch, **part, num_items_in_batch=n_labels, num_cells_in_batch=4).losses)
    for name in whole:
        torch.testing.assert_close(whole[name], parts[0][name] + parts[1][name])


def test_statistics_initialise_the_decoder_at_the_frequencies_of_each_domain(model):
    network = model(**WITH_COUNTS, n_domains=2)
    totals = torch.zeros(2, 20)
    totals[0, :4], totals[1, 2:6] = torch.tensor([8.0, 4, 2, 2]), torch.tensor([1.0, 1, 1, 5])
    network.count_head.set_statistics(totals)
    torch.nn.init.zeros_(network.count_head.out.weight)
    logits, measured = network.count_head(torch.zeros(2, 16), torch.tensor([0, 1]))
    shares = logits.masked_fill(~measured, -torch.inf).softmax(1)
    torch.testing.assert_close(shares, totals / totals.sum(1, keepdim=True))


def test_a_domain_without_training_cells_gets_the_frequencies_of_all(model):
    head = model(**WITH_COUNTS, n_domains=3).count_head
    totals = torch.zeros(3, 20)
    totals[0, :2], totals[1, 1:3] = 1.0, 3.0
    head.set_statistics(totals)
    assert head.measured[2].nonzero().flatten().tolist() == [0, 1, 2]
    torch.testing.assert_close(head.bias[2, :3].exp(), torch.tensor([1.0, 4, 3]) / 8)


def test_a_measured_gene_without_counts_starts_at_its_share_of_one_more_count(model):
    head = model(**WITH_COUNTS, n_domains=3).count_head
    totals = torch.zeros(3, 20)
    totals[0, :2], totals[1, 1:3] = 1.0, 3.0
    measured = torch.zeros(3, 20, dtype=torch.bool)
    measured[0, 1:4] = True  # gene 0 has counts all the same
    head.set_statistics(totals, measured)
    assert [row.nonzero().flatten().tolist() for row in head.measured] == [[0, 1, 2, 3], [1, 2], [0, 1, 2, 3]]
    torch.testing.assert_close(head.bias[0, :3].exp(), torch.tensor([1 / 2, 1 / 2, 3 / 8 / (2 + 1)]))


def test_no_counts_at_all_are_refused(model):
    with pytest.raises(ValueError, match="counts"):
        model(**WITH_COUNTS).count_head.set_statistics(torch.zeros(1, 20))


def test_counts_that_are_missing_are_named(model, padded):
    del padded["domain_ids"], padded["count_ids"]
    with pytest.raises(ValueError, match="count_ids"):
        model(**WITH_COUNTS)(**padded)


def test_every_parameter_has_a_gradient(model, packed):
    network = model(**WITH_COUNTS, n_domains=3)
    network(**packed).loss.backward()
    assert [name for name, weight in network.named_parameters() if weight.grad is None] == []


def test_a_masked_value_does_not_reach_the_shortcut(model, padded):
    network = model(**WITH_COUNTS).eval()
    del padded["domain_ids"]
    bags = []
    handle = network.scgpt.shortcut.register_forward_hook(lambda _, __, out: bags.append(out))
    network(**padded)
    hidden_everywhere = {**padded, "values": padded["values"].clamp(max=0)}
    network(**hidden_everywhere)
    handle.remove()
    assert not torch.equal(bags[0], bags[1])
    assert torch.equal(bags[1][0], bags[1][1])  # nothing is visible: every cell gets the same vector


def test_a_saved_model_keeps_measured_genes_and_bias(model, tmp_path):
    network = model(**WITH_COUNTS, n_domains=2)
    network.count_head.set_statistics(torch.ones(2, 20).tril(5))
    network.save_pretrained(tmp_path)
    again = type(network).from_pretrained(tmp_path)
    for name, value in network.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name
