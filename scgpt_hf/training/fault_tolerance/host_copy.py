"""Copy the tensors of a checkpoint to host memory, so that training can change them while the copies are written.

Copying is split in two: `HostCopy.add` finds the memory, and `HostCopy.fill` copies. Weights and moments do not change
between two optimizer steps, so `fill` may run in another thread during the forward and backward pass of the next step.
"""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

# Memory that stays free for the rest of the process, for batches and for buffers of the system.
_RESERVE_BYTES = 2**30
_CGROUPS = Path("/sys/fs/cgroup")


class HostCopy:
    """Copies of tensors in host memory.

    The memory is kept from one checkpoint to the next: to be given new memory by the system takes longer than to copy.
    """

    def __init__(self, device: torch.device) -> None:
        """Create it; no memory is used yet.

        Args:
            device: where the tensors are.
        """
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._memory: list[torch.Tensor] = []  # as bytes, in the order of the tensors
        self._untouched_bytes = 0  # of memory that the system has not provided yet, and still counts as available
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # by storage: its bytes, and their copy

    def clear(self) -> None:
        """Forget the tensors that were added, and keep the memory."""
        self._copies = {}

    def add(self, state: Any) -> Any | None:
        """Return a state whose tensors are in host memory, where `fill` will copy them; None if it is too large.

        Args:
            state: dictionaries and lists that contain tensors, such as the state of a model or an optimizer. What is
                not a tensor must not change later, except for the dictionaries themselves.
        """
        storages = {tensor.untyped_storage().data_ptr(): tensor for tensor in tensors_in(state)}
        new = [tensor for place, tensor in storages.items() if place not in self._copies]
        reused = self._memory[len(self._copies) :][: len(new)]
        needed = sum(tensor.untyped_storage().nbytes() for tensor in new) - sum(len(memory) for memory in reused)
        free, expected = available_memory(), self._untouched_bytes + needed
        if self._stream is None:  # on a CPU: the gradients of AdamW's step are not there now, but will be
            expected += expected // 3
        if free is not None and expected + _RESERVE_BYTES > free and needed > 0:
            logger.warning(
                "a checkpoint is written in the foreground: its copy needs %.1f GB of host memory, %.1f GB are free",
                expected / 1e9,
                free / 1e9,
            )
            return None
        self._untouched_bytes += max(needed, 0)
        for tensor in new:
            self._reserve(tensor)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        return _replace_tensors(state, self._copy_of)

    def fill(self) -> None:
        """Copy the tensors that were added, as they are now. May be called in another thread."""
        self._untouched_bytes = 0
        if self._stream is None:
            for source, copy in self._copies.values():
                copy.copy_(source)
            return
        with torch.cuda.stream(self._stream):
            for source, copy in self._copies.values():
                copy.copy_(source, non_blocking=True)
        self._stream.synchronize()

    def _reserve(self, tensor: torch.Tensor) -> None:
        """Provide memory for the storage of a tensor."""
        storage, number = tensor.untyped_storage(), len(self._copies)
        source = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)
        if number == len(self._memory):
            self._memory.append(torch.empty(0, dtype=torch.uint8))
        if len(self._memory[number]) != len(source):
            # Page-locked memory is copied several times as fast, and without making the host wait for each tensor.
            self._memory[number] = torch.empty(len(source), dtype=torch.uint8, pin_memory=tensor.is_cuda)
        self._copies[storage.data_ptr()] = (source, self._memory[number])

    def _copy_of(self, tensor: torch.Tensor) -> torch.Tensor:
        _, memory = self._copies[tensor.untyped_storage().data_ptr()]
        copy = torch.empty(0, dtype=tensor.dtype)
        return copy.set_(memory.untyped_storage(), tensor.storage_offset(), tensor.size(), tensor.stride())


def available_memory() -> int | None:
    """Return how many bytes this process may still use, or None if the system does not say (macOS).

    This is what the machine has free, or less if a container or a job scheduler limits the process.

    Source: `MemAvailable` of proc(5); memory.max, memory.current and memory.stat of the Linux kernel's cgroup v2, and
        their counterparts of v1. The system gives up file pages that were not used lately before it runs out of memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        groups = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        return None
    free = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    for _, controllers, path in (line.split(":", 2) for line in groups):
        if controllers in ("", "memory"):
            base = _CGROUPS / controllers
            group = base / path.lstrip("/")
            free += [left for folder in (group, *group.parents) if (left := _left_in_group(folder)) is not None]
    return min(free, default=None)


def _left_in_group(folder: Path) -> int | None:
    """Return the bytes that a control group may still use; None if it has no limit."""
    for limit, used, cache in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ):
        try:
            most, now = int((folder / limit).read_text()), int((folder / used).read_text())
            statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such group, or "max"
            continue
        return most - now + int(statistics.get(cache, 0))
    return None


def tensors_in(state: Any) -> list[torch.Tensor]:
    """Return the tensors in nested dictionaries and lists."""
    found: list[torch.Tensor] = []
    _replace_tensors(state, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return found


def _replace_tensors(state: Any, replace: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """Return a copy of nested dictionaries and lists with other tensors."""
    if isinstance(state, torch.Tensor):
        return replace(state)
    if isinstance(state, dict):
        return {key: _replace_tensors(value, replace) for key, value in state.items()}
    if isinstance(state, list | tuple):
        items = [_replace_tensors(item, replace) for item in state]
        # One object may occur several times, which a pickle records: keep what holds no tensors.
        return state if all(new is old for new, old in zip(items, state, strict=True)) else type(state)(items)
    return state
