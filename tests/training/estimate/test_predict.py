"""Predictions: fusion creates no cycle, small batches are limited by the host, and the advice fits into the memory."""

from functools import cache
from graphlib import TopologicalSorter

import numpy as np
import pytest

from scgpt_hf.tokens.packing_scgpt import pack
from scgpt_hf.training.estimate.advice import advise
from scgpt_hf.training.estimate.devices import DEVICES, MODES, Device
from scgpt_hf.training.estimate.predict import choose_scale, fuse, predict_step
from scgpt_hf.training.estimate.trace import trace_step
from tests.support.models import N_GENES, random_cells, small_model

TOKENS = random_cells(8, 40, N_GENES)
SQUARES = float(np.square(np.diff(TOKENS.indptr)).sum())


@cache
def trace_at(scale):
    return trace_step(small_model(dropout=0.2).config, pack(TOKENS), SQUARES, scale=scale)


def test_fused_operations_depend_on_each_other_in_no_cycle():
    operations = trace_at(1).operations
    groups = fuse(operations)
    assert sorted(index for group in groups for index in group) == list(range(len(operations)))
    group_of = {index: number for number, group in enumerate(groups) for index in group}
    needs, made_by = {number: set() for number in range(len(groups))}, {}
    for index, one in enumerate(operations):
        needs[group_of[index]] |= {made_by[storage] for storage in one.reads if storage in made_by}
        made_by |= dict.fromkeys(one.writes, group_of[index])
    for number, needed in needs.items():
        needed.discard(number)
    list(TopologicalSorter(needs).static_order())  # raises CycleError
    assert len(groups) < 0.9 * len(operations)


def test_a_small_batch_is_limited_by_the_host_and_a_large_one_by_the_gpu():
    small, large = ({mode: predict_step(trace_at(scale), DEVICES["H100"], mode) for mode in MODES}
                    for scale in (1, 1024))  # fmt: skip
    assert small["eager"].seconds == small["eager"].host_s > small["cuda_graphs"].seconds
    assert large["eager"].seconds == large["eager"].busy_s > large["compiled"].seconds
    assert large["compiled"].n_bytes < large["eager"].n_bytes
    on_h200 = predict_step(trace_at(1024), DEVICES["H200"], "compiled")
    assert on_h200.seconds < large["compiled"].seconds  # its memory is faster


def test_the_advised_batch_fits_into_the_memory():
    memory = 20 * trace_at(1).peak_bytes
    tight = choose_scale(trace_at, Device(989e12, 3.35e12, memory), "compiled")
    assert 1 < tight.scale <= 20
    assert tight.peak_bytes < memory
    assert choose_scale(trace_at, Device(989e12, 3.35e12, 1000.0), "compiled") is None


@pytest.mark.parametrize("device", ["H100", None])
def test_advice_names_flags_and_says_what_is_predicted(device):
    lines = advise(
        small_model().config, pack(TOKENS), SQUARES, device=DEVICES.get(device), cells=8, accumulation=4, compiled=False
    )
    assert "ms per micro-batch" in lines["predicted"]
    assert "--per_device_train_batch_size" in lines["advice"]
    # 32 cells per step are kept, in one micro-batch.
    assert ("32 --gradient_accumulation_steps 1 --torch_compile true" in lines["advice"]) == (device == "H100")
