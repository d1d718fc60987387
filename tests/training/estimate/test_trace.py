"""The trace of a step has the FLOPs, operations and activations of a real one."""

from collections import Counter

import numpy as np
import pytest
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode

from scgpt_hf.model.configuration_scgpt import ScGPTConfig, training_flops_per_cell, training_flops_per_token
from scgpt_hf.tokens.packing_scgpt import IGNORE, pack
from scgpt_hf.training.estimate.trace import trace_step
from tests.support.models import N_GENES, random_cells, random_count_targets, small_model

TOKENS = random_cells(12, 40, N_GENES)
BATCH = pack(TOKENS)
LENGTHS = np.diff(TOKENS.indptr).astype(float)
SQUARES = float(np.square(LENGTHS).sum())


@pytest.fixture(scope="module")
def model():
    return small_model()


@pytest.fixture(scope="module")
def trace(model):
    return trace_step(model.config, BATCH, SQUARES, bf16=False)


def test_flops_equal_those_that_torch_counts(trace, model):
    with FlopCounterMode(display=False) as forward:
        loss = small_model(attention="sdpa")(**BATCH).loss  # other parameters, so that `model` gets no gradients
    with FlopCounterMode(display=False) as backward:
        loss.backward()
    for phase, counter in (("forward", forward), ("backward", backward)):
        products = {"mm", "addmm"}
        found = sum(one.flops for one in trace.operations if one.phase == phase and one.name in products)
        counts = counter.get_flop_counts()["Global"]
        assert found == sum(flops for op, flops in counts.items() if op.__name__ in products)
    attention = {one.phase: one.flops for one in trace.operations if "attend" in one.name}
    assert attention == {"forward": 4 * 128 * SQUARES, "backward": 10 * 128 * SQUARES}


@pytest.mark.parametrize("size", [64, 512])
def test_flops_are_near_the_closed_formula(size):
    """The formula counts two passes for the backward pass of attention; the kernel does two and a half."""
    sizes = {"hidden_size": size, "intermediate_size": size, "num_attention_heads": size // 64}
    config = ScGPTConfig(vocab_size=N_GENES + 2, pad_token_id=N_GENES, num_hidden_layers=4, **sizes)
    masked = float((TOKENS.labels != IGNORE).mean())
    formula = training_flops_per_token(config, SQUARES / LENGTHS.sum(), masked) * LENGTHS.sum()
    assert trace_step(config, BATCH, SQUARES).flops == pytest.approx(formula, rel=0.04)


def test_the_objective_counts_is_traced_too():
    model = small_model(loss_weights={"gep": 1.0, "counts": 1.0}, cls_shortcut=True)
    batch = {**BATCH, **random_count_targets(len(TOKENS), N_GENES)}
    trace = trace_step(model.config, batch, SQUARES)
    without = trace_step(small_model(loss_weights={"gep": 1.0}).config, BATCH, SQUARES)
    assert trace.flops - without.flops == pytest.approx(training_flops_per_cell(model.config) * len(TOKENS), rel=0.5)


def test_operations_are_those_that_the_profiler_sees(trace, model):
    network = small_model()
    with profile() as profiler:
        network(**BATCH).loss.backward()
    seen = Counter(event.name.removeprefix("aten::") for event in profiler.events())
    traced = Counter(one.name for one in trace.operations if one.phase != "optimizer")
    for name in ("addmm", "native_layer_norm", "native_layer_norm_backward", "relu", "embedding"):
        assert traced[name] == seen[name] > 0


def test_activations_are_those_that_autograd_saves(trace):
    network, saved = small_model(), {}

    def keep(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = network(**BATCH).loss
    for tensor in [*network.parameters(), *(value for value in BATCH.values() if isinstance(value, torch.Tensor))]:
        saved.pop(tensor.untyped_storage().data_ptr(), None)
    assert loss.requires_grad
    assert trace.activation_bytes == pytest.approx(sum(saved.values()), rel=0.1)


def test_a_larger_batch_costs_in_proportion(trace, model):
    larger = trace_step(model.config, BATCH, SQUARES, scale=4, bf16=False)
    assert larger.flops == pytest.approx(4 * trace.flops, rel=0.01)
    assert larger.activation_bytes == pytest.approx(4 * trace.activation_bytes, rel=0.05)
    assert len(larger.operations) == len(trace.operations)


def test_checkpointing_saves_memory_and_costs_a_forward_pass(model):
    settings = {"hidden_size": 128, "intermediate_size": 128, "num_attention_heads": 2, "num_hidden_layers": 6}
    config = ScGPTConfig(vocab_size=N_GENES + 2, pad_token_id=N_GENES, **settings)
    plain = trace_step(config, BATCH, SQUARES)
    checkpointed = trace_step(config, BATCH, SQUARES, gradient_checkpointing=True)
    assert checkpointed.activation_bytes < 0.5 * plain.activation_bytes
    layers = sum(one.flops for one in plain.operations if one.phase == "forward" and "layers" in one.part)
    assert checkpointed.flops - plain.flops == pytest.approx(layers, rel=0.01)
