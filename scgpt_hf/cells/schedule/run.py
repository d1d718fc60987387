"""Plan a run: which plan of an epoch each global step follows, also after the global batch size has changed.

As long as the batch size stays the same, a run is one `EpochPlan` after the other. A run that resumes with another
batch size cannot follow the plan it started: that plan's steps have the wrong size. The rest of the epoch is planned
again, over the cells that were not visited yet. So a run is a list of segments, each with its own plan:

    n_epochs = 2, 95 cells; 4 steps of 10 cells were trained, and the run resumes with 5 cells to a step

        segment 0   epoch 0, all 95 cells, 10 to a step         steps  0 to  3
        segment 1   epoch 0, the 55 cells that are left, 5      steps  4 to 14
        segment 2   epoch 1, all 95 cells, 5 to a step          steps 15 to 33

This keeps the promise that every cell is visited once an epoch. To repeat it, a checkpoint records only its history: a
short list of (cells of a step, steps trained with that size). Plans are pure functions, so replaying the history gives
the same segments again, and no list of visited cells is stored.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.schedule.balance import Balance, plan_balanced
from scgpt_hf.cells.schedule.epoch import EpochPlan, plan_epoch
from scgpt_hf.cells.schedule.tokens import REPEAT

History = Sequence[tuple[int, int]]  # (cells of a global step, number of steps), in the order they were trained


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of a run that follow one plan from its first step.

    Attributes:
        plan: the plan; the segment may stop before the plan does.
        start: first step, counted from the start of the run.
        stop: one past the last step.
    """

    plan: EpochPlan
    start: int
    stop: int


@dataclass(frozen=True)
class RunSchedule:
    """All global steps of a run. Create it with `plan_run`.

    Attributes:
        segments: consecutive segments; each starts where the previous one stops.
        start_step: number of steps that were trained before, in earlier sessions.
    """

    segments: tuple[Segment, ...]
    start_step: int

    @property
    def n_steps(self) -> int:
        """Number of steps in the run, those of earlier sessions included."""
        return self.segments[-1].stop

    @property
    def epoch_ends(self) -> list[int]:
        """Number of steps trained when each epoch ends. The last epoch may end early."""
        inner = [segment.stop for segment, after in pairwise(self.segments) if segment.plan.epoch != after.plan.epoch]
        return [*inner, self.n_steps]

    @property
    def changes_batch_size(self) -> bool:
        """Return whether the global batch size differs between steps of the run."""
        return len(self.history(self.n_steps)) > 1

    def plans_from(self, step: int) -> tuple[list[EpochPlan], int]:
        """Return the plan that a step follows and all later plans, and the number of steps to skip in the first one.

        Past the end of the run, it is the last plan.
        """
        segment = self._segment_at(step)
        index = self.segments.index(segment)
        return [later.plan for later in self.segments[index:]], step - segment.start

    def cells(self, step: int) -> Int64Array:
        """Return the cells that all ranks together train on in a step, counted from 0. Shape (batch_size,)."""
        segment = self._segment_at(step)
        index, row = divmod(step - segment.start, segment.plan.steps_per_window)
        cells: Int64Array = segment.plan.window(index)[row] % REPEAT
        return cells

    def epochs_done(self, step: int) -> float:
        """Return how many epochs the first `step` steps are, with the completed fraction of the current one."""
        bounds = [0, *self.epoch_ends]
        epoch = int(np.searchsorted(bounds[1:-1], step, side="right"))
        # The run may stop within its last epoch: that epoch still counts with the length it would have had.
        full_length = sum(
            segment.plan.n_steps if segment is self.segments[-1] else segment.stop - segment.start
            for segment in self.segments
            if segment.plan.epoch == epoch
        )
        return epoch + (step - bounds[epoch]) / full_length

    def equivalent_steps(self, step: int) -> float:
        """Return how many steps of the run's first batch size hold as many cells as the first `step` steps.

        Learning rate schedules use it: they continue smoothly when the batch size changes.
        """
        return sum(size * n for size, n in self.history(step)) / self.segments[0].plan.batch_size

    def history(self, step: int) -> list[tuple[int, int]]:
        """Return the history of the first `step` steps, which `plan_run` needs to continue after them."""
        return _merge(
            (segment.plan.batch_size, min(segment.stop, step) - segment.start)
            for segment in self.segments
            if segment.start < step
        )

    def _segment_at(self, step: int) -> Segment:
        return next((segment for segment in self.segments if step < segment.stop), self.segments[-1])


def plan_run(
    cell_ids: Int64Array,
    *,
    batch_size: int,
    n_epochs: float,
    max_steps: int = -1,
    history: History = (),
    first_epoch: Mapping[str, Any] = MappingProxyType({}),
    balance: Balance | None = None,
    **order: Any,
) -> RunSchedule:
    """Plan all steps of a run: those trained before, as they were, and those that follow.

    Args:
        cell_ids: cells to train on, ascending, without repeats. Shape (cells,).
        batch_size: cells of a global step from now on.
        n_epochs: length of the run in epochs. For a fraction of an epoch, its steps are rounded up.
        max_steps: length of the run in steps. If above 0, it takes precedence over `n_epochs`.
        history: what earlier sessions trained; see `RunSchedule.history`.
        first_epoch: arguments of `plan_epoch` that replace those of `order` in the first epoch.
        balance: draws the cells of each epoch; by default an epoch visits each cell once.
        order: `seed` and the other arguments of `plan_epoch`.

    Returns:
        The schedule. Its first steps have the sizes in `history`, the others have `batch_size` cells.

    Raises:
        ValueError: the length is not above 0, or there are fewer cells than one step needs; see `plan_epoch`.

    Example:
        >>> import numpy as np
        >>> from scgpt_hf.cells.schedule.run import plan_run
        >>> schedule = plan_run(np.arange(95), batch_size=5, n_epochs=2, history=[(10, 4)], seed=0)
        >>> schedule.epoch_ends
        [15, 34]
        >>> [(segment.start, segment.stop) for segment in schedule.segments]
        [(0, 4), (4, 15), (15, 34)]
        >>> schedule.history(20)
        [(10, 4), (5, 16)]
    """
    if max_steps <= 0 and n_epochs <= 0:
        raise ValueError(f"expected num_train_epochs or max_steps above 0, found {n_epochs} and {max_steps}")
    segments: list[Segment] = []
    start, epoch, unvisited = 0, 0, cell_ids
    for size, until in _batch_sizes(history, batch_size):
        while start < until and (start < max_steps if max_steps > 0 else epoch < n_epochs):
            if unvisited is not cell_ids and len(unvisited) < size:
                # What is left of this epoch does not fill one step: these are the epoch's dropped cells.
                epoch, unvisited = epoch + 1, cell_ids
                continue
            arguments = {**order, **first_epoch} if epoch == 0 else order
            if balance is not None and unvisited is cell_ids:
                plan: EpochPlan = plan_balanced(balance, epoch=epoch, batch_size=size, **arguments)
            else:
                plan = plan_epoch(unvisited, epoch=epoch, batch_size=size, **arguments)
            stop = int(min(start + plan.n_steps, until))
            segments.append(Segment(plan, start, stop))
            if stop - start == plan.n_steps:
                epoch, unvisited = epoch + 1, cell_ids
            else:
                unvisited = unvisited_cells(plan, stop - start)
            start = stop
    n_steps = max_steps if max_steps > 0 else _n_steps(segments, n_epochs)
    kept = tuple(replace(segment, stop=min(segment.stop, n_steps)) for segment in segments if segment.start < n_steps)
    return RunSchedule(kept, sum(n for _, n in history))


def unvisited_cells(plan: EpochPlan, n_steps: int) -> Int64Array:
    """Return the cells, or draws, of a plan that its first `n_steps` steps do not visit, ascending."""
    plan = plan.drawn
    unvisited = np.ones(len(plan.cell_ids), dtype=bool)
    for index in range(-(-n_steps // plan.steps_per_window)):
        visited = plan.window(index)[: n_steps - index * plan.steps_per_window]
        unvisited[np.searchsorted(plan.cell_ids, visited)] = False
    return plan.cell_ids[unvisited]


def _n_steps(segments: Sequence[Segment], n_epochs: float) -> int:
    """Return the number of steps in `n_epochs` epochs; the segments cover all epochs that these touch, completely."""
    last_epoch = math.ceil(n_epochs) - 1
    start = next(segment.start for segment in segments if segment.plan.epoch == last_epoch)
    return start + math.ceil((segments[-1].stop - start) * (n_epochs - last_epoch))


def _batch_sizes(history: History, batch_size: int) -> list[tuple[int, float]]:
    """Return (cells of a step, step at which the next size takes over); the last size has no end."""
    # The step added for the current size makes `_merge` join it with the end of the history, if that has the same size:
    # a run that resumes unchanged continues its plan, and does not start another segment.
    sizes = _merge([*history, (batch_size, 1)])
    ends = list(accumulate(n for _, n in sizes))
    return [*((size, end) for (size, _), end in zip(sizes[:-1], ends[:-1], strict=True)), (batch_size, math.inf)]


def _merge(history: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the history without entries of no steps, and with neighbors of one size joined."""
    entries = groupby(((size, n) for size, n in history if n), key=lambda entry: entry[0])
    return [(size, sum(n for _, n in group)) for size, group in entries]
