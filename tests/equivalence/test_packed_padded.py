"""Packed and padded cells have the same predictions, losses and gradients, with every attention implementation."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.model.configuration_scgpt import OBJECTIVES, ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.model.objectives_scgpt import IGNORE
from scgpt_hf.tokens.packing_scgpt import bucket, bucket_size, pack, pad
from scgpt_hf.tokens.targets_scgpt import leave_out_masked
from tests.support.models import as_views, random_cells, random_count_targets

GENES, PAD, CLS = 30, 30, 31

VARIANTS: list[dict[str, Any]] = [
    {},
    {"norm_scheme": "pre", "gepc_query": "concat"},
    {"norm_scheme": "scgpt_pre", "gepc_query": "sum"},
    {
        **{"n_domains": 3, "domain_embedding": True, "domain_head": True, "explicit_zero_prob": True},
        "loss_weights": dict.fromkeys((name for name in OBJECTIVES if name != "gen"), 1.0),
    },
]


def network_for(attention: str, variant: dict[str, Any]) -> ScGPTForPreTraining:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = ScGPTConfig(vocab_size=32, pad_token_id=PAD, dropout=0.0, num_labels=3, **sizes, **variant)
    return ScGPTForPreTraining._from_config(config, attn_implementation=attention)


def cells_of(lengths: list[int], extra: int = 0) -> dict[str, Any]:
    random = torch.Generator().manual_seed(sum(lengths))
    shape = (len(lengths), max(lengths) + extra)
    real = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    true = torch.randint(1, 51, shape, generator=random).float()
    input_ids = torch.randint(GENES, shape, generator=random)
    input_ids[:, 0] = CLS
    hidden = (torch.rand(shape, generator=random) < 0.5) & real & (input_ids != CLS)
    return {
        "input_ids": input_ids.masked_fill(~real, PAD),
        "values": true.masked_fill(hidden, -1.0).masked_fill(~real, -2.0),
        "attention_mask": real,
        "labels": true.masked_fill(~hidden, IGNORE),
        "domain_ids": torch.arange(len(lengths)) % 3,
        "class_labels": torch.arange(len(lengths)) % 3,
        **random_count_targets(len(lengths), GENES),
    }


def packed_of(padded: dict[str, Any]) -> dict[str, Any]:
    real = padded["attention_mask"]
    offsets = torch.nn.functional.pad(real.sum(1).cumsum(0), (1, 0)).to(torch.int32)
    return {
        **{name: padded[name][real][None] for name in ("input_ids", "values", "labels")},
        **{name: padded[name] for name in ("domain_ids", "class_labels", "count_ids", "count_values", "count_cells")},
        **{"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets},
        **{"max_length_q": int(real.sum(1).max()), "max_length_k": int(real.sum(1).max())},
    }


def with_tail(packed: dict[str, Any], tail: int) -> dict[str, Any]:
    """Return the packed batch with padding tokens after the last cell, as `bucket` adds them."""
    fillers = {"input_ids": PAD, "values": -2.0, "labels": IGNORE}
    longer = {name: torch.nn.functional.pad(packed[name], (0, tail), value=value) for name, value in fillers.items()}
    longest = max(packed["max_length_q"], tail)
    return {**packed, **longer, "max_length_q": longest, "max_length_k": longest}


def loss_and_gradients(network: ScGPTForPreTraining, batch: dict[str, Any]) -> tuple[Any, list[torch.Tensor]]:
    network.zero_grad()
    output = network(**batch)
    output.loss.backward()
    return output, [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.parametrize("attention", ["eager", "sdpa", "scgpt_varlen"])
@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_packed_equals_padded(attention: str, variant: dict[str, Any]) -> None:
    reference, network = network_for("eager", variant), network_for(attention, variant)

    @settings(deadline=None, max_examples=8)
    @given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=6), extra=st.integers(0, 3))
    def equal(lengths: list[int], extra: int) -> None:
        compare(reference, network, lengths, extra)

    equal()


def compare(reference: ScGPTForPreTraining, network: ScGPTForPreTraining, lengths: list[int], extra: int) -> None:
    padded = cells_of(lengths, extra)
    packed = packed_of(padded)
    expected, gradients = loss_and_gradients(reference, padded | as_views(padded))
    positions = (packed["labels"] != IGNORE).flatten().nonzero()[:, 0]
    more = torch.cat([positions, torch.zeros(3, dtype=torch.int64)])  # a `<cls>`, which has no label
    bucketed = {**with_tail(packed, 4), "label_positions": more}
    for cells in (packed, {**packed, "label_positions": positions}, bucketed):
        batch = cells | as_views(cells)
        found, found_gradients = loss_and_gradients(network, batch)
        torch.testing.assert_close(found.losses, expected.losses, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found_gradients, gradients, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(found.cell_embedding, expected.cell_embedding, atol=1e-5, rtol=1e-4)
    real = padded["attention_mask"]
    torch.testing.assert_close(network(**packed, **as_views(packed)).gep[0], expected.gep[real], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("bucketed", [False, True])
def test_packed_equals_padded_without_masked_genes(bucketed: bool) -> None:
    objectives = {"loss_weights": {"gepc": 1.0, "gepc_zero": 1.0, "ecs": 1.0}, "explicit_zero_prob": True}
    network = network_for("scgpt_varlen", {**objectives, "leave_out_masked": True})
    visible, masked = leave_out_masked(random_cells(n_cells=5, mean_tokens=9, n_genes=GENES))
    targets = masked.as_batch(bucket_size(len(masked.ids)) if bucketed else None)
    padded = pad(visible, pad_id=PAD, pad_value=-2.0) | masked.as_batch()
    packed = pack(visible)
    packed = (bucket(packed, pad_id=PAD, pad_value=-2.0) if bucketed else packed) | targets
    expected, gradients = loss_and_gradients(network, padded)
    found, found_gradients = loss_and_gradients(network, packed)
    torch.testing.assert_close(found.losses, expected.losses, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(found_gradients, gradients, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found.gepc[: len(expected.gepc)], expected.gepc, atol=1e-5, rtol=1e-4)


def test_gepc_of_left_out_genes_equals_that_of_unread_tokens() -> None:
    """GEPC depends on the gene and the cell embedding only: a prediction for a left-out gene is that for its token."""
    network = network_for("scgpt_varlen", {"loss_weights": {"gepc": 1.0}}).eval()
    tokens = random_cells(n_cells=4, mean_tokens=9, n_genes=GENES)
    visible, masked = leave_out_masked(tokens)
    output = network(**pack(visible), **masked.as_batch())
    genes, cells = network.scgpt.gene_encoder(torch.from_numpy(masked.ids)), output.cell_embedding[masked.cells]
    torch.testing.assert_close(output.gepc, network.cell_to_gene_head(cells, genes)[0])
    network = network_for("scgpt_varlen", {})
    with pytest.raises(ValueError, match="predicts them from their hidden states"):
        network(**pack(visible), **masked.as_batch())


def test_differences_between_packed_and_padded_have_mean_zero() -> None:
    """Rounding errors cancel out; a bug in one of the layouts would shift the mean."""
    padded = cells_of([120, 90, 60, 150] * 4)
    network = network_for("scgpt_varlen", {}).eval()
    one, other = network(**padded).gep[padded["attention_mask"]], network(**packed_of(padded)).gep[0]
    difference = (one - other).double()
    assert difference.abs().max() < 1e-5
    assert difference.mean().abs() < 1e-7


def test_five_steps_of_training_on_packed_and_padded_cells_have_the_same_losses() -> None:
    padded = cells_of([7, 3, 12, 5])
    traces = []
    for batch in (padded, packed_of(padded)):
        network = network_for("scgpt_varlen", {})
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
        trace = []
        for _ in range(5):
            loss = network(**batch).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            trace.append(loss.detach())
        traces.append(torch.stack(trace))
    torch.testing.assert_close(traces[0], traces[1], atol=0, rtol=1e-4)
    assert traces[0][-1] < traces[0][0]
