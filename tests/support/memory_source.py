"""Cells in memory behind the interface of a source, for tests of what is computed from counts."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import CellBlock, gene_hash


class MemorySource:
    """Cells with ids 5, 8, 11, ….

    Attributes:
        counts: counts of all cells. Shape (cells, genes).
        cell_ids: ids of the cells. Shape (cells,).
        table: obs of all cells, index = cell ids.
        reads: number of cells in each call of `read` so far.
    """

    chunk_size = 1
    cells_at_once = 0

    def __init__(self, counts: np.ndarray, donors: Sequence[Any], kind: str = "memory", **columns: Any) -> None:
        self.counts = csr_matrix(counts.astype(np.float32))
        self.cell_ids = np.arange(len(counts)) * 3 + 5
        self.table = pd.DataFrame({"donor_id": donors, **columns}, pd.Index(self.cell_ids, name="cell_id"))
        self.kind = kind
        self.reads: list[int] = []

    @property
    def genes(self) -> pd.DataFrame:
        names = [f"ENSG{gene:011d}" for gene in range(self.counts.shape[1])]
        return pd.DataFrame({"feature_id": names, "feature_name": names})

    @property
    def obs_columns(self) -> list[str]:
        return list(self.table)

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        if missing := set(columns) - set(self.table):
            raise ValueError(f"obs has no column {missing}")
        return self.table[list(columns)]

    def read(self, cell_ids: np.ndarray, columns: Sequence[str] = ()) -> CellBlock:
        self.reads.append(len(cell_ids))
        counts = self.counts[np.searchsorted(self.cell_ids, cell_ids)]
        return CellBlock.from_scipy(counts, self.obs(columns).loc[cell_ids], cell_ids)

    def presence(self, cell_ids: np.ndarray) -> None:
        return None

    def describe(self) -> dict[str, Any]:
        origin = {"kind": self.kind, "layer": "raw", "obs_filter": None, "census_version": None, "organism": None}
        sizes = {"n_cells": len(self.table), "n_genes": len(self.genes)}
        return {**origin, **sizes, "gene_hash": gene_hash(self.genes["feature_id"])}


def make_cells(n_cells: Sequence[int], n_genes: int = 300, seed: int = 0) -> MemorySource:
    """Cells of one donor for each number; genes differ widely in mean and spread, and a little between donors."""
    rng = np.random.default_rng(seed)
    means = rng.lognormal(0.5, 1.3, n_genes)
    spread = rng.uniform(0.3, 6, n_genes)
    donors = np.repeat([f"d{donor}" for donor in range(len(n_cells))], n_cells)
    shift = np.repeat(rng.lognormal(0, 0.3, (len(n_cells), n_genes)), n_cells, axis=0)
    counts = rng.poisson(rng.gamma(spread, means / spread * shift))
    return MemorySource(counts, donors)
