"""Targets that a batch carries beside its tokens: the counts of all genes, and masked genes that are no tokens.

Tokens are a sample of a cell's genes, and some are masked. The count decoder explains all genes that the vocabulary
knows, so a batch carries their counts in full, in sparse form. With `ScGPTConfig.leave_out_masked` the masked genes are
no tokens; they move to `MaskedGenes`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .counts_scgpt import SparseCounts, to_offsets
from .packing_scgpt import IGNORE, Tokens
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


@dataclass(frozen=True, eq=False)
class MaskedGenes:
    """The masked genes of many cells, end to end, after `leave_out_masked` has removed them from the tokens.

    Attributes:
        ids: vocabulary ids, int64 (masked,).
        values: true values, float32 (masked,).
        cells: position of the cell of each gene, int64 (masked,), ascending.
    """

    ids: Int64Array
    values: npt.NDArray[np.float32]
    cells: Int64Array

    def as_batch(self, n_entries: int | None = None) -> dict[str, Any]:
        """Return `labels`, `label_ids` and `label_cells`, as `ScGPTForPreTraining.forward` takes them.

        Args:
            n_entries: lengthen the tensors to this number of entries, by genes without a label.
        """
        n_added = 0 if n_entries is None else n_entries - len(self.ids)
        return {
            "labels": torch.from_numpy(np.pad(self.values, (0, n_added), constant_values=IGNORE)),
            "label_ids": torch.from_numpy(np.pad(self.ids, (0, n_added))),
            "label_cells": torch.from_numpy(np.pad(self.cells, (0, n_added))),
        }


def leave_out_masked(tokens: Tokens) -> tuple[Tokens, MaskedGenes]:
    """Split tokens into the visible ones, without labels, and the masked genes.

    Args:
        tokens: tokens with labels; at least one token of each cell is visible.

    Source: the encoder of a masked autoencoder, He et al. 2022, arXiv:2111.06377, which reads visible patches only.
    """
    assert tokens.labels is not None
    visible = tokens.labels == IGNORE
    cell_of_token = np.repeat(np.arange(len(tokens)), np.diff(tokens.indptr))
    masked = MaskedGenes(tokens.input_ids[~visible], tokens.labels[~visible], cell_of_token[~visible])
    indptr = to_offsets(visible)[tokens.indptr]
    return Tokens(tokens.input_ids[visible], tokens.values[visible], None, indptr, tokens.cell_ids), masked
