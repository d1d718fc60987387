"""The value encoders, and the batch norm per domain, which equals PyTorch's batch norm of each domain."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scgpt_hf.model.embeddings_scgpt import ContinuousValueEncoder, DomainNorm, make_value_encoder


@settings(deadline=None)
@given(domains=st.lists(st.integers(0, 2), min_size=2, max_size=6), seed=st.integers(0, 99))
def test_domain_norm_is_a_batch_norm_of_each_domain(domains: list[int], seed: int) -> None:
    hidden = torch.randn(len(domains), 5, 4, generator=torch.Generator().manual_seed(seed)) * 3 + 1
    domain_ids, norm = torch.tensor(domains), DomainNorm(3, 4)
    for _ in range(2):
        found = norm(hidden, domain_ids)
    for domain in set(domains):
        slow = nn.BatchNorm1d(4, eps=6.1e-5, momentum=0.1, affine=False)
        cells = hidden[domain_ids == domain]
        for _ in range(2):
            expected = slow(cells.flatten(0, 1)).view_as(cells)
        torch.testing.assert_close(found[domain_ids == domain], expected)
        for statistic in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(norm, statistic)[domain], getattr(slow, statistic))
    for absent in set(range(3)) - set(domains):
        assert norm.running_mean[absent].eq(0).all()
        assert norm.num_batches_tracked[absent] == 0


def test_domain_norm_uses_the_statistics_of_each_cells_domain() -> None:
    norm = DomainNorm(2, 4).eval()
    norm.running_mean[1] += 2.0
    found = norm(torch.full((2, 3, 4), 2.0), torch.tensor([0, 1]))
    torch.testing.assert_close(found[:, 0, 0], torch.tensor([2.0, 0.0]), atol=1e-3, rtol=0)


def test_values_above_the_maximum_are_clamped(config) -> None:
    encoder = ContinuousValueEncoder(config(max_value=10))
    low, high = encoder(torch.tensor([10.0, 99.0]))
    assert torch.equal(low, high)


def test_an_untrained_value_encoder_distinguishes_values(model) -> None:
    """With zero biases the LayerNorm would remove the magnitude of the value."""
    encoder = model().scgpt.value_encoder
    embedded = nn.functional.normalize(encoder(torch.tensor([-1.0, 1.0, 5.0, 50.0])), dim=-1)
    similarity = (embedded @ embedded.T).fill_diagonal_(0)
    assert similarity.max() < 0.9999


def test_the_category_table_has_rows_for_padding_and_masked_values(config) -> None:
    table = make_value_encoder(config(value_encoder="category", n_bins=11))
    assert table.embedding.num_embeddings == 13
    assert table.embedding.padding_idx == 11


@pytest.mark.parametrize("value_encoder", ["continuous", "category", "scaling"])
def test_predictions_depend_on_the_values(model, padded, value_encoder: str) -> None:
    network = model(value_encoder=value_encoder).eval()
    values = padded["values"].clamp(min=0)
    before = network(**{**padded, "values": values}).gep
    after = network(**{**padded, "values": values + 1}).gep
    assert not torch.allclose(before, after)
