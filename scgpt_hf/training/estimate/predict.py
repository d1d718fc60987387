"""Predict the time of a traced step on a GPU, and choose the batch size.

The model is a roofline: a kernel takes as long as its matrix products at the reachable peak, or its bytes at the
reachable bandwidth, whichever is longer, and the GPU waits where the host starts kernels more slowly. It is optimistic:
small matrix products do not reach the peak, and the work of the trainer between steps is left out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from scgpt_hf.training.estimate.devices import BANDWIDTH_REACHED, FLOPS_REACHED, SECONDS_PER_KERNEL, Device, Mode
from scgpt_hf.training.estimate.trace import Operation, Trace

_SHORTEST_KERNEL = 2e-6  # seconds: start, one wave of threads, end; an assumption
_TENSORS_PER_LAUNCH = 30  # of a kernel over a list of tensors; aten/src/ATen/native/cuda/MultiTensorApply.cuh
# Of the operations that start more than one kernel: the gradient of a norm's weights is a second pass, that of the
# embedding table sorts the ids, that of attention prepares and converts.
_LAUNCHES = {"native_layer_norm_backward": 2, "embedding_dense_backward": 4, "scgpt_estimate::attend_backward": 3}
USABLE_MEMORY = 0.85  # share of the device memory: the rest is context, library workspaces and fragmentation
_ENOUGH_SPEED = 0.95  # share of the best speed at which a smaller batch is preferred


@dataclass(frozen=True)
class Prediction:
    """The predicted time of a step.

    Attributes:
        seconds: the longer of the two below.
        busy_s: sum over the kernels, if the GPU never waits.
        host_s: time of the host to start them.
        n_kernels: number of kernels.
        n_bytes: bytes that the kernels move.
    """

    seconds: float
    busy_s: float
    host_s: float
    n_kernels: int
    n_bytes: float


@dataclass(frozen=True)
class Kernel:
    """One kernel, or several of one operation: what limits its time."""

    flops: float
    n_bytes: float
    n_launches: int
    part: str


def predict_step(trace: Trace, device: Device, mode: Mode) -> Prediction:
    """Predict the time of a step.

    Args:
        trace: see `trace_step`.
        device: the GPU.
        mode: how the step is run.
    """
    kernels = list_kernels(trace, mode)
    flops, bandwidth = device.flops * FLOPS_REACHED, device.bandwidth * BANDWIDTH_REACHED
    busy = sum(
        max(kernel.flops / flops, kernel.n_bytes / bandwidth, kernel.n_launches * _SHORTEST_KERNEL)
        for kernel in kernels
    )
    n_kernels = sum(kernel.n_launches for kernel in kernels)
    host = n_kernels * SECONDS_PER_KERNEL[mode]
    return Prediction(max(busy, host), busy, host, n_kernels, sum(kernel.n_bytes for kernel in kernels))


def list_kernels(trace: Trace, mode: Mode) -> list[Kernel]:
    """Return the kernels of a step: one per operation in eager mode; compiled, neighbors are fused."""
    operations = trace.operations
    groups = [[index] for index in range(len(operations))] if mode == "eager" else fuse(operations)
    last_read = {storage: index for index, one in enumerate(operations) for storage in one.reads}
    kernels = []
    for group in groups:
        members = [operations[index] for index in group]
        if len(group) == 1:
            n_bytes = float(members[0].n_bytes)
        else:
            made = {storage for one in members for storage in one.writes}
            reads = {storage: size for one in members for storage, size in one.reads.items() if storage not in made}
            inside = set(group)
            kept = {storage: size for one in members for storage, size in one.writes.items()
                    if last_read.get(storage, -1) not in inside}  # fmt: skip
            n_bytes = float(sum(reads.values()) + sum(kept.values()))
        launches = max(_n_launches(one) for one in members)
        kernels.append(Kernel(sum(one.flops for one in members), n_bytes, launches, members[0].part))
    return kernels


def fuse(operations: list[Operation]) -> list[list[int]]:
    """Group the operations that torch.compile may run as one kernel: fusable ones that feed each other.

    The level of an operation is the number of library kernels on the longest path to it. Operations of one level never
    wait for a library kernel between them, so joining them creates no cycle.
    """
    level_of: dict[int, int] = {}  # of what last wrote a storage
    group_of: dict[int, int] = {}  # storage → index in `groups` of the fusable operation that wrote it
    levels: list[tuple[int, str]] = []
    groups: list[list[int]] = []
    for index, one in enumerate(operations):
        level = max((level_of.get(storage, 0) for storage in one.reads), default=0)
        joined = {group_of[storage] for storage in one.reads if storage in group_of} if one.is_fusable else set()
        joined = {group for group in joined if levels[group] == (level, one.phase)}
        target = min(joined, default=len(groups))
        if target == len(groups):
            groups.append([])
            levels.append((level, one.phase))
        groups[target].append(index)
        for other in joined - {target}:
            groups[target] += groups[other]
            groups[other] = []
            group_of |= {storage: target for storage, group in group_of.items() if group == other}
        for storage in one.writes:
            level_of[storage] = level + (not one.is_fusable)
            if one.is_fusable:
                group_of[storage] = target
            else:
                group_of.pop(storage, None)
    return [sorted(group) for group in groups if group]


@dataclass(frozen=True)
class Advice:
    """The batch of one device that is predicted to be fastest.

    Attributes:
        scale: multiple of the traced batch.
        seconds: predicted seconds of a micro-batch of that size.
        peak_bytes: predicted peak memory.
    """

    scale: int
    seconds: float
    peak_bytes: int


def choose_scale(trace_at: Callable[[int], Trace], device: Device, mode: Mode, largest: int = 64) -> Advice | None:
    """Choose by how much to enlarge a batch: the smallest one that is nearly as fast per cell as the fastest.

    Args:
        trace_at: returns the trace of a batch with this multiple of the cells.
        device: the GPU, whose memory limits the batch.
        mode: how the step is run.
        largest: largest multiple to try.

    Returns:
        The choice; None if not even the traced batch fits into the memory.
    """
    found = []
    for exponent in range(0, int(math.log2(largest)) + 1, 2):
        trace = trace_at(2**exponent)
        if trace.peak_bytes > USABLE_MEMORY * device.memory:
            break
        found.append(Advice(2**exponent, predict_step(trace, device, mode).seconds, trace.peak_bytes))
    best = min((one.seconds / one.scale for one in found), default=math.inf)
    return next((one for one in found if one.seconds / one.scale <= best / _ENOUGH_SPEED), None)


def _n_launches(operation: Operation) -> int:
    """Return the number of kernels of an operation."""
    if operation.name.startswith(("_foreach", "_fused")):
        return math.ceil(operation.n_tensors / _TENSORS_PER_LAUNCH)
    return _LAUNCHES.get(operation.name, 1)
