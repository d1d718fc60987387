"""Plan one epoch: which cells each step trains on, and in which order.

A plan is a pure function of (cell ids, seed, epoch). It lists cells and reads nothing; `pipeline/` reads them. An
epoch is planned in four stages. Here with 24 cells, ids 0 to 23, chunks of 4 cells, 2 chunks to a shuffle window,
steps of 4 cells and 2 rank groups (seed 2; real chunks have 2,048 cells, and a window has 32 of them):

    1. chunks      Cut the sorted cell ids into aligned ranges, and shuffle the ranges.

                       [12-15] [20-23] [8-11] [16-19] [0-3] [4-7]

    2. windows     Lay the chunks end to end, and cut them into shuffle windows of a fixed number of steps.

                       window 0: [12-15 20-23]   window 1: [8-11 16-19]   window 2: [0-3 4-7]

    3. rank groups Cut each window into consecutive groups of cells, and shuffle the cells within each group.

                       window 0:   group 0: 14 13 12 15   group 1: 22 23 21 20

    4. steps       Each group fills its own columns of all steps of the window.

                       window 0:             group 0   group 1
                                    step 0    14 13     22 23
                                    step 1    12 15     21 20

With one process, step 0 trains on 14, 13, 22 and 23. With two, rank 0 takes the columns of group 0 and rank 1 those
of group 1: the step has the same cells, and each rank reads one chunk of the window.

Why chunks: cells are read several times faster in aligned ranges than one by one (see `CHUNK_SIZE`). Why windows: all
cells of a window are in memory together, so a window bounds the memory and yet mixes many donors into each step.
Why rank groups: without them each rank would need cells of every chunk, and N processes would read the data N times.
There is one for 64 cells of a step, and a window has more cells where a step has many, so a rank reads as few chunks
among 512 ranks as among 4.
Why lazily: only the chunks are laid out in advance (80,000 of them for 160 million cells), and the cells of a window
are computed when that window is read.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scgpt_hf.cells.block import CHUNK_SIZE, Int64Array, to_offsets
from scgpt_hf.cells.schedule.tokens import CellTokens, cut_steps

_FEWEST_GROUPS = 4
# Cells of a step in one rank group: few, so that ranks do not share a group, and thereby the chunks that they read.
_CELLS_PER_GROUP = 64
# A larger step has a larger window, with as many steps as with this number of cells. So each group still has the cells
# of four chunks: of the chunks at its ends, two ranks read each its part.
_CELLS_PER_STEP = 512

# Ids scanned together when chunks are located, so that a memory map of any size needs 32 MiB of int64.
_IDS_PER_SCAN = 1 << 22


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The shuffled order of one epoch, as shuffle windows of global steps. Create it with `plan_epoch`.

    Attributes:
        cell_ids: cells to train on, ascending. Shape (cells,).
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        batch_size: cells of one global step, over all ranks.
        steps_per_window: steps of each window; the last window may have fewer.
        rank_groups: consecutive groups of cells in each window; see the module docstring.
        chunk_starts: position in `cell_ids` at which each chunk starts, chunks in shuffled order. Shape (chunks,).
        chunk_offsets: position at which each chunk starts once the shuffled chunks are laid end to end, then the
            number of cells. Shape (chunks + 1,).
        tokens: about how many tokens the cells have, to share out each step between ranks; None shares it equally.
    """

    cell_ids: Int64Array
    seed: int
    epoch: int
    batch_size: int
    steps_per_window: int
    rank_groups: int
    chunk_starts: Int64Array
    chunk_offsets: Int64Array
    tokens: CellTokens | None

    @property
    def n_steps(self) -> int:
        """Number of global steps in the epoch."""
        return len(self.cell_ids) // self.batch_size

    @property
    def n_windows(self) -> int:
        """Number of shuffle windows in the epoch. It is the same in every epoch over the same cells."""
        return -(-self.n_steps // self.steps_per_window)

    @property
    def n_dropped(self) -> int:
        """Number of cells left out because they fill no step: fewer than `batch_size`, and others in each epoch."""
        return len(self.cell_ids) % self.batch_size

    @property
    def drawn(self) -> "EpochPlan":
        """The plan of what the epoch visits: itself, as every cell is visited once; see `balance.BalancedPlan`."""
        return self

    def window(self, index: int) -> Int64Array:
        """Return the cells of one shuffle window, one row for each global step.

        Args:
            index: number of the window, in [0, n_windows).

        Returns:
            Cell ids of all ranks, shape (steps, batch_size). Rank group g fills the columns from
            g * batch_size // rank_groups to (g + 1) * batch_size // rank_groups.

        Raises:
            IndexError: `index` is out of range.
        """
        _require_window(index, self.n_windows)
        # index + 1, because numpy pads seeds with zeros: [seed, epoch, 0] would repeat the numbers of [seed, epoch],
        # which shuffled the chunks.
        rng = np.random.default_rng([self.seed, self.epoch, index + 1])
        cells = self._cells_of_window(index)
        n_steps, surplus = divmod(len(cells), self.batch_size)
        if surplus:
            # Only the last window has a surplus. Its chunks differ in each epoch, and so do the dropped cells.
            cells = np.delete(cells, rng.choice(len(cells), surplus, replace=False))
        steps = np.empty((n_steps, self.batch_size), np.int64)
        edges = [group * self.batch_size // self.rank_groups for group in range(self.rank_groups + 1)]
        for start, stop in pairwise(edges):
            group = cells[start * n_steps : stop * n_steps]
            steps[:, start:stop] = rng.permutation(group).reshape(n_steps, stop - start)
        return steps

    def steps(self, index: int, *, rank: int = 0, world_size: int = 1, micro_batches: int = 1) -> list[Int64Array]:
        """Return the cells that one rank trains on in each step of a window: its columns of `window(index)`.

        Args:
            index: number of the window, in [0, n_windows).
            rank: number of the process, in [0, world_size).
            world_size: number of processes.
            micro_batches: micro-batches that each rank makes of its cells of a step; each of them needs a cell.

        Returns:
            One array for each step, shape (batch_size // world_size,), or with `tokens` about as many.

        Raises:
            IndexError: `index` is out of range.
            ValueError: `rank` is out of range, or `batch_size` is not a multiple of `world_size`.
        """
        columns, window = rank_columns(self.batch_size, rank, world_size), self.window(index)
        if self.tokens is None or world_size == 1:
            return list(np.ascontiguousarray(window[:, columns]))
        cuts = self.cut(window, world_size, micro_batches)[:, rank : rank + 2].tolist()
        return [step[start:stop].copy() for step, (start, stop) in zip(window, cuts, strict=True)]

    def cut(self, window: Int64Array, world_size: int, micro_batches: int = 1) -> Int64Array:
        """Return where the steps of a window are cut into the cells of one rank after the other.

        Args:
            window: see `window`. Shape (steps, batch_size).
            world_size: number of processes.
            micro_batches: see `steps`.

        Returns:
            The first cell of each rank, then the number of cells. Shape (steps, world_size + 1).
        """
        width = self.batch_size // world_size
        if self.tokens is None:
            return np.tile(np.arange(world_size + 1) * width, (len(window), 1))
        return cut_steps(self.tokens.of(window), world_size, max(micro_batches, width // 4))

    def _cells_of_window(self, index: int) -> Int64Array:
        """Return the window's cells in the order of the shuffled chunks; the last window includes the surplus."""
        cells_per_window = self.steps_per_window * self.batch_size
        first = index * cells_per_window
        last = len(self.cell_ids) if index == self.n_windows - 1 else first + cells_per_window
        # A window may start or stop within a chunk: its first and last chunks are clipped to [first, last).
        lowest = np.searchsorted(self.chunk_offsets, first, side="right") - 1
        highest = np.searchsorted(self.chunk_offsets, last, side="left")
        offsets = self.chunk_offsets[lowest : highest + 1]
        shifts = self.chunk_starts[lowest:highest] - offsets[:-1]
        starts = np.maximum(offsets[:-1], first) + shifts
        stops = np.minimum(offsets[1:], last) + shifts
        return np.concatenate([self.cell_ids[start:stop] for start, stop in zip(starts, stops, strict=True)])


@dataclass(frozen=True, eq=False)
class ValidationPlan:
    """Every cell exactly once, in ascending order. Create it with `plan_validation`.

    It has the interface of `EpochPlan`, so that one pipeline reads both.

    Attributes:
        cell_ids: cells to validate on, ascending. Shape (cells,).
        batch_size: cells of one step of one rank; the very last step may have fewer.
        steps_per_window: steps of each window; the last window may have fewer.
        n_dropped: always 0.
        epoch: always 0, so that every validation masks the same genes.
    """

    cell_ids: Int64Array
    batch_size: int
    steps_per_window: int
    n_dropped: int = 0
    epoch: int = 0

    @property
    def n_steps(self) -> int:
        """Number of steps, of all ranks together."""
        return -(-len(self.cell_ids) // self.batch_size)

    @property
    def n_windows(self) -> int:
        """Number of windows, of all ranks together."""
        return -(-self.n_steps // self.steps_per_window)

    def steps(self, index: int, *, rank: int = 0, world_size: int = 1, micro_batches: int = 1) -> list[Int64Array]:
        """Return the cells of each step of a window that belongs to one rank.

        Steps are distributed round-robin: rank r takes the steps r, r + world_size, r + 2 * world_size and so on,
        counted through all windows. One rank may have a step more than another.

        Args:
            index: number of the window, in [0, n_windows).
            rank: number of the process, in [0, world_size).
            world_size: number of processes.
            micro_batches: not used; see `EpochPlan.steps`.

        Returns:
            One array for each step, shape (batch_size,).

        Raises:
            IndexError: `index` is out of range.
            ValueError: `rank` is out of range.
        """
        _require_window(index, self.n_windows)
        _require_rank(rank, world_size)
        first = index * self.steps_per_window
        last = min(first + self.steps_per_window, self.n_steps)
        own_steps = range(first + (rank - first) % world_size, last, world_size)
        return [self.cell_ids[step * self.batch_size : (step + 1) * self.batch_size] for step in own_steps]


Plan = EpochPlan | ValidationPlan


def plan_epoch(
    cell_ids: Int64Array,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    chunk_size: int = CHUNK_SIZE,
    chunks_per_window: int = 32,
    rank_groups: int | None = None,
    tokens: CellTokens | None = None,
) -> EpochPlan:
    """Plan the order in which one epoch visits the cells.

    Each cell is visited at most once. Fewer than `batch_size` cells, chosen at random, fill no step and are dropped.

    A window holds as many complete steps as fit into chunks_per_window * chunk_size cells, and at least one step. That
    is a number of cells, not of chunks: where a filter leaves few cells of each chunk, a window spans more chunks, and
    its memory stays the same. With steps of more than 512 cells, it holds as many steps as with 512, by default 128: a
    rank that trains on n cells of a step then holds 128 * n cells.

    Args:
        cell_ids: cells to train on, ascending, without repeats. Shape (cells,). Not copied; may be a memory map.
        seed: seed of the run.
        epoch: number of the epoch, from 0.
        batch_size: cells of one global step, over all ranks.
        chunk_size: cells of one aligned read.
        chunks_per_window: full chunks whose cells are shuffled together. The default gives a batch of 32 cells 88 % of
            the donor entropy of uniformly sampled cells (100 donors in contiguous runs; a test asserts it).
        rank_groups: number of ranks that share a window without reading a chunk twice; any divisor of it will do. By
            default one for 64 cells of a step, and at least 4.
        tokens: see `EpochPlan`.

    Returns:
        The plan: n_steps steps of batch_size cells.

    Raises:
        ValueError: the ids do not ascend, there are fewer cells than one step needs, or a number is out of range.

    Example:
        >>> import numpy as np
        >>> from scgpt_hf.cells.schedule.epoch import plan_epoch
        >>> plan = plan_epoch(
        ...     np.arange(24), seed=2, epoch=0, batch_size=4, chunk_size=4, chunks_per_window=2, rank_groups=2
        ... )
        >>> plan.n_windows, plan.n_steps
        (3, 6)
        >>> plan.window(0).tolist()
        [[14, 13, 22, 23], [12, 15, 21, 20]]
        >>> [cells.tolist() for cells in plan.steps(0, rank=1, world_size=2)]
        [[22, 23], [21, 20]]
    """
    _require_at_least(1, batch_size=batch_size, chunk_size=chunk_size, chunks_per_window=chunks_per_window)
    if rank_groups is None:  # a multiple of 4, as there are often 4 or 8 ranks on a machine
        rank_groups = max(_FEWEST_GROUPS, batch_size // _CELLS_PER_GROUP // _FEWEST_GROUPS * _FEWEST_GROUPS)
    _require_at_least(1, rank_groups=rank_groups)
    _require_at_least(0, seed=seed, epoch=epoch)
    if len(cell_ids) < batch_size:
        raise ValueError(
            f"found {len(cell_ids):,} cells, expected at least the {batch_size:,} of one step; "
            "choose more cells or a smaller batch size"
        )
    starts = _find_chunks(cell_ids, chunk_size)
    order = np.random.default_rng([seed, epoch]).permutation(len(starts))
    lengths = np.diff(starts, append=len(cell_ids))[order]
    steps_per_window = max(1, chunks_per_window * chunk_size // min(batch_size, _CELLS_PER_STEP))
    offsets = to_offsets(lengths)
    return EpochPlan(cell_ids, seed, epoch, batch_size, steps_per_window, rank_groups, starts[order], offsets, tokens)


def plan_validation(cell_ids: Int64Array, batch_size: int, *, cells_per_window: int = 4 * CHUNK_SIZE) -> ValidationPlan:
    """Plan a pass that visits every cell exactly once, in ascending order.

    Args:
        cell_ids: cells to validate on, ascending, without repeats. Shape (cells,). Not copied.
        batch_size: cells of one step of one rank.
        cells_per_window: cells read together; a window holds as many complete steps as fit, and at least one.

    Returns:
        The plan; its last step may have fewer than `batch_size` cells.

    Raises:
        ValueError: there are no cells, the ids do not ascend, or a number is out of range.
    """
    _require_at_least(1, batch_size=batch_size, cells_per_window=cells_per_window)
    if not len(cell_ids):
        raise ValueError("found no cells to validate on; give the validation part of the split at least one donor")
    _find_chunks(cell_ids, CHUNK_SIZE)  # only to check the ids: without a shuffle, chunks make no difference
    return ValidationPlan(cell_ids, batch_size, max(1, cells_per_window // batch_size))


def list_windows(plans: Sequence[Plan]) -> list[tuple[int, int, int, int]]:
    """List all windows of consecutive plans.

    Returns:
        One tuple for each window: (position of its plan in `plans`, index of the window in that plan, its first step,
        one past its last step). Steps are counted from the start of the first plan.
    """
    windows = []
    first = 0
    for number, plan in enumerate(plans):
        for index in range(plan.n_windows):
            last = first + min(plan.steps_per_window, plan.n_steps - index * plan.steps_per_window)
            windows.append((number, index, first, last))
            first = last
    return windows


def rank_columns(batch_size: int, rank: int, world_size: int) -> slice:
    """Return the columns of a global step that one rank trains on; every rank has the same number.

    Raises:
        ValueError: `rank` is out of range, or `batch_size` is not a multiple of `world_size`.
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
    """Return the positions at which a new chunk starts, shape (chunks,). Raise ValueError unless the ids ascend."""
    if cell_ids.ndim != 1 or cell_ids.dtype != np.int64:
        raise ValueError(f"expected int64 cell ids of shape (cells,), found {cell_ids.dtype} of shape {cell_ids.shape}")
    starts = [np.zeros(1, np.int64)]
    for first in range(0, len(cell_ids) - 1, _IDS_PER_SCAN):
        # One id more than the scan is long: neighbors on either side of a scan's edge are compared as well.
        ids = cell_ids[first : first + _IDS_PER_SCAN + 1]
        descents = np.flatnonzero(ids[1:] <= ids[:-1])
        if len(descents):
            before, after = ids[descents[0] : descents[0] + 2]
            raise ValueError(f"expected ascending cell ids, found {before} before {after}; pass them through np.unique")
        chunks = ids // chunk_size
        starts.append(first + 1 + np.flatnonzero(chunks[1:] != chunks[:-1]))
    return np.concatenate(starts)


def _require_window(index: int, n_windows: int) -> None:
    if not 0 <= index < n_windows:
        raise IndexError(f"expected the index of a window in [0, {n_windows}), found {index}")


def _require_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"expected a rank in [0, {world_size}), found {rank}")


def _require_at_least(lowest: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < lowest:
            raise ValueError(f"expected {name} >= {lowest}, found {number}")
