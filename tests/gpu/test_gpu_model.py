"""On a GPU, packed equals padded in bf16, the variable-length kernel equals SDPA, and compiled equals eager."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, bucket, pack, pad
from tests.support.models import N_GENES, PAD_ID, random_cells, small_model

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def output_and_gradients(network: Any, batch: dict[str, Any], *, bf16: bool) -> tuple[Any, torch.Tensor]:
    """Return the output and all gradients in one vector."""
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
    tokens, network = random_cells(24, 90, N_GENES), small_model(gpu)
    expected, gradients = output_and_gradients(network, pad(tokens, pad_id=PAD_ID, pad_value=-2.0), bf16=False)
    for batch in (
        pad(tokens, pad_id=PAD_ID, pad_value=-2.0),
        pack(tokens),
        bucket(pack(tokens), pad_id=PAD_ID, pad_value=-2.0),
    ):
        found, found_gradients = output_and_gradients(network, batch, bf16=bf16)
        assert_near(found.loss, expected.loss, relative)
        assert_near(found.gep[: len(expected.gep)].float(), expected.gep, relative)
        assert_near(found.cell_embedding.float(), expected.cell_embedding, relative)
        assert_near(found_gradients, gradients, 2 * relative)


def test_the_kernel_equals_sdpa_with_a_block_mask(gpu: torch.device) -> None:
    batch = pack(random_cells(16, 100, N_GENES))
    expected, gradients = output_and_gradients(small_model(gpu, "sdpa"), batch, bf16=True)
    found, found_gradients = output_and_gradients(small_model(gpu), batch, bf16=True)
    assert_near(found.last_hidden_state.float(), expected.last_hidden_state.float(), 2e-2)
    assert_near(found_gradients, gradients, 4e-2)


def test_differences_of_the_kernel_have_mean_zero(gpu: torch.device) -> None:
    tokens, network = random_cells(64, 100, N_GENES), small_model(gpu).eval()
    padded, _ = output_and_gradients(network, pad(tokens, pad_id=PAD_ID, pad_value=-2.0), bf16=False)
    packed, _ = output_and_gradients(network, pack(tokens), bf16=True)
    difference = (packed.gep.float() - padded.gep).double()
    assert difference.mean().abs() < 0.2 * difference.abs().mean()


def test_no_length_recompiles(gpu: torch.device) -> None:
    network = small_model(gpu)
    counter = CompileCounterWithBackend("inductor")
    compiled = torch.compile(network, backend=counter, fullgraph=True)
    for seed, mean_tokens in enumerate((40, 55, 75, 100, 140, 200)):
        packed = pack(random_cells(24, mean_tokens, N_GENES, seed))
        expected, gradients = output_and_gradients(network, packed, bf16=True)
        found, found_gradients = output_and_gradients(
            compiled, bucket(packed, pad_id=PAD_ID, pad_value=-2.0), bf16=True
        )
        assert_near(found.loss, expected.loss, 2e-2)
        assert_near(found_gradients, gradients, 5e-2)
    assert counter.frame_count <= 3


@pytest.mark.parametrize("length", [1, 7, 128, 129])
def test_empty_and_padding_cells_have_finite_gradients(gpu: torch.device, length: int) -> None:
    """The last cell of the kernel is empty, or contains padding only."""
    indptr = np.array([0, length, length + 3])
    ids, bins = np.full(length + 3, 5), np.ones(length + 3, np.float32)
    labels = np.where(np.arange(length + 3) % 2 == 1, bins, np.float32(IGNORE))
    batch = pack(Tokens(ids, bins, labels, indptr, np.arange(2)))
    network = small_model(gpu)
    for row in (batch, bucket(batch, pad_id=PAD_ID, pad_value=-2.0)):
        output, gradients = output_and_gradients(network, row, bf16=True)
        assert torch.isfinite(output.loss)
        assert torch.isfinite(gradients).all()
