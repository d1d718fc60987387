"""Find devices with instructions for bfloat16. Others convert each number, so float32 is faster there."""

import logging

import torch
from transformers import TrainingArguments

logger = logging.getLogger(__name__)

CPU_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
"""Instructions of a CPU for bfloat16, as `torch.cpu.get_capabilities` names them: two of x86-64, two of ARM."""


def gpu_has_bfloat16() -> bool:
    """Return whether there is a CUDA device with instructions for bfloat16."""
    return torch.cuda.is_available() and torch.cuda.is_bf16_supported()


def has_bfloat16(*, use_cpu: bool) -> bool:
    """Return whether a run in bfloat16 is faster than one in float32 on this machine.

    Args:
        use_cpu: train on the CPU, even if there is a GPU.

    Example:
        >>> has_bfloat16(use_cpu=True) in (True, False)
        True
    """
    if torch.accelerator.is_available() and not use_cpu:
        return gpu_has_bfloat16()
    return any(torch.cpu.get_capabilities().get(name) for name in CPU_INSTRUCTIONS)


def warn_of_slow_bfloat16(args: TrainingArguments) -> None:
    """Warn of a run in bfloat16 on a CPU without instructions for it.

    Such a CPU trains the demo at 12 cells per second instead of 105 (`scgpt-hf pretrain --precision bf16`, on two cores
    of an AMD EPYC that has AVX2 alone).

    Args:
        args: device and precision of the run.

    Example:
        >>> warn_of_slow_bfloat16(TrainingArguments(use_cpu=True))
    """
    if args.bf16 and args.device.type == "cpu" and not has_bfloat16(use_cpu=True):
        logger.warning(
            "this CPU has no instructions for bfloat16, and computes in it several times slower than in float32; train "
            "with --precision no, or bf16_if_fast"
        )
