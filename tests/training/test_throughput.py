"""Throughput: rates of all processes, excluded time, and the peak of known GPUs only."""

import time

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from scgpt_hf.model.configuration_scgpt import ScGPTConfig, training_flops_per_cell, training_flops_per_token
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.throughput import Throughput, peak_flops

CPU = torch.device("cpu")
CONFIG = ScGPTConfig(vocab_size=10, pad_token_id=8)


def packed(lengths):
    """Cells with half of the tokens masked."""
    labels = torch.where(torch.arange(sum(lengths)) % 2 == 0, 1.0, IGNORE)
    return {"cu_seq_lens_q": torch.tensor([0, *lengths]).cumsum(0), "labels": labels}


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands still until the test moves it."""
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    return now


def test_rates_are_those_of_all_processes_without_excluded_time(clock):
    throughput = Throughput(CONFIG, CPU, world_size=2)
    throughput.count([packed([3, 5]), packed([4])])
    clock[0] = 10.0
    throughput.exclude(4.0)
    rates = throughput.rates(waited_s=1.5)
    assert rates == {"cells_per_second": 2 * 3 / 6, "tokens_per_second": 2 * 12 / 6, "waiting_share": 1.5 / 6}


def test_a_restart_forgets_cells_and_waiting_time(clock):
    throughput = Throughput(CONFIG, CPU, world_size=1)
    throughput.count([packed([3, 5])])
    throughput.restart(waited_s=7.0)
    clock[0] = 2.0
    assert throughput.rates(waited_s=8.0) == {"cells_per_second": 0, "tokens_per_second": 0, "waiting_share": 0.5}


def test_mfu_weights_attention_by_the_length_of_each_token(clock):
    throughput = Throughput(CONFIG, CPU, world_size=1)
    throughput.peak = 1e9
    throughput.count([packed([10, 30])])
    clock[0] = 1.0
    flops = sum(n_tokens * training_flops_per_token(CONFIG, n_tokens) for n_tokens in (10, 30))
    assert throughput.rates(0.0)["mfu"] == pytest.approx(flops / 1e9)


def test_mfu_includes_the_count_decoder_and_the_shortcut_of_each_cell(clock):
    config = ScGPTConfig(vocab_size=1000, pad_token_id=8, loss_weights={"counts": 1.0}, cls_shortcut=True)
    assert training_flops_per_cell(config) == 2 * 3 * (512 * 256 + 256 * 1000 + 256 * 256 + 256 * 512)
    throughput = Throughput(config, CPU, world_size=1)
    throughput.peak = 1e9
    throughput.count([packed([10, 10])])
    clock[0] = 1.0
    flops = 20 * training_flops_per_token(config, 10) + 2 * training_flops_per_cell(config)
    assert throughput.rates(0.0)["mfu"] == pytest.approx(flops / 1e9)


def test_flops_per_cell_are_those_that_pytorch_counts():
    config = ScGPTConfig(
        vocab_size=1000,
        pad_token_id=8,
        hidden_size=32,
        loss_weights={"counts": 1.0},
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        cls_shortcut=True,
    )
    model = ScGPTForPreTraining(config)
    with FlopCounterMode(display=False) as counter:
        hidden, ids = torch.randn(4, 32), torch.arange(4)
        model.count_head.loss(hidden, None, ids, torch.ones(4), ids).sum().backward()
        model.scgpt.shortcut.mlp(torch.randn(4, 256)).sum().backward()
    missing = 4 * 2 * 32 * 256  # the decoder's input needs no gradient here
    assert counter.get_total_flops() + missing == 4 * training_flops_per_cell(config)


def test_a_cpu_has_no_peak():
    assert peak_flops(CPU) is None
