"""Which cells each step trains on, and in which order: pure functions of (cell ids, seed, epoch).

A plan names cells and reads none; `stream.py` reads what it names. The cells of a global step are the same for every
number of ranks. Only chunks are laid out up front (80,000 for 160 million cells); a block is worked out when asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.soma.layout import TILE

CHUNK_SIZE = TILE  # cells of one tile of X, and so of the aligned chunk that is cheapest to read
# Ids looked at together when chunks are found: 32 MiB of int64, whatever the number of cells.
_SCANNED_TOGETHER = 1 << 22


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The shuffled order of one epoch, in blocks of `steps_per_window` steps; the last block may be shorter.

    `chunk_starts` (chunks,) says where each chunk begins in `cell_ids`, chunks in shuffled order; `chunk_bounds`
    (chunks + 1,) where it begins and ends when the chunks are laid end to end.
    """

    cell_ids: Int64Array
    seed: int
    epoch: int
    batch_size: int
    steps_per_window: int
    rank_groups: int
    chunk_starts: Int64Array
    chunk_bounds: Int64Array

    @property
    def n_steps(self) -> int:
        """Global steps of the epoch."""
        return len(self.cell_ids) // self.batch_size

    @property
    def n_windows(self) -> int:
        """Blocks of the epoch: as many in every epoch over the same cells."""
        return -(-self.n_steps // self.steps_per_window)

    @property
    def n_dropped(self) -> int:
        """Cells left out because they do not fill a step: fewer than `batch_size`, others each epoch."""
        return len(self.cell_ids) % self.batch_size

    def window(self, index: int) -> Int64Array:
        """Return the cells of one block, shape (steps, batch_size): global step s of the block trains on row s.

        The block's cells are cut into `rank_groups` consecutive parts; rank_group l, shuffled within itself, fills the
        columns [l * batch_size // rank_groups, (l + 1) * batch_size // rank_groups). So the columns of one rank
        touch few chunks.

        Raises:
            IndexError: there is no such block.
        """
        _require_window(index, self.n_windows)
        # Not [seed, epoch, index]: numpy pads with zeros, so block 0 would repeat the stream that shuffled the chunks.
        rng = np.random.default_rng([self.seed, self.epoch, index + 1])
        cells = self._cells_of_window(index)
        n_steps, surplus = divmod(len(cells), self.batch_size)
        if surplus:
            cells = np.delete(cells, rng.choice(len(cells), surplus, replace=False))
        steps = np.empty((n_steps, self.batch_size), np.int64)
        for start, stop in pairwise(
            rank_group * self.batch_size // self.rank_groups for rank_group in range(self.rank_groups + 1)
        ):
            group_cells = cells[start * n_steps : stop * n_steps]
            steps[:, start:stop] = rng.permutation(group_cells).reshape(n_steps, stop - start)
        return steps

    def steps(self, index: int, *, rank: int = 0, world_size: int = 1) -> list[Int64Array]:
        """Return what one rank trains on in each step of a block: its columns of `block(index)`.

        Raises:
            IndexError: there is no such block.
            ValueError: there is no such rank, or `world_size` does not divide `batch_size`.
        """
        columns = rank_columns(self.batch_size, rank, world_size)
        return list(np.ascontiguousarray(self.window(index)[:, columns]))

    def _cells_of_window(self, index: int) -> Int64Array:
        """Return the block's cells as the chunks lie end to end; the last block with the cells that fill no step."""
        first = index * self.steps_per_window * self.batch_size
        last = len(self.cell_ids) if index == self.n_windows - 1 else first + self.steps_per_window * self.batch_size
        lowest = np.searchsorted(self.chunk_bounds, first, side="right") - 1
        highest = np.searchsorted(self.chunk_bounds, last, side="left")
        bounds = self.chunk_bounds[lowest : highest + 1]
        shifts = self.chunk_starts[lowest:highest] - bounds[:-1]
        starts = np.maximum(bounds[:-1], first) + shifts
        stops = np.minimum(bounds[1:], last) + shifts
        return np.concatenate([self.cell_ids[start:stop] for start, stop in zip(starts, stops, strict=True)])


@dataclass(frozen=True, eq=False)
class ValidationPlan:
    """Every cell exactly once, ascending, in blocks of `steps_per_window` steps; the very last step may be short."""

    cell_ids: Int64Array
    batch_size: int
    steps_per_window: int
    n_dropped: int = 0
    epoch: int = 0

    @property
    def n_steps(self) -> int:
        """Steps over all ranks."""
        return -(-len(self.cell_ids) // self.batch_size)

    @property
    def n_windows(self) -> int:
        """Blocks over all ranks."""
        return -(-self.n_steps // self.steps_per_window)

    def steps(self, index: int, *, rank: int = 0, world_size: int = 1) -> list[Int64Array]:
        """Return the steps of a block that fall to one rank: of the whole pass, every `world_size`-th from `rank` on.

        Over the whole pass ranks may differ by one step.

        Raises:
            IndexError: there is no such block.
            ValueError: there is no such rank.
        """
        _require_window(index, self.n_windows)
        _require_rank(rank, world_size)
        first = index * self.steps_per_window
        last = min(first + self.steps_per_window, self.n_steps)
        mine = range(first + (rank - first) % world_size, last, world_size)
        return [self.cell_ids[step * self.batch_size : (step + 1) * self.batch_size] for step in mine]


Plan = EpochPlan | ValidationPlan


def plan_epoch(
    cell_ids: Int64Array,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    chunk_size: int = CHUNK_SIZE,
    chunks_per_window: int = 32,
    rank_groups: int = 4,
) -> EpochPlan:
    """Return the order in which one epoch visits the cells: each at most once, n_steps * batch_size of them.

    Aligned chunks (cell_id // chunk_size) are shuffled, laid end to end and cut into blocks; cells are shuffled within
    the block. A block holds as many whole steps as fit into chunks_per_window * chunk_size cells, and at least one,
    however few cells of each chunk a filter left: so memory is bounded. Cells that fill no step are dropped from the
    last block at random.

    Args:
        cell_ids: cells to train on, ascending, no repeats. Shape (cells,). Kept by reference; may be a memory map.
        seed: of the run.
        epoch: counted from 0.
        batch_size: cells of one global step, over all ranks.
        chunk_size: cells of one aligned read.
        chunks_per_window: full chunks whose cells are shuffled together.
        rank_groups: 1, 2 or 4 ranks, or any number that divides `rank_groups`, share a block without reading its chunks
            twice.

    Raises:
        ValueError: ids that do not ascend, fewer cells than one step needs, or a number out of range.
    """
    _require_at_least(
        1, batch_size=batch_size, chunk_size=chunk_size, chunks_per_window=chunks_per_window, rank_groups=rank_groups
    )
    _require_at_least(0, seed=seed, epoch=epoch)
    if len(cell_ids) < batch_size:
        raise ValueError(
            f"found {len(cell_ids):,} cells, expected at least the {batch_size:,} of one step; "
            "choose more cells or a smaller batch size"
        )
    starts = _find_chunks(cell_ids, chunk_size)
    order = np.random.default_rng([seed, epoch]).permutation(len(starts))
    lengths = np.diff(starts, append=len(cell_ids))[order]
    steps_per_window = max(1, chunks_per_window * chunk_size // batch_size)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return EpochPlan(cell_ids, seed, epoch, batch_size, steps_per_window, rank_groups, starts[order], bounds)


def plan_validation(cell_ids: Int64Array, batch_size: int, *, cells_per_window: int = 4 * CHUNK_SIZE) -> ValidationPlan:
    """Return the plan that visits every cell exactly once, in ascending order.

    Args:
        cell_ids: cells to validate on, ascending, no repeats. Shape (cells,). Kept by reference.
        batch_size: cells of one step of one rank.
        cells_per_window: a block holds as many whole steps as fit, and at least one.

    Raises:
        ValueError: no cells, ids that do not ascend, or a number out of range.
    """
    _require_at_least(1, batch_size=batch_size, cells_per_window=cells_per_window)
    if not len(cell_ids):
        raise ValueError("found no cells to validate on; give the validation part of the split at least one donor")
    _find_chunks(cell_ids, CHUNK_SIZE)
    return ValidationPlan(cell_ids, batch_size, max(1, cells_per_window // batch_size))


def list_windows(plans: Sequence[Plan]) -> list[tuple[int, int, int, int]]:
    """Return (plan, block, first step, one past the last step) of every block, steps counted through all plans."""
    blocks = []
    first = 0
    for number, plan in enumerate(plans):
        for block in range(plan.n_windows):
            last = min(first + plan.steps_per_window, first + plan.n_steps - block * plan.steps_per_window)
            blocks.append((number, block, first, last))
            first = last
    return blocks


def rank_columns(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the columns of a global step that one rank trains on, as many for every rank.

    Raises:
        ValueError: there is no such rank, or `batch_size` is no multiple of `world_size`.
    """
    _require_rank(rank, world_size)
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"{batch_size:,} cells of a step cannot be shared equally by {world_size} ranks; "
            f"choose a global batch size that is a multiple of {world_size}"
        )
    width = batch_size // world_size
    return slice(rank * width, (rank + 1) * width)


def _find_chunks(cell_ids: Int64Array, chunk_size: int) -> Int64Array:
    """Return the positions at which a new chunk begins, shape (chunks,); raises unless the ids ascend."""
    if cell_ids.ndim != 1 or cell_ids.dtype != np.int64:
        raise ValueError(f"expected int64 cell ids of shape (cells,), found {cell_ids.dtype} of shape {cell_ids.shape}")
    starts = [np.zeros(1, np.int64)]
    for first in range(0, len(cell_ids) - 1, _SCANNED_TOGETHER):
        ids = cell_ids[first : first + _SCANNED_TOGETHER + 1]
        descents = np.flatnonzero(ids[1:] <= ids[:-1])
        if len(descents):
            before, after = ids[descents[0] : descents[0] + 2]
            raise ValueError(f"expected ascending cell ids, found {before} before {after}; pass them through np.unique")
        chunks = ids // chunk_size
        starts.append(first + 1 + np.flatnonzero(chunks[1:] != chunks[:-1]))
    return np.concatenate(starts)


def _require_window(index: int, n_windows: int) -> None:
    if not 0 <= index < n_windows:
        raise IndexError(f"expected a block in [0, {n_windows}), found {index}")


def _require_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"expected a rank in [0, {world_size}), found {rank}")


def _require_at_least(lowest: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < lowest:
            raise ValueError(f"expected {name} >= {lowest}, found {number}")
