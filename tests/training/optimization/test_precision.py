"""Precision: bfloat16 where the device has instructions for it, and a warning of a CPU that has none."""

import pytest
import torch

from scgpt_hf.training.optimization.precision import CPU_INSTRUCTIONS, warn_of_slow_bfloat16
from scgpt_hf.training.settings import TrainingSettings


@pytest.fixture(params=[None, *CPU_INSTRUCTIONS])
def instruction(request, monkeypatch):
    """A CPU with one kind of instructions for bfloat16, or with none."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, request.param: True})
    return request.param


def settings(folder, precision):
    return TrainingSettings(output_dir=str(folder), use_cpu=True, precision=precision)


@pytest.mark.parametrize("precision", ["bf16", "no"])
def test_bfloat16_without_instructions_is_warned_of(tmp_path, caplog, instruction, precision):
    warn_of_slow_bfloat16(settings(tmp_path, precision))
    assert ("--precision no" in caplog.text) == (precision == "bf16" and instruction is None)


def test_bfloat16_if_fast_follows_the_instructions_of_the_cpu(tmp_path, caplog, instruction):
    args = settings(tmp_path, "bf16_if_fast")
    warn_of_slow_bfloat16(args)
    assert args.bf16 == (instruction is not None)
    assert args.mixed_precision == ("bf16" if args.bf16 else "no")
    assert not caplog.text


def test_torch_names_the_instructions_for_bfloat16():
    assert set(torch.cpu.get_capabilities()) & set(CPU_INSTRUCTIONS)
