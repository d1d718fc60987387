"""The raw counts of each cell, kept beside its tokens as targets of the `counts` objective.

Tokens are a sample of a cell's genes, and some are masked. The count decoder explains all genes that the vocabulary
knows, so a batch carries their counts in full, in sparse form.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .counts_scgpt import SparseCounts, to_offsets
from .randomness_scgpt import Int64Array


@dataclass(frozen=True, eq=False)
class CountTargets:
    """Known expressed genes of many cells and their raw counts, end to end.

    Attributes:
        ids: vocabulary ids, int64 (entries,).
        counts: raw counts, > 0, float32 (entries,).
        indptr: offsets of each cell, int64 (cells + 1,), from 0.
    """

    ids: Int64Array
    counts: npt.NDArray[np.float32]
    indptr: Int64Array

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, cells: slice) -> "CountTargets":
        """Return consecutive cells as views: `targets[2:5]`."""
        first, last, _ = cells.indices(len(self))
        start, stop = self.indptr[first], self.indptr[max(first, last)]
        return CountTargets(self.ids[start:stop], self.counts[start:stop], self.indptr[first : last + 1] - start)

    def keep(self, cells: npt.NDArray[np.bool_]) -> "CountTargets":
        """Return only the cells for which `cells`, bool (cells,), is true."""
        lengths = np.diff(self.indptr)
        entries = np.repeat(cells, lengths)
        return CountTargets(self.ids[entries], self.counts[entries], to_offsets(lengths[cells]))

    def as_batch(self, n_entries: int | None = None) -> dict[str, Any]:
        """Return `count_ids`, `count_values` and `count_cells`, as `ScGPTForPreTraining.forward` takes them.

        Args:
            n_entries: lengthen the tensors to this number of entries by counts of 0 in the last cell.
        """
        n_added = 0 if n_entries is None else n_entries - len(self.ids)
        cells = np.repeat(np.arange(len(self)), np.diff(self.indptr))
        return {
            "count_ids": torch.from_numpy(np.pad(self.ids, (0, n_added))),
            "count_values": torch.from_numpy(np.pad(self.counts, (0, n_added))),
            "count_cells": torch.from_numpy(np.pad(cells, (0, n_added), constant_values=len(self) - 1)),
        }


def gather_count_targets(counts: SparseCounts, gene_ids: Int64Array) -> CountTargets:
    """Return the counts of the known genes of each cell, in the order of the columns.

    Args:
        counts: raw counts in CSR form. Shape (cells, genes).
        gene_ids: vocabulary id of each column, −1 where unknown. Shape (genes,).
    """
    ids = gene_ids[counts.indices]
    known = (ids >= 0) & (counts.data > 0)
    n_before = to_offsets(known)
    indptr = n_before[counts.indptr] - n_before[counts.indptr[0]]
    return CountTargets(ids[known], counts.data[known].astype(np.float32), indptr)
