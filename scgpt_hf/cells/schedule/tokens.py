"""Balance tokens between ranks: give each rank about the same number of tokens of every global step.

Cells of some data sets express five times as many genes as those of others. Each rank reads other chunks, so equal
numbers of cells would be very different numbers of tokens, and all ranks wait for the one with the most. Where obs
records how many genes a cell expresses, ranks get different numbers of cells instead:

    tokens of the cells of a step     3  3  3  1  1  1  1  1
    by cells, two ranks               rank 0 ^^^^ 10  rank 1: 4
    by tokens                         rank 0 ^^ 6     rank 1: 8

The cells of the step stay the same, and in the same order, for any number of ranks. So a rank still reads few chunks.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scgpt_hf.cells.block import AnyArray, Int64Array

REPEAT = 1 << 34
"""Difference between two draws of one cell; larger than every cell id (17 billion). `balance.py` makes such draws; the
number is here because that module imports `epoch.py`, which imports this one."""


@dataclass(frozen=True, eq=False)
class CellTokens:
    """About how many tokens each cell has.

    Attributes:
        by_id: tokens of the cell of each id. Shape (largest id + 1,).
    """

    by_id: NDArray[np.uint16]

    def of(self, cells: Int64Array) -> NDArray[np.uint16]:
        """Return the tokens of cells, or of draws, of any shape."""
        return self.by_id[cells % REPEAT]


def count_tokens(cell_ids: Int64Array, n_genes: Int64Array, max_tokens: int) -> CellTokens:
    """Return about how many tokens cells have: `<cls>`, and one for each gene that they express.

    Args:
        cell_ids: ids, ascending. Shape (cells,).
        n_genes: number of expressed genes of each cell. Shape (cells,).
        max_tokens: most tokens of a cell.

    Example:
        >>> count_tokens(np.array([1, 3]), np.array([500, 9000]), 1201).by_id.tolist()
        [0, 501, 0, 1201]
    """
    by_id = np.zeros(int(cell_ids[-1]) + 1, np.uint16)
    by_id[cell_ids] = np.minimum(n_genes + 1, min(max_tokens, np.iinfo(np.uint16).max))
    return CellTokens(by_id)


def cut_steps(tokens: AnyArray, world_size: int, least: int) -> Int64Array:
    """Cut the cells of each step into consecutive parts with about the same number of tokens, one for each rank.

    Args:
        tokens: tokens of the cells of each step. Shape (steps, cells).
        world_size: number of parts.
        least: fewest cells of a part; at most cells // world_size.

    Returns:
        The first cell of each part, then the number of cells. Shape (steps, world_size + 1).

    Example:
        >>> cut_steps(np.array([[3, 3, 3, 1, 1, 1, 1, 1]]), 2, 1).tolist()
        [[0, 2, 8]]
    """
    n_steps, n_cells = tokens.shape
    before = np.zeros((n_steps, n_cells + 1), np.int64)
    np.cumsum(tokens, axis=1, out=before[:, 1:])
    ranks = np.arange(world_size + 1)
    cuts = np.empty((n_steps, world_size + 1), np.int64)
    for row, totals in zip(cuts, before, strict=True):
        wanted = totals[-1] * ranks // world_size
        after = np.searchsorted(totals, wanted).clip(1)
        row[:] = after - (wanted - totals[after - 1] < totals[after] - wanted)
    # A part starts at least `least` cells after the one before, and leaves as many cells to each part behind it.
    cuts = np.maximum.accumulate(cuts - least * ranks, axis=1) + least * ranks
    cuts = np.clip(cuts, least * ranks, n_cells - least * ranks[::-1])
    cuts[:, 0] = 0
    cuts[:, -1] = n_cells
    return cuts
