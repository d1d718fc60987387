"""Random cells in a cache, made without the libraries that read files: for a machine that has little but torch.

`synthetic_census.py` makes a Census with realistic genes; it needs tiledbsoma. The lengths here are those of
`synthetic_tokens.py`, and reading the cache takes the trainer through its whole data path.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from synthetic_tokens import sample_lengths

from scgpt_hf.cells.block import CHUNK_SIZE, CellBlock, gene_hash
from scgpt_hf.cells.cache.jobs import write_cache

_N_DIFFERENT = 4096  # cells that are sampled; the others repeat them, which does not affect the speed
_N_DONORS = 20


def write_cells(folder: Path, n_cells: int, mean_tokens: int, n_genes: int = 1200, seed: int = 0) -> Path:
    """Write random cells to a cache, and return its folder.

    Args:
        folder: folder to create.
        n_cells: number of cells.
        mean_tokens: mean number of tokens per cell, `<cls>` included.
        n_genes: number of genes.
        seed: seed of the cells.
    """
    write_cache(RandomCells(n_cells, mean_tokens, n_genes, seed), folder)
    return folder


class RandomCells:
    """A source of random cells with ids 0, 1, …; see `CellSource`."""

    chunk_size = CHUNK_SIZE
    cells_at_once = 0
    obs_columns: Sequence[str] = ("donor_id",)

    def __init__(self, n_cells: int, mean_tokens: int, n_genes: int, seed: int) -> None:
        rng = np.random.default_rng(seed)
        names = [f"ENSG{gene:011d}" for gene in range(n_genes)]
        self.genes = pd.DataFrame({"feature_id": names, "feature_name": names})
        self.donors = pd.DataFrame(
            {"donor_id": [f"donor_{cell * _N_DONORS // n_cells:02d}" for cell in range(n_cells)]},
            index=pd.RangeIndex(n_cells, name="cell_id"),
        )
        lengths = sample_lengths(rng, _N_DIFFERENT, mean_tokens, n_genes) - 1  # without `<cls>`
        self.expressed = [np.sort(rng.choice(n_genes, length, replace=False)).astype(np.int32) for length in lengths]
        self.counts = [rng.geometric(0.5, length).astype(np.float32) for length in lengths]

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        """Return obs of all cells."""
        return self.donors[list(columns)]

    def read(self, cell_ids: np.ndarray, columns: Sequence[str] = ()) -> CellBlock:
        """Return some cells."""
        chosen = cell_ids % _N_DIFFERENT
        genes, counts = [self.expressed[cell] for cell in chosen], [self.counts[cell] for cell in chosen]
        arrays = (np.concatenate(counts), np.concatenate(genes), np.cumsum([0, *map(len, genes)]))
        return CellBlock(arrays, self.obs(columns).loc[cell_ids], cell_ids, n_genes=len(self.genes))

    def presence(self, cell_ids: np.ndarray) -> None:
        """Return None: it is not known which genes were measured."""

    def describe(self) -> dict[str, Any]:
        """Return the origin of the cells."""
        return {
            **{"kind": "random", "layer": "raw", "obs_filter": None, "census_version": None, "organism": None},
            **{"n_cells": len(self.donors), "n_genes": len(self.genes)},
            "gene_hash": gene_hash(self.genes["feature_id"]),
        }
