"""Compare the counts of cells with the totals that a Census stores in obs.

For each cell, obs of a Census has the number of expressed genes (`nnz`) and the sum of the raw counts (`raw_sum`). The
files of X have no checksums. A flipped bit, or a fragment that was not copied, can therefore give other cell ids or
counts without an error, in TileDB and in the native reader alike. The totals reveal both.

Totals are read in blocks of as many cells as a tile of obs has, because a smaller range takes TileDB as long. They are
kept, 8 bytes per cell, so that each tile is read once.
"""

from collections.abc import Callable, Sequence

import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.soma.chunks import Chunk

TOTALS = ("nnz", "raw_sum")
CELLS_PER_BLOCK = 2**16  # a multiple of a chunk
# float32 keeps the totals to this relative precision, which is below 1 up to 16,777,216.
_TOLERANCE = 2.0**-24


def has_totals(schema: pa.Schema, layer: str) -> bool:
    """Return whether obs has the totals of a layer of X; a Census has those of "raw"."""
    numeric = (pa.types.is_integer, pa.types.is_floating)
    return layer == "raw" and all(
        name in schema.names and any(test(schema.field(name).type) for test in numeric) for name in TOTALS
    )


class ObsTotals:
    """The totals of the cells of a Census, read when they are needed first. Several threads may share them."""

    def __init__(self, read: Callable[[slice | pa.Array, Sequence[str]], pd.DataFrame], n_cells: int) -> None:
        """Read nothing yet.

        Args:
            read: returns columns of obs, indexed by cell id, for a range or a list of ids.
            n_cells: the largest cell id plus 1.
        """
        self._read, self._n_cells = read, n_cells
        self._blocks: dict[int, NDArray[np.float32]] = {}

    def missing_blocks(self, cell_ids: Int64Array) -> list[int]:
        """Return the blocks of these ascending ids that `load` has not read yet."""
        edges = np.flatnonzero(np.diff(cell_ids // CELLS_PER_BLOCK, prepend=-1))
        return [int(block) for block in cell_ids[edges] // CELLS_PER_BLOCK if int(block) not in self._blocks]

    def load(self, block: int) -> None:
        """Read the totals of a block."""
        first = block * CELLS_PER_BLOCK
        stop = min(first + CELLS_PER_BLOCK, self._n_cells)
        rows = self._read(slice(first, stop - 1), TOTALS)
        totals = np.full((len(TOTALS), stop - first), np.nan, np.float32)
        totals[:, rows.index.to_numpy() - first] = rows[list(TOTALS)].to_numpy(np.float32).T
        self._blocks[block] = totals

    def find_wrong(self, chunk: Chunk, cell_ids: Int64Array) -> Int64Array:
        """Return the rows of a chunk whose counts do not have the totals of their cells.

        Args:
            chunk: raw counts.
            cell_ids: the ids of its cells, of one block that `load` has read. Shape (cells,).
        """
        block = int(cell_ids[0]) // CELLS_PER_BLOCK
        expected = self._blocks[block][:, cell_ids - block * CELLS_PER_BLOCK].astype(np.float64)
        found = np.stack([chunk.n_stored, chunk.sum_counts()])
        # every comparison with NaN, a missing total, is false
        return np.flatnonzero((np.abs(found - expected) > _TOLERANCE * expected).any(axis=0))

    def explain(self, chunk: Chunk, cell_ids: Int64Array, rows: Int64Array) -> str:
        """Return the sentence of an error for wrong rows of a chunk; see `find_wrong`."""
        row = rows[0]
        nnz, raw_sum = self._read(pa.array(cell_ids[[row]]), TOTALS)[list(TOTALS)].iloc[0].tolist()
        return (
            f"{len(rows):,} of {len(cell_ids):,} cells read have other counts than obs states, e.g. cell "
            f"{cell_ids[row]:,}: {chunk.n_stored[row]:,} genes with {chunk.sum_counts()[row]:,.0f} counts, but obs has "
            f"nnz {nnz:,.0f} and raw_sum {raw_sum:,.0f}"
        )
