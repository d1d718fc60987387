"""A compiled model gives the same numbers for packed rows of any length, without recompiling for each length."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.packing_scgpt import IGNORE, bucket, pack
from tests.support.models import EVERY_OBJECTIVE, as_views, loss_and_gradients, random_cells, random_count_targets

GENES, PAD = 17, 17
GENERATIVE: dict[str, Any] = {"objective": "generative", "loss_weights": {"gep": 1.0, "gepc": 1.0, "gen": 1.0}}


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def masked_batch(n_cells: int, mean_tokens: int, seed: int, *, queries: bool) -> dict[str, Any]:
    """Return a packed batch with everything that `EVERY_OBJECTIVE` needs."""
    tokens = random_cells(n_cells, mean_tokens, GENES, seed)
    classes = {"domain_ids": torch.arange(n_cells) % 3, "class_labels": torch.arange(n_cells) % 3}
    classes |= random_count_targets(n_cells, GENES, seed)
    return (
        pack(tokens, queries=queries)
        | classes
        | {"num_items_in_batch": torch.tensor(float((tokens.labels != IGNORE).sum()))}
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")  # raised when inductor is imported
@pytest.mark.parametrize(
    ("backend", "variant"),
    [
        ("eager", EVERY_OBJECTIVE),
        ("eager", GENERATIVE),
        pytest.param("aot_eager", EVERY_OBJECTIVE, marks=pytest.mark.slow),
        pytest.param("inductor", {}, marks=pytest.mark.slow),
    ],
    ids=["eager", "queries", "aot_eager", "inductor"],
)
def test_lengths_do_not_recompile(
    model: Callable[..., ScGPTForPreTraining], backend: str, variant: dict[str, Any]
) -> None:
    network = model(num_hidden_layers=1, **variant)
    counter = CompileCounterWithBackend(backend)
    compiled = torch.compile(network, backend=counter, fullgraph=True)  # waiting for data would break the graph
    shapes = set()
    for seed, mean_tokens in enumerate((20, 24, 35, 50, 70, 100)):
        packed = masked_batch(16, mean_tokens, seed, queries="objective" in variant)
        bucketed = bucket(packed, pad_id=PAD, pad_value=-2.0)
        shapes.add((bucketed["input_ids"].shape[1], len(bucketed["label_positions"]), bucketed["max_length_q"]))
        expected, gradients = loss_and_gradients(network, packed | as_views(packed))
        found, found_gradients = loss_and_gradients(compiled, bucketed | as_views(bucketed))
        torch.testing.assert_close(found, expected, atol=0, rtol=1e-5)
        torch.testing.assert_close(found_gradients, gradients, atol=1e-4, rtol=1e-3)
    assert len(shapes) == 6
    assert counter.frame_count <= 3  # the first shape, then lengths become symbols


@pytest.mark.slow
def test_each_bucket_compiles_once_with_static_shapes(model: Callable[..., ScGPTForPreTraining]) -> None:
    """CUDA graphs need static shapes: one graph is recorded per shape."""
    network = model(num_hidden_layers=1)
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(network, backend=counter, fullgraph=True, dynamic=False)
    shapes = set()
    for seed in range(24):
        batch = bucket(masked_batch(24, 40, seed), pad_id=PAD, pad_value=-2.0)
        shapes.add((batch["input_ids"].shape[1], len(batch["label_positions"]), batch["max_length_q"]))
        compiled(**batch)
    assert counter.frame_count == len(shapes) < 8  # torch stops compiling after 8
