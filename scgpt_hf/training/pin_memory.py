"""Copy batches to the GPU from page-locked memory, so that the host does not wait for the copy.

A copy from ordinary memory waits until the GPU has finished all work queued before, and the kernels of the next step
are launched late. See `pin_memory` of torch's DataLoader.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.tokens.packing_scgpt import IGNORE


def pin_batches(open_stream: Callable[..., Iterable[Batch]], device: torch.device) -> Callable[..., Iterable[Batch]]:
    """Wrap a function that opens a stream, so that the tensors of its batches are in page-locked memory.

    Only for CUDA devices; for others the function is returned unchanged. The copy to page-locked memory is made by the
    thread that reads the stream, which is the one of `prefetch`, not the training thread.
    """
    if device.type != "cuda":
        return open_stream
    return lambda *position: _pin(open_stream(*position), device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device. From page-locked memory, the copy is asynchronous."""
    return tensor.to(device, non_blocking=tensor.is_pinned())


def count_labels(batches: Sequence[Batch], device: torch.device) -> torch.Tensor:
    """Return the number of labels in the batches of this process: float32, shape (), on the device."""
    total = torch.zeros(())
    for batch in batches:
        total += torch.as_tensor(batch["labels"]).ne(IGNORE).sum()
    return to_device(total.pin_memory() if device.type == "cuda" else total, device)


def _pin(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    torch.cuda.set_device(device)  # CUDA's current device is set per thread; the default would be the first GPU
    for batch in batches:
        yield {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
