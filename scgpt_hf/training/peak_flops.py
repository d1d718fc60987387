"""The fastest a device can multiply matrices: what model-FLOPs utilisation is a share of."""

import torch

# Dense bf16 matrix products, FLOP/s, without sparsity. Source: NVIDIA data sheets (SXM modules).
PEAK_FLOPS = {"A100": 312e12, "H100": 989e12, "H200": 989e12, "B200": 2250e12, "L40S": 362e12}


def peak_flops(device: torch.device) -> float | None:
    """Return the bf16 peak of a device in FLOP/s, or None where it is not known (every CPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for key, peak in PEAK_FLOPS.items() if key in name), None)
