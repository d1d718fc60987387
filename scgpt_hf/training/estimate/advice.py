"""Advice in a dry run: the predicted time of a step, and the batch size to use."""

from collections.abc import Mapping
from functools import cache
from typing import Any

from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.training.estimate.devices import DEVICES, Device, Mode
from scgpt_hf.training.estimate.predict import choose_scale, predict_step
from scgpt_hf.training.estimate.trace import Trace, trace_step

_COMPARED = "H100"  # the GPU that a dry run on a CPU compares with


def advise(
    config: ScGPTConfig,
    batch: Mapping[str, Any],
    sum_of_squares: float,
    *,
    device: Device | None,
    cells: int,
    accumulation: int,
    compiled: bool,
    checkpointing: bool = False,
) -> dict[str, str]:
    """Predict the time of a step and choose a batch size: the lines "predicted" and "advice" of a dry run.

    Args:
        config: config of the model.
        batch: a micro-batch of the run; only its shapes matter.
        sum_of_squares: sum of the squared lengths of its cells.
        device: limits of the GPU that the run uses; None for a CPU or an unknown GPU.
        cells: cells of the micro-batch.
        accumulation: micro-batches of a step.
        compiled: whether the run compiles the model.
        checkpointing: whether it computes the layers again in the backward pass.
    """

    @cache
    def trace_at(scale: int) -> Trace:
        return trace_step(config, batch, sum_of_squares, scale=scale, gradient_checkpointing=checkpointing)

    limits = device or DEVICES[_COMPARED]
    mode: Mode = "compiled" if compiled else "eager"
    now, graphs = (predict_step(trace_at(1), limits, one) for one in (mode, "cuda_graphs"))
    best = choose_scale(trace_at, limits, "compiled")
    if best is None:
        advice = (
            "a micro-batch does not fit into the memory of the device (predicted); lower "
            f"--per_device_train_batch_size from {cells:,}, or set --gradient_checkpointing true"
        )
        return {"advice": advice}
    fastest = best.scale * cells / best.seconds
    per_cell = now.seconds / cells * fastest
    if device is None:
        return {
            "predicted": f"on one {_COMPARED} at best, {now.seconds * 1e3:.1f} ms per micro-batch of {cells:,} cells, "
            f"{cells / now.seconds:,.0f} cells/s; compiled and with {best.scale * cells:,} cells, "
            f"{fastest:,.0f} cells/s",
            "advice": "on a CPU, larger micro-batches need more memory and gain little speed. To use less memory, "
            "lower --per_device_train_batch_size and raise --gradient_accumulation_steps by the same factor",
        }
    predicted = f"{now.seconds * 1e3:.1f} ms per micro-batch, limited by " + (
        "the host, which starts kernels" if now.host_s > now.busy_s else "the GPU"
    )
    per_step = cells * accumulation
    micro = min(best.scale * cells, per_step)
    flags = f"--per_device_train_batch_size {micro} --gradient_accumulation_steps {max(per_step // micro, 1)} "
    flags += "--torch_compile true"
    if micro < best.scale * cells and graphs.seconds < 0.8 * now.seconds:
        flags += " --torch_compile_mode reduce-overhead"
    advice = f"{flags}. {best.scale * cells:,} cells per micro-batch are predicted to be {per_cell:.1f} x as fast"
    if micro < best.scale * cells:
        advice += f"; your step has {per_step:,} cells per device, and a larger one changes what the run learns"
    return {"predicted": predicted, "advice": advice}
