"""Which plan each step of a run follows: one an epoch, and a new one for the rest of an epoch when the batch changes.

A run that resumes with another global batch has other steps from there on. What it trained on before is replayed from
a short history, (cells of a step, steps done with it), so that every cell of the epoch is still visited once.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, groupby, pairwise
from types import MappingProxyType
from typing import Any

import numpy as np

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.schedule.epoch import EpochPlan, plan_epoch

History = Sequence[tuple[int, int]]  # (cells of a global step, number of steps), in the order they were trained


@dataclass(frozen=True)
class Segment:
    """Steps of a run that follow one plan from its beginning: [first, last), counted from the start of the run."""

    plan: EpochPlan
    first: int
    last: int


@dataclass(frozen=True)
class RunSchedule:
    """All steps of a run, as segments end to end.

    Attributes:
        segments: in order; each begins where the one before ends.
        start: steps that earlier sessions trained.
    """

    segments: tuple[Segment, ...]
    start: int

    @property
    def n_steps(self) -> int:
        """Steps of the whole run."""
        return self.segments[-1].last

    @property
    def epoch_ends(self) -> list[int]:
        """Number of steps done when each epoch ends; the last one may end early."""
        inner = [segment.last for segment, after in pairwise(self.segments) if segment.plan.epoch != after.plan.epoch]
        return [*inner, self.n_steps]

    @property
    def longest_epoch(self) -> int:
        """Steps of the longest epoch."""
        return max(last - first for first, last in pairwise([0, *self.epoch_ends]))

    def plan_at(self, step: int) -> EpochPlan:
        """Return the plan of step number `step`, counted from 0; past the end, of the last one."""
        return self._segment_at(step).plan

    def epochs_done(self, step: int) -> float:
        """Return how many epochs `step` steps are, with the part done of the one under way."""
        bounds = [0, *self.epoch_ends]
        epoch = int(np.searchsorted(bounds[1:-1], step, side="right"))
        full = sum(
            segment.plan.n_steps if segment is self.segments[-1] else segment.last - segment.first
            for segment in self._epoch(epoch)
        )
        return epoch + (step - bounds[epoch]) / full

    @property
    def has_changed(self) -> bool:
        """Whether steps differ in size."""
        return len(self.history(self.n_steps)) > 1

    def steps_of_first_size(self, step: int) -> float:
        """Return how many steps as large as the first would hold the cells of the first `step` steps."""
        return sum(size * n for size, n in self.history(step)) / self.segments[0].plan.batch_size

    def cells(self, step: int) -> Int64Array:
        """Return the cells of all ranks that step number `step`, counted from 0, trains on. Shape (batch_size,)."""
        segment = self._segment_at(step)
        index, row = divmod(step - segment.first, segment.plan.steps_per_window)
        cells: Int64Array = segment.plan.window(index)[row]
        return cells

    def plans_from(self, step: int) -> tuple[list[EpochPlan], int]:
        """Return the plans from step number `step` on, and how many steps of the first were done before."""
        segment = self._segment_at(step)
        return [other.plan for other in self.segments[self.segments.index(segment) :]], step - segment.first

    def history(self, step: int) -> list[tuple[int, int]]:
        """Return what the first `step` steps were, as `plan_run` reads it."""
        return _merged(
            (segment.plan.batch_size, min(segment.last, step) - segment.first)
            for segment in self.segments
            if segment.first < step
        )

    def _segment_at(self, step: int) -> Segment:
        return next((segment for segment in self.segments if step < segment.last), self.segments[-1])

    def _epoch(self, epoch: int) -> list[Segment]:
        return [segment for segment in self.segments if segment.plan.epoch == epoch]


def plan_run(
    cell_ids: Int64Array,
    *,
    batch_size: int,
    n_epochs: float,
    max_steps: int = -1,
    history: History = (),
    first_epoch: Mapping[str, Any] = MappingProxyType({}),
    **order: Any,
) -> RunSchedule:
    """Return the schedule of a run: which cells each of its steps trains on.

    Args:
        cell_ids: cells to train on, ascending, no repeats. Shape (cells,).
        batch_size: cells of a global step from now on.
        n_epochs: length of the run; of a fraction, the steps are rounded up.
        max_steps: length of the run in steps, which wins if above 0.
        history: what earlier sessions trained.
        first_epoch: arguments of `plan_epoch` that hold for the first epoch alone.
        order: seed and the other arguments of `plan_epoch`.

    Raises:
        ValueError: no epoch, or fewer cells than one step needs; see `plan_epoch`.
    """
    if max_steps <= 0 and n_epochs <= 0:
        raise ValueError(f"expected num_train_epochs or max_steps above 0, found {n_epochs} and {max_steps}")
    segments: list[Segment] = []
    spans = iter(_spans(history, batch_size))
    size, until = next(spans)
    first, epoch, left = 0, 0, cell_ids
    while first < max_steps if max_steps > 0 else epoch < n_epochs:
        if left is not cell_ids and len(left) < size:  # the rest of an epoch fills no step of the new size
            epoch, left = epoch + 1, cell_ids
            continue
        plan = plan_epoch(left, epoch=epoch, batch_size=size, **{**order, **(first_epoch if epoch == 0 else {})})
        last = int(min(first + plan.n_steps, until))
        segments.append(Segment(plan, first, last))
        whole = last == first + plan.n_steps
        epoch, left = (epoch + 1, cell_ids) if whole else (epoch, cells_left(plan, last - first))
        if last == until:
            size, until = next(spans)
        first = last
    n_steps = max_steps if max_steps > 0 else _steps_of(segments, n_epochs)
    kept = tuple(replace(segment, last=min(segment.last, n_steps)) for segment in segments if segment.first < n_steps)
    return RunSchedule(kept, sum(n for _, n in history))


def cells_left(plan: EpochPlan, n_steps: int) -> Int64Array:
    """Return the cells that the first `n_steps` steps of a plan do not visit, ascending."""
    kept = np.ones(len(plan.cell_ids), dtype=bool)
    for index in range(-(-n_steps // plan.steps_per_window)):
        visited = plan.window(index)[: n_steps - index * plan.steps_per_window]
        kept[np.searchsorted(plan.cell_ids, visited)] = False
    return plan.cell_ids[kept]


def _steps_of(segments: Sequence[Segment], n_epochs: float) -> int:
    """Return the steps of `n_epochs` epochs, of which the segments are the whole ones and all of the last."""
    whole = math.ceil(n_epochs) - 1
    begins = next(segment.first for segment in segments if segment.plan.epoch == whole)
    return begins + math.ceil((segments[-1].last - begins) * (n_epochs - whole))


def _spans(history: History, batch_size: int) -> list[tuple[int, float]]:
    """Return (cells of a step, the step at which another size takes over), the last without end."""
    spans = _merged([*history, (batch_size, 1)])
    ends = list(accumulate(n for _, n in spans))
    return [*zip([size for size, _ in spans[:-1]], ends[:-1], strict=True), (batch_size, math.inf)]


def _merged(history: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the history without empty spans, neighbours of one size joined."""
    spans = groupby(((size, n) for size, n in history if n), key=lambda span: span[0])
    return [(size, sum(n for _, n in group)) for size, group in spans]
