"""Let the processes of a run agree on a number, without involving their GPUs, or share a result of the first one."""

import datetime
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

T = TypeVar("T")


class Ranks:
    """The processes of a run, connected by a gloo group on their CPUs.

    Gradients are exchanged in another group, which on GPUs is NCCL: it only takes tensors on the GPU, and reading the
    result would make the host wait for the GPU in every step.

    `all_reduce_max` is a collective operation: all processes must call it the same number of times, in the same order.

    Attributes:
        world_size: number of processes.
        is_first: whether this process has rank 0.
    """

    def __init__(self, world_size: int, rank: int, timeout_s: float) -> None:
        """Connect the processes.

        Args:
            world_size: number of processes.
            rank: rank of this process, in [0, world_size).
            timeout_s: seconds after which the others fail if one process never calls.
        """
        self.world_size, self.is_first = world_size, rank == 0
        self._group = None
        if world_size > 1:
            self._group = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def all_reduce_max(self, number: int) -> int:
        """Return the largest number that any process passes, once all have called."""
        if self._group is None:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self._group)
        return int(numbers)

    def barrier(self) -> None:
        """Wait until all processes have called."""
        self.all_reduce_max(0)


def on_first_process(compute: Callable[[], T]) -> T:
    """Compute a result on the first process and return it on all. All of them have to call it.

    Args:
        compute: returns the result, which has to be picklable. Its ValueError or OSError is raised on all processes.
    """
    found: list[Any] = [None, None]
    if PartialState().is_main_process:
        try:
            found[0] = compute()
        except (ValueError, OSError) as error:
            found[1] = error
    result, problem = broadcast_object_list(found)
    if problem is not None:
        raise problem
    return cast(T, result)
