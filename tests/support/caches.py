"""Small inputs for the tests of caches, also for those that run in another process."""

import os
import signal
from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix, random_array

from scgpt_hf.cells.source import CellSource

SHARD = {"cells_per_shard": 2048}  # 9,000 cells make five shards


def make_cells(seed: int = 0, n_cells: int = 9000) -> AnnData:
    """Return cells with 12 genes, counts up to 300, and a new donor after every 1,000 cells."""
    counts = random_array((n_cells, 12), density=0.3, rng=seed, data_sampler=lambda size: np.arange(size) % 300 + 1)
    obs = pd.DataFrame({"donor_id": np.arange(n_cells) // 1000}, index=[str(cell) for cell in range(n_cells)])
    genes = pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(12)])
    return AnnData(csr_matrix(counts, dtype=np.float32), obs.astype(str), genes)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class DeadlySource:
    """A source that kills its process when it reads cells from 4,096 on, as often as the file `deaths` has lines."""

    def __init__(self, source: CellSource, deaths: Path) -> None:
        """Wrap a source.

        Args:
            source: the source.
            deaths: a file; each death removes a line. If a file "broken" is in the same folder, cell 8,000 raises.
        """
        self.source, self.deaths = source, deaths

    def __getattr__(self, name: str):
        if name in {"source", "deaths", "__setstate__"}:
            raise AttributeError(name)
        return getattr(self.source, name)

    def read(self, cell_ids, columns=()):
        """Return cells, raise, or kill this process."""
        left = self.deaths.read_text().splitlines()
        if left and cell_ids[0] >= 4096:
            self.deaths.write_text("\n".join(left[1:]))
            os.kill(os.getpid(), signal.SIGKILL)
        if (cell_ids == 8000).any() and self.deaths.with_name("broken").exists():
            raise ValueError("cell 8000 cannot be read")
        return self.source.read(cell_ids, columns)
