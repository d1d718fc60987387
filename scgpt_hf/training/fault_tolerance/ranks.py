"""The processes of a run as their hosts see each other: what they agree on makes no device wait."""

import datetime

import torch
import torch.distributed as dist


class Ranks:
    """Lets all processes of a run come to one answer. Every process must ask the same questions in the same order."""

    def __init__(self, world_size: int, index: int, timeout_s: float) -> None:
        """Connect the processes.

        Args:
            world_size: number of processes.
            index: of this one, in [0, world_size).
            timeout_s: seconds after which a process that never asks is given up.
        """
        self.world_size, self.is_first = world_size, index == 0
        self._group = None
        if world_size > 1:  # beside the group of the gradients, which may know tensors on GPUs only
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number that any process gives, once all have given theirs."""
        if self._group is None:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return int(numbers)
