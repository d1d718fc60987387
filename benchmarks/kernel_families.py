"""Measure how much of a training step each family of kernels takes, and how many kernels run, with torch.profiler."""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# Family → pattern in the name of a kernel (on a GPU) or an operation (on a CPU). The first match decides.
FAMILIES = {
    "attention": r"flash|fmha|attention|attn",
    "optimizer and clipping": r"multi_tensor|foreach|adam|lpnorm|clip_coef|linalg_vector_norm",
    "matrix products": r"gemm|nvjet|cutlass|cublas|xmma|wgmma|splitk|triton_tem|::(add)?(b?mm|mv)\b|linear|mkldnn",
    "norms (with what is fused into them)": r"layer_?norm|gammabeta|triton_(per|red)",
    "embedding and indexing": r"embedding|index|gather|scatter|sort|radix|bucketize|searchsorted|cub::",
    "copies and casts": r"memcpy|memset|copy|_to_copy|fill|zero_",
    "reductions": r"reduce|::sum|::mean|triton_split_scan",
    "elementwise (dropout, residual, ReLU)": (
        r"elementwise|triton_poi|dropout|bernoulli|philox|::(add|mul|div|sub|relu|threshold|where|clamp|sigmoid|cat)"
    ),
}
_LAUNCH, _OTHER = "launch gaps", "other"


@dataclass(frozen=True)
class StepProfile:
    """What a step's time is spent on.

    Attributes:
        shares: share of a step's time that each family takes, largest first.
        n_kernels: kernels, copies and fills per step on a GPU; operations on a CPU.
    """

    shares: dict[str, float]
    n_kernels: float


def profile_step(step: Callable[[], object], wait: Callable[[], None], seconds: float, n_steps: int = 3) -> StepProfile:
    """Profile some training steps.

    Args:
        step: runs one training step; called `n_steps` times under the profiler.
        wait: waits until the device is done.
        seconds: duration of a step without the profiler. On a GPU, the time in which no kernel runs is reported as
            launch gaps.
        n_steps: number of steps to profile.
    """
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    wait()
    with profile(activities=activities) as profiler:
        for _ in range(n_steps):
            step()
        wait()
    spent: dict[str, float] = {}
    n_kernels = 0
    for event in profiler.events():
        if on_gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            family, microseconds = family_of(event.name), event.time_range.elapsed_us()
        elif not on_gpu and event.device_type == DeviceType.CPU:
            family, microseconds = family_of(event.name), event.self_cpu_time_total
        else:
            continue
        n_kernels += 1
        spent[family] = spent.get(family, 0.0) + microseconds / 1e6 / n_steps
    total = seconds if on_gpu else sum(spent.values())  # on a CPU, profiled times are too slow to compare
    if on_gpu:
        spent[_LAUNCH] = max(seconds - sum(spent.values()), 0.0)
    shares = {family: time / total for family, time in sorted(spent.items(), key=lambda item: -item[1])}
    return StepProfile(shares, n_kernels / n_steps)


def family_of(name: str) -> str:
    """Return the family of a kernel or an operation."""
    return next((family for family, pattern in FAMILIES.items() if re.search(pattern, name.lower())), _OTHER)
