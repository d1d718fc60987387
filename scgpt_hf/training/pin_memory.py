"""How batches reach the GPU: from page-locked memory, so that the host never waits for a copy.

A copy from ordinary memory waits until the GPU has done all it was asked for, and the next step is launched late.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence

import torch

from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.tokens.packing_scgpt import IGNORE


def pin_batches(open_stream: Callable[..., Iterable[Batch]], device: torch.device) -> Callable[..., Iterable[Batch]]:
    """Return a way to open the stream whose batches lie in page-locked memory if they go to a CUDA device.

    The copy is made where the stream is read: in the thread of `prefetch`.
    """
    if device.type != "cuda":
        return open_stream
    return lambda *position: _pinned(open_stream(*position), device)


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return the tensor on the device; from page-locked memory it gets there while the host goes on."""
    return tensor.to(device, non_blocking=tensor.is_pinned())


def count_labels(batches: Sequence[Batch], device: torch.device) -> torch.Tensor:
    """Return how many labels the batches of this process have, float32 (), on the device."""
    total = torch.zeros(())
    for batch in batches:
        total += torch.as_tensor(batch["labels"]).ne(IGNORE).sum()
    return to_device(total.pin_memory() if device.type == "cuda" else total, device)


def _pinned(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    torch.cuda.set_device(device)  # of the reading thread, which would otherwise wake the first GPU
    for batch in batches:
        yield {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
