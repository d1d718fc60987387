"""On a GPU: packed equals padded in bf16, the variable-length kernel equals SDPA, and compiled equals eager."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, bucket, pack, pad

pytestmark = pytest.mark.gpu

GENES, PAD, CLS = 1000, 1000, 1001


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def masked_cells(n_cells: int, mean_tokens: int, seed: int = 0) -> Tokens:
    rng = np.random.default_rng(seed)
    indptr = np.cumsum([0, *np.maximum(rng.poisson(mean_tokens, n_cells), 2)])
    ids = rng.integers(0, GENES, indptr[-1])
    ids[indptr[:-1]] = CLS
    bins = rng.integers(1, 51, indptr[-1]).astype(np.float32)
    hidden = (rng.random(indptr[-1]) < 0.5) & (ids != CLS)
    values, labels = np.where(hidden, np.float32(-1), bins), np.where(hidden, bins, np.float32(IGNORE))
    return Tokens(ids, values, labels, indptr, np.arange(n_cells))


def network_on(gpu: torch.device, attention: str = "scgpt_varlen", **settings: Any) -> ScGPTForPreTraining:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
    config = ScGPTConfig(vocab_size=GENES + 2, pad_token_id=PAD, **sizes, **{"dropout": 0.0, **settings})
    return ScGPTForPreTraining._from_config(config, attn_implementation=attention).to(gpu)


def loss_and_gradients(network: Any, batch: dict[str, Any], *, bf16: bool) -> tuple[Any, torch.Tensor]:
    """The output, and all gradients end to end."""
    network.zero_grad()
    batch = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    with torch.autocast("cuda", torch.bfloat16, enabled=bf16):
        output = network(**batch)
    output.loss.backward()
    return output, torch.cat([parameter.grad.float().flatten() for parameter in network.parameters()])


def assert_near(found: torch.Tensor, expected: torch.Tensor, relative: float) -> None:
    assert torch.isfinite(found).all()
    assert (found - expected).norm() <= relative * expected.norm()


@pytest.mark.parametrize(("bf16", "relative"), [(True, 3e-2), (False, 1e-4)])
def test_packed_equals_padded_and_bucketed(gpu: torch.device, bf16: bool, relative: float) -> None:
    tokens, network = masked_cells(24, 90), network_on(gpu)
    expected, gradients = loss_and_gradients(network, pad(tokens, pad_id=PAD, pad_value=-2.0), bf16=False)
    for batch in (
        pad(tokens, pad_id=PAD, pad_value=-2.0),
        pack(tokens),
        bucket(pack(tokens), pad_id=PAD, pad_value=-2.0),
    ):
        found, found_gradients = loss_and_gradients(network, batch, bf16=bf16)
        assert_near(found.loss, expected.loss, relative)
        assert_near(found.gep[: len(expected.gep)].float(), expected.gep, relative)
        assert_near(found.cell_embedding.float(), expected.cell_embedding, relative)
        assert_near(found_gradients, gradients, 2 * relative)


def test_the_kernel_equals_sdpa_with_a_block_mask(gpu: torch.device) -> None:
    batch = pack(masked_cells(16, 100))
    expected, gradients = loss_and_gradients(network_on(gpu, "sdpa"), batch, bf16=True)
    found, found_gradients = loss_and_gradients(network_on(gpu), batch, bf16=True)
    assert_near(found.last_hidden_state.float(), expected.last_hidden_state.float(), 2e-2)
    assert_near(found_gradients, gradients, 4e-2)


def test_differences_of_the_kernel_have_no_direction(gpu: torch.device) -> None:
    tokens, network = masked_cells(64, 100), network_on(gpu).eval()
    padded, _ = loss_and_gradients(network, pad(tokens, pad_id=PAD, pad_value=-2.0), bf16=False)
    packed, _ = loss_and_gradients(network, pack(tokens), bf16=True)
    difference = (packed.gep.float() - padded.gep).double()
    assert difference.mean().abs() < 0.2 * difference.abs().mean()


def test_no_length_compiles_anew(gpu: torch.device) -> None:
    network = network_on(gpu)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    for seed, mean_tokens in enumerate((40, 55, 75, 100, 140, 200)):
        packed = pack(masked_cells(24, mean_tokens, seed))
        expected, gradients = loss_and_gradients(network, packed, bf16=True)
        found, found_gradients = loss_and_gradients(compiled, bucket(packed, pad_id=PAD, pad_value=-2.0), bf16=True)
        assert_near(found.loss, expected.loss, 2e-2)
        assert_near(found_gradients, gradients, 5e-2)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("length", [1, 7, 128, 129])
def test_a_row_that_no_cell_ends_in_has_finite_gradients(gpu: torch.device, length: int) -> None:
    """The kernel gets an empty last cell, or one of padding alone."""
    indptr = np.array([0, length, length + 3])
    ids, bins = np.full(length + 3, 5), np.ones(length + 3, np.float32)
    labels = np.where(np.arange(length + 3) % 2 == 1, bins, np.float32(IGNORE))
    batch = pack(Tokens(ids, bins, labels, indptr, np.arange(2)))
    network = network_on(gpu)
    for row in (batch, bucket(batch, pad_id=PAD, pad_value=-2.0)):
        output, gradients = loss_and_gradients(network, row, bf16=True)
        assert torch.isfinite(output.loss)
        assert torch.isfinite(gradients).all()
