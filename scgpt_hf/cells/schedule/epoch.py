"""Which cells each step trains on, and in which order: pure functions of (cell ids, seed, epoch).

A plan names cells and reads none; `stream.py` reads what it names. The cells of a global step are the same for every
number of ranks. Only bands are laid out up front (80,000 for 160 million cells); a block is worked out when asked for.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.soma.layout import TILE

BAND_SIZE = TILE  # cells of one tile of X, and so of the aligned band that is cheapest to read
# Ids looked at together when bands are found: 32 MiB of int64, whatever the number of cells.
_SCANNED_TOGETHER = 1 << 22


@dataclass(frozen=True, eq=False)
class EpochPlan:
    """The shuffled order of one epoch, in blocks of `steps_per_block` steps; the last block may be shorter.

    `band_starts` (bands,) says where each band begins in `cell_ids`, bands in shuffled order; `band_bounds`
    (bands + 1,) where it begins and ends when the bands are laid end to end.
    """

    cell_ids: Int64Array
    seed: int
    epoch: int
    batch_size: int
    steps_per_block: int
    lanes: int
    band_starts: Int64Array
    band_bounds: Int64Array

    @property
    def n_steps(self) -> int:
        """Global steps of the epoch."""
        return len(self.cell_ids) // self.batch_size

    @property
    def n_blocks(self) -> int:
        """Blocks of the epoch: as many in every epoch over the same cells."""
        return -(-self.n_steps // self.steps_per_block)

    @property
    def n_dropped(self) -> int:
        """Cells left out because they do not fill a step: fewer than `batch_size`, others each epoch."""
        return len(self.cell_ids) % self.batch_size

    def block(self, index: int) -> Int64Array:
        """Return the cells of one block, shape (steps, batch_size): global step s of the block trains on row s.

        The block's cells are cut into `lanes` consecutive parts; lane l, shuffled within itself, fills the columns
        [l * batch_size // lanes, (l + 1) * batch_size // lanes). So the columns of one rank touch few bands.

        Raises:
            IndexError: there is no such block.
        """
        _require_block(index, self.n_blocks)
        # Not [seed, epoch, index]: numpy pads with zeros, so block 0 would repeat the stream that shuffled the bands.
        rng = np.random.default_rng([self.seed, self.epoch, index + 1])
        cells = self._laid_out(index)
        n_steps, surplus = divmod(len(cells), self.batch_size)
        if surplus:
            cells = np.delete(cells, rng.choice(len(cells), surplus, replace=False))
        steps = np.empty((n_steps, self.batch_size), np.int64)
        for start, stop in pairwise(lane * self.batch_size // self.lanes for lane in range(self.lanes + 1)):
            lane_cells = cells[start * n_steps : stop * n_steps]
            steps[:, start:stop] = rng.permutation(lane_cells).reshape(n_steps, stop - start)
        return steps

    def steps(self, index: int, *, rank: int = 0, world_size: int = 1) -> list[Int64Array]:
        """Return what one rank trains on in each step of a block: its columns of `block(index)`.

        Raises:
            IndexError: there is no such block.
            ValueError: there is no such rank, or `world_size` does not divide `batch_size`.
        """
        columns = rank_columns(self.batch_size, rank, world_size)
        return list(np.ascontiguousarray(self.block(index)[:, columns]))

    def _laid_out(self, index: int) -> Int64Array:
        """Return the block's cells as the bands lie end to end; the last block with the cells that fill no step."""
        first = index * self.steps_per_block * self.batch_size
        last = len(self.cell_ids) if index == self.n_blocks - 1 else first + self.steps_per_block * self.batch_size
        lowest = np.searchsorted(self.band_bounds, first, side="right") - 1
        highest = np.searchsorted(self.band_bounds, last, side="left")
        bounds = self.band_bounds[lowest : highest + 1]
        shifts = self.band_starts[lowest:highest] - bounds[:-1]
        starts = np.maximum(bounds[:-1], first) + shifts
        stops = np.minimum(bounds[1:], last) + shifts
        return np.concatenate([self.cell_ids[start:stop] for start, stop in zip(starts, stops, strict=True)])


@dataclass(frozen=True, eq=False)
class ValidationPlan:
    """Every cell exactly once, ascending, in blocks of `steps_per_block` steps; the very last step may be short."""

    cell_ids: Int64Array
    batch_size: int
    steps_per_block: int
    n_dropped: int = 0
    epoch: int = 0

    @property
    def n_steps(self) -> int:
        """Steps over all ranks."""
        return -(-len(self.cell_ids) // self.batch_size)

    @property
    def n_blocks(self) -> int:
        """Blocks over all ranks."""
        return -(-self.n_steps // self.steps_per_block)

    def steps(self, index: int, *, rank: int = 0, world_size: int = 1) -> list[Int64Array]:
        """Return the steps of a block that fall to one rank: of the whole pass, every `world_size`-th from `rank` on.

        Over the whole pass ranks may differ by one step.

        Raises:
            IndexError: there is no such block.
            ValueError: there is no such rank.
        """
        _require_block(index, self.n_blocks)
        _require_rank(rank, world_size)
        first = index * self.steps_per_block
        last = min(first + self.steps_per_block, self.n_steps)
        mine = range(first + (rank - first) % world_size, last, world_size)
        return [self.cell_ids[step * self.batch_size : (step + 1) * self.batch_size] for step in mine]


Plan = EpochPlan | ValidationPlan


def plan_epoch(
    cell_ids: Int64Array,
    *,
    seed: int,
    epoch: int,
    batch_size: int,
    band_size: int = BAND_SIZE,
    bands_per_block: int = 32,
    lanes: int = 4,
) -> EpochPlan:
    """Return the order in which one epoch visits the cells: each at most once, n_steps * batch_size of them.

    Aligned bands (cell_id // band_size) are shuffled, laid end to end and cut into blocks; cells are shuffled within
    the block. A block holds as many whole steps as fit into bands_per_block * band_size cells, and at least one,
    however few cells of each band a filter left: so memory is bounded. Cells that fill no step are dropped from the
    last block at random.

    Args:
        cell_ids: cells to train on, ascending, no repeats. Shape (cells,). Kept by reference; may be a memory map.
        seed: of the run.
        epoch: counted from 0.
        batch_size: cells of one global step, over all ranks.
        band_size: cells of one aligned read.
        bands_per_block: full bands whose cells are shuffled together.
        lanes: 1, 2 or 4 ranks, or any number that divides `lanes`, share a block without reading its bands twice.

    Raises:
        ValueError: ids that do not ascend, fewer cells than one step needs, or a number out of range.
    """
    _require_at_least(1, batch_size=batch_size, band_size=band_size, bands_per_block=bands_per_block, lanes=lanes)
    _require_at_least(0, seed=seed, epoch=epoch)
    if len(cell_ids) < batch_size:
        raise ValueError(
            f"found {len(cell_ids):,} cells, expected at least the {batch_size:,} of one step; "
            "choose more cells or a smaller batch size"
        )
    starts = _find_bands(cell_ids, band_size)
    order = np.random.default_rng([seed, epoch]).permutation(len(starts))
    lengths = np.diff(starts, append=len(cell_ids))[order]
    steps_per_block = max(1, bands_per_block * band_size // batch_size)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    return EpochPlan(cell_ids, seed, epoch, batch_size, steps_per_block, lanes, starts[order], bounds)


def plan_validation(cell_ids: Int64Array, batch_size: int, *, cells_per_block: int = 4 * BAND_SIZE) -> ValidationPlan:
    """Return the plan that visits every cell exactly once, in ascending order.

    Args:
        cell_ids: cells to validate on, ascending, no repeats. Shape (cells,). Kept by reference.
        batch_size: cells of one step of one rank.
        cells_per_block: a block holds as many whole steps as fit, and at least one.

    Raises:
        ValueError: no cells, ids that do not ascend, or a number out of range.
    """
    _require_at_least(1, batch_size=batch_size, cells_per_block=cells_per_block)
    if not len(cell_ids):
        raise ValueError("found no cells to validate on; give the validation part of the split at least one donor")
    _find_bands(cell_ids, BAND_SIZE)
    return ValidationPlan(cell_ids, batch_size, max(1, cells_per_block // batch_size))


def lay_out(plans: Sequence[Plan]) -> list[tuple[int, int, int, int]]:
    """Return (plan, block, first step, one past the last step) of every block, steps counted through all plans."""
    blocks = []
    first = 0
    for number, plan in enumerate(plans):
        for block in range(plan.n_blocks):
            last = min(first + plan.steps_per_block, first + plan.n_steps - block * plan.steps_per_block)
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


def _find_bands(cell_ids: Int64Array, band_size: int) -> Int64Array:
    """Return the positions at which a new band begins, shape (bands,); raises unless the ids ascend."""
    if cell_ids.ndim != 1 or cell_ids.dtype != np.int64:
        raise ValueError(f"expected int64 cell ids of shape (cells,), found {cell_ids.dtype} of shape {cell_ids.shape}")
    starts = [np.zeros(1, np.int64)]
    for first in range(0, len(cell_ids) - 1, _SCANNED_TOGETHER):
        ids = cell_ids[first : first + _SCANNED_TOGETHER + 1]
        descents = np.flatnonzero(ids[1:] <= ids[:-1])
        if len(descents):
            before, after = ids[descents[0] : descents[0] + 2]
            raise ValueError(f"expected ascending cell ids, found {before} before {after}; pass them through np.unique")
        bands = ids // band_size
        starts.append(first + 1 + np.flatnonzero(bands[1:] != bands[:-1]))
    return np.concatenate(starts)


def _require_block(index: int, n_blocks: int) -> None:
    if not 0 <= index < n_blocks:
        raise IndexError(f"expected a block in [0, {n_blocks}), found {index}")


def _require_rank(rank: int, world_size: int) -> None:
    if not 0 <= rank < world_size:
        raise ValueError(f"expected a rank in [0, {world_size}), found {rank}")


def _require_at_least(lowest: int, **numbers: int) -> None:
    for name, number in numbers.items():
        if number < lowest:
            raise ValueError(f"expected {name} >= {lowest}, found {number}")
