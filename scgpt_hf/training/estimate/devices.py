"""The limits of a GPU: its peak rates, its memory, and the time that the host needs to start a kernel."""

from dataclasses import dataclass
from typing import Literal

# How a step is run: op by op, by torch.compile, or by torch.compile in mode "reduce-overhead" (CUDA graphs).
Mode = Literal["eager", "compiled", "cuda_graphs"]
MODES: tuple[Mode, ...] = ("eager", "compiled", "cuda_graphs")


@dataclass(frozen=True)
class Device:
    """The limits of a GPU.

    Attributes:
        flops: peak of dense bf16 matrix products, FLOP/s.
        bandwidth: peak of the device memory, bytes/s.
        memory: size of the device memory, bytes.
    """

    flops: float
    bandwidth: float
    memory: float


# Source: NVIDIA data sheets of the SXM modules (L40S: PCIe), without sparsity.
DEVICES = {
    "A100": Device(312e12, 2.04e12, 80e9),
    "H100": Device(989e12, 3.35e12, 80e9),
    "H200": Device(989e12, 4.8e12, 141e9),
    "B200": Device(2250e12, 8e12, 180e9),
    "L40S": Device(362e12, 0.864e12, 48e9),
}

# Shares of the peaks that large matrix products and large copies reach. Source: on an H200, a bf16 product of 8192 x
# 8192 matrices ran at 790 TFLOP/s and a device-to-device copy at 4.3 TB/s.
FLOPS_REACHED, BANDWIDTH_REACHED = 0.8, 0.9

# Seconds of the host for one kernel. The GPU waits whenever the host is slower. These are assumptions, to be replaced
# by measurements of `benchmarks/gpu.py`: eager PyTorch takes 5 to 10 microseconds for an operation, compiled code skips
# the dispatcher, and a graph is one launch, whose kernels follow each other after about a microsecond. Source of the
# orders of magnitude: pytorch.org/blog/accelerating-pytorch-with-cuda-graphs.
SECONDS_PER_KERNEL: dict[Mode, float] = {"eager": 8e-6, "compiled": 5e-6, "cuda_graphs": 1e-6}


def find_device(name: str) -> Device | None:
    """Return the limits of a GPU by the name that CUDA reports, or None for an unknown one.

    Example:
        >>> find_device("NVIDIA H100 80GB HBM3").flops / 1e12
        989.0
    """
    return next((device for key, device in DEVICES.items() if key in name), None)
