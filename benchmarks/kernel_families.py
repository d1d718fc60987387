"""Where a step's time goes, by family of kernels, read from torch.profiler."""

import re
from collections.abc import Callable

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

# The first family whose pattern occurs in a kernel's name (on a GPU) or an operation's (on a CPU) takes it.
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


def breakdown(
    step: Callable[[], object], wait: Callable[[], None], seconds: float, n_steps: int = 5
) -> dict[str, float]:
    """Return the share of a step's time that each family takes, the largest first.

    Args:
        step: makes one step; called `n_steps` times under the profiler.
        wait: returns when the device is done.
        seconds: that a step takes without a profiler; on a GPU, what no kernel fills of it is launch gaps.
        n_steps: steps to look at.
    """
    on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    wait()
    with profile(activities=activities) as profiler:
        for _ in range(n_steps):
            step()
        wait()
    spent: dict[str, float] = {}
    for event in profiler.events():
        if on_gpu and event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            family, microseconds = family_of(event.name), event.time_range.elapsed_us()
        elif not on_gpu and event.device_type == DeviceType.CPU:
            family, microseconds = family_of(event.name), event.self_cpu_time_total
        else:
            continue
        spent[family] = spent.get(family, 0.0) + microseconds / 1e6 / n_steps
    total = seconds if on_gpu else sum(spent.values())  # a CPU's profiler slows it down too much to compare
    if on_gpu:
        spent[_LAUNCH] = max(seconds - sum(spent.values()), 0.0)
    return {family: time / total for family, time in sorted(spent.items(), key=lambda item: -item[1])}


def family_of(name: str) -> str:
    """Return the family of a kernel or operation."""
    return next((family for family, pattern in FAMILIES.items() if re.search(pattern, name.lower())), _OTHER)
