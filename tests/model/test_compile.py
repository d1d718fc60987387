"""A compiled model computes the same on packed rows of any length, in one graph that no length compiles anew."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, bucket, pack

GENES, PAD, CLS = 17, 17, 18
EVERYTHING = {
    **{"n_domains": 3, "domain_embedding": True, "domain_head": True, "explicit_zero_prob": True},
    "loss_weights": dict.fromkeys(("gep", "gepc", "gep_zero", "gepc_zero", "ecs", "cce", "dar", "cls"), 1.0),
}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def masked_cells(n_cells: int, mean_tokens: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    n_tokens = np.maximum(rng.poisson(mean_tokens, n_cells), 2)
    indptr = np.cumsum([0, *n_tokens])
    ids = rng.integers(0, GENES, indptr[-1])
    ids[indptr[:-1]] = CLS
    bins = rng.integers(1, 51, indptr[-1]).astype(np.float32)
    hidden = (rng.random(indptr[-1]) < 0.5) & (ids != CLS)
    values, labels = np.where(hidden, np.float32(-1), bins), np.where(hidden, bins, np.float32(IGNORE))
    batch = pack(Tokens(ids, values, labels, indptr, np.arange(n_cells)))
    classes = {"domain_ids": torch.arange(n_cells) % 3, "class_labels": torch.arange(n_cells) % 3}
    return batch | classes | {"num_items_in_batch": torch.tensor(float(hidden.sum()))}


def loss_and_gradients(network: Any, batch: dict[str, Any]) -> tuple[torch.Tensor, list[torch.Tensor]]:
    network.zero_grad()
    loss = network(**batch).loss
    loss.backward()
    return loss.detach(), [parameter.grad.clone() for parameter in network.parameters()]


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # of inductor's own import
@pytest.mark.parametrize(
    ("backend", "variant"),
    [
        ("eager", EVERYTHING),
        pytest.param("aot_eager", EVERYTHING, marks=pytest.mark.slow),
        pytest.param("inductor", {}, marks=pytest.mark.slow),
    ],
    ids=["eager", "aot_eager", "inductor"],
)
def test_lengths_do_not_compile_anew(
    model: Callable[..., ScGPTForPreTraining], backend: str, variant: dict[str, Any]
) -> None:
    network = model(num_hidden_layers=1, **variant)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(network, backend=counter, fullgraph=True)  # a wait for data would be a break in the graph
    shapes = set()
    for seed, mean_tokens in enumerate((20, 24, 35, 50, 70, 100)):
        packed = masked_cells(16, mean_tokens, seed)
        bucketed = bucket(packed, pad_id=PAD, pad_value=-2.0)
        shapes.add((bucketed["input_ids"].shape[1], len(bucketed["label_positions"]), bucketed["max_length_q"]))
        expected, gradients = loss_and_gradients(network, packed)
        found, found_gradients = loss_and_gradients(compiled, bucketed)
        torch.testing.assert_close(found, expected, atol=0, rtol=1e-5)
        torch.testing.assert_close(found_gradients, gradients, atol=1e-4, rtol=1e-3)
    assert len(shapes) == 6
    assert counter.frame_count <= 3  # the first shape, then lengths become symbols


@pytest.mark.slow
def test_each_bucket_compiles_once_where_shapes_are_constants(model: Callable[..., ScGPTForPreTraining]) -> None:
    """As for CUDA graphs, which are recorded for one shape each."""
    network = model(num_hidden_layers=1)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=False)
    shapes = set()
    for seed in range(24):
        batch = bucket(masked_cells(24, 40, seed), pad_id=PAD, pad_value=-2.0)
        shapes.add((batch["input_ids"].shape[1], len(batch["label_positions"]), batch["max_length_q"]))
        compiled(**batch)
    assert counter.frame_count == len(shapes) < 8  # beyond 8 torch gives up compiling
