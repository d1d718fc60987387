"""Small inputs for the tests of caches, also for those that run in another process."""

from pathlib import Path

import numpy as np
import pandas as pd
from anndata import AnnData
from scipy.sparse import csr_matrix, random_array

from scgpt_hf.cells.cache.jobs import CacheJobs, plan_cache, write_cache
from scgpt_hf.cells.source import CellSource, open_source

SHARD = {"cells_per_shard": 2048}  # 9,000 cells make five shards


def make_cells(seed: int = 0, n_cells: int = 9000) -> AnnData:
    """Return cells with 12 genes, counts up to 300, and a new donor after every 1,000 cells."""
    counts = random_array((n_cells, 12), density=0.3, rng=seed, data_sampler=lambda size: np.arange(size) % 300 + 1)
    obs = pd.DataFrame({"donor_id": np.arange(n_cells) // 1000}, index=[str(cell) for cell in range(n_cells)])
    genes = pd.DataFrame(index=[f"ENSG{gene:011d}" for gene in range(12)])
    return AnnData(csr_matrix(counts, dtype=np.float32), obs.astype(str), genes)


def write_job(folder: str, job: tuple[int, int]) -> None:
    """Write the shards of one job of a cache of `make_cells`."""
    write_cache(open_source(make_cells()), folder, job=job, **SHARD)


def plan_on_ray(folder: str) -> CacheJobs:
    """Plan the same cache from a source that breaks if a file "broken" is beside the folder."""
    source = BreakableSource(open_source(make_cells()), Path(folder).with_name("broken"))
    return plan_cache(source, folder, **SHARD)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of each file of a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


class BreakableSource:
    """A source that cannot read cell 8,000 while a file exists."""

    def __init__(self, source: CellSource, broken: Path) -> None:
        self.source, self.broken = source, broken

    def __getattr__(self, name: str):
        if name in {"source", "broken", "__setstate__"}:
            raise AttributeError(name)
        return getattr(self.source, name)

    def read(self, cell_ids, columns=()):
        """Return cells, or raise."""
        if (cell_ids == 8000).any() and self.broken.exists():
            raise ValueError("cell 8000 cannot be read")
        return self.source.read(cell_ids, columns)
