"""The count decoder and the shortcut to `<cls>`: likelihoods against slow versions, both layouts, initial values."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from scgpt_hf.model import count_decoder_scgpt
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.count_decoder_scgpt import CountEntries, CountHead, multinomial_nll, negative_binomial_nll

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


@settings(deadline=None, max_examples=40)
@given(cells(), st.sampled_from([1, 2, 4, 9]))
def test_multinomial_nll_and_its_gradient_are_those_of_the_full_softmax_in_chunks_of_any_size(given_cells, n_genes):
    logits, measured, counts = given_cells
    n_cells, width = logits.shape
    random = torch.Generator().manual_seed(n_cells)
    parameters = [torch.randn(shape, generator=random, dtype=torch.float64) for shape in ((n_cells, 3), (width, 3))]
    hidden, weight, bias = (tensor.requires_grad_() for tensor in (*parameters, logits.detach()))
    ids, values, cell_of_entry = entries_of(counts * measured)
    entries, domains = CountEntries(ids, values, cell_of_entry), torch.arange(n_cells)
    found = multinomial_nll(hidden, domains, weight, bias, measured, entries, n_genes)
    full = (hidden @ weight.T + bias).masked_fill(~measured, -torch.inf).log_softmax(1).masked_fill(~measured, 0.0)
    expected = -(counts * full).sum(1)
    torch.testing.assert_close(found, expected)
    gradients, expected_gradients = (
        torch.autograd.grad(nll.sum(), (hidden, weight, bias)) for nll in (found, expected)
    )
    torch.testing.assert_close(gradients, expected_gradients)
    assert (gradients[2][~measured] == 0).all()


@settings(deadline=None)
@given(cells())
def test_negative_binomial_nll_is_that_of_torch_zeros_included(given_cells):
    logits, measured, counts = given_cells
    log_dispersion = torch.linspace(-1, 1, logits.shape[1], dtype=torch.float64)
    counts = counts * measured
    found = negative_binomial_nll(logits, measured, log_dispersion, *entries_of(counts))
    log_mean = logits.masked_fill(~measured, -torch.inf).log_softmax(1) + counts.sum(1, keepdim=True).log()
    expected = torch.distributions.NegativeBinomial(
        log_dispersion.exp().expand_as(log_mean), logits=log_mean.clamp(min=-500) - log_dispersion
    )
    torch.testing.assert_close(found, -(expected.log_prob(counts) * measured).sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_chunks_has_the_loss_and_the_gradients_of_the_model_at_once(model, packed, monkeypatch, dtype):
    network = model(**WITH_COUNTS, n_domains=3)
    results = []
    for n_logits in (10**6, 4 * 7):  # all 20 genes of 4 cells at once, then seven of them
        monkeypatch.setattr(count_decoder_scgpt, "MAX_LOGITS", n_logits)
        network.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            loss = network(**packed).losses["counts"]
        assert loss.dtype == torch.float32
        loss.backward()
        results.append({name: weight.grad for name, weight in network.named_parameters() if weight.grad is not None})
        results[-1]["loss"] = loss.detach()
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 1e-4}
    for name, value in results[0].items():
        torch.testing.assert_close(results[1][name], value, msg=lambda text, name=name: f"{name}: {text}", **tolerance)


def test_chunks_never_hold_the_logits_of_all_genes(model, packed, monkeypatch):
    network = model(**WITH_COUNTS, n_domains=3)
    monkeypatch.setattr(count_decoder_scgpt, "MAX_LOGITS", 4 * 7)

    class LargestMatrix(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
            result = function(*arguments, **(keywords or {}))
            if isinstance(result, torch.Tensor) and result.dim() == 2 and len(result) == 4:  # of four cells
                widths.append(result.shape[1])
            return result

    widths = []
    embedding, entries = torch.randn(4, 16, requires_grad=True), targets(4)
    with LargestMatrix():
        network.count_head.loss(embedding, packed["domain_ids"], *entries.values()).sum().backward()
    assert max(widths) == 16  # the embedding, and not 20 genes
    assert widths.count(7) > 8


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


def test_statistics_initialize_the_decoder_at_the_frequencies_of_each_domain(model):
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


@pytest.mark.parametrize("likelihood", ["multinomial", "nb"])
def test_gradients_are_the_same_to_the_bit_on_several_threads(likelihood: str) -> None:
    torch.manual_seed(0)
    head = CountHead(ScGPTConfig(vocab_size=500, hidden_size=16, n_domains=2, count_likelihood=likelihood))
    cells = torch.arange(128).repeat_interleave(40)
    inputs = (torch.randn(128, 16), torch.arange(128) % 2, torch.randint(0, 500, (len(cells),)), torch.ones(len(cells)))
    n_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        gradients = [torch.autograd.grad(head.loss(*inputs, cells).sum(), list(head.parameters())) for _ in range(8)]
    finally:
        torch.set_num_threads(n_threads)
    for others in gradients[1:]:
        assert all(torch.equal(one, other) for one, other in zip(gradients[0], others, strict=True))
