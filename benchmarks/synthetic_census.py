"""Write a Census of synthetic blood cells, of any size, in the layout of the CELLxGENE Census.

  python benchmarks/synthetic_census.py OUT --cells 100000

The molecules of each cell are sampled: genes follow Zipf's law, modified by the cell type, and library sizes are
log-normal. So about 1,500 of 60,664 genes are expressed, 70 % of the counts are 1, and a few exceed 255. Donors are
contiguous within datasets, and cell types come in short runs within donors, as in the Census. The cells are a
function of seed and size. They have the statistics that matter for speed, not those that matter for biology.
"""

import argparse
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pandas as pd

from scgpt_hf.cells.block import CellBlock
from scgpt_hf.cells.compiled import compiled
from scgpt_hf.cells.soma.build import write_soma
from scgpt_hf.cells.soma.layout import OBS_LABELS

CELL_TYPES = {  # share of the cells, Cell Ontology id
    "CD4-positive, alpha-beta T cell": (0.30, "CL:0000624"),
    "CD8-positive, alpha-beta T cell": (0.18, "CL:0000625"),
    "classical monocyte": (0.20, "CL:0000860"),
    "natural killer cell": (0.12, "CL:0000623"),
    "B cell": (0.10, "CL:0000236"),
    "non-classical monocyte": (0.05, "CL:0000875"),
    "platelet": (0.03, "CL:0000233"),
    "plasmacytoid dendritic cell": (0.02, "CL:0000784"),
}
TYPE_RUN = 8  # cells of one type in a row, on average
CELLS_PER_DATASET, CELLS_PER_DONOR = 25_000, 2_500  # on average
ZIPF, ZIPF_OFFSET = 1.3, 10  # a gene of rank r has the share (r + 10)^-1.3 of the molecules (Zipf-Mandelbrot)
SPREAD = 0.7  # log-normal spread of a gene's share between cell types
LIBRARY_SPREAD = 0.45  # log-normal spread of the molecules of a cell
CELLS_PER_TASK = 256  # cells that one thread samples at a time


@dataclass(frozen=True)
class Dataset:
    """One dataset, with the fields that `write_soma` reads of a file."""

    name: str
    obs: pd.DataFrame
    genes: pd.DataFrame


class SyntheticBlood:
    """A source of cells that are sampled when they are read; see `CellSource.read`."""

    def __init__(self, n_cells: int, *, n_genes: int, n_expressed: int, seed: int) -> None:
        self.n_cells, self.n_genes, self.n_expressed, self.seed = n_cells, n_genes, n_expressed, seed
        ids = [f"ENSG{index:011d}" for index in range(n_genes)]
        names = [f"GENE{index}" for index in range(n_genes)]
        self.genes = pd.DataFrame({"feature_id": ids, "feature_name": names, "feature_length": 1000})
        self.labels = label_cells(n_cells, seed)
        datasets = self.labels["dataset_id"].cat
        sizes = np.bincount(datasets.codes, minlength=len(datasets.categories))
        parts = zip(datasets.categories, sizes.tolist(), strict=True)
        self.parts = [Dataset(f"{name}.h5ad", pd.DataFrame(index=range(size)), self.genes) for name, size in parts]
        self.type_of_cell = self.labels["cell_type"].cat.codes.to_numpy()
        self.tables = gene_tables(n_genes, seed)
        self.pool = ThreadPoolExecutor(os.cpu_count())

    def read(self, cell_ids: np.ndarray) -> CellBlock:
        """Return consecutive cells."""
        first, stop = int(cell_ids[0]), int(cell_ids[-1]) + 1
        edges = [*range(first, stop, CELLS_PER_TASK), stop]
        parts = list(self.pool.map(self._sample, edges[:-1], edges[1:]))
        lengths, genes, counts = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        indptr = np.concatenate([[0], np.cumsum(lengths)])
        return CellBlock((counts, genes, indptr), pd.DataFrame(index=cell_ids), cell_ids, n_genes=self.n_genes)

    @cached_property
    def molecules(self) -> float:
        """The median library size with which the most common cell type expresses `n_expressed` genes, by bisection."""
        weights = zipf_weights(self.n_genes, 0, self.seed)
        low, high = 1.0, 1e9
        while high / low > 1.001:
            middle = (low * high) ** 0.5
            expressed = -np.expm1(-middle * weights).sum()
            low, high = (middle, high) if expressed < self.n_expressed else (low, middle)
        return low

    def _sample(self, first: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng([self.seed, first // CELLS_PER_TASK])  # blocks start at multiples of it
        libraries = (self.molecules * rng.lognormal(0, LIBRARY_SPREAD, CELLS_PER_TASK)).astype(np.int64)[
            : stop - first
        ] + 1
        return sample_cells(libraries, self.type_of_cell[first:stop], *self.tables, self.seed, first)


def label_cells(n_cells: int, seed: int) -> pd.DataFrame:
    """Return the obs table: contiguous datasets and donors of uneven sizes, and short runs of cell types."""
    rng = np.random.default_rng([seed, 1])
    dataset = runs(n_cells, CELLS_PER_DATASET, rng)
    donor = pd.factorize(dataset * n_cells + runs(n_cells, CELLS_PER_DONOR, rng))[0]
    shares = [share for share, _ in CELL_TYPES.values()]
    type_of_run = rng.choice(len(CELL_TYPES), n_cells, p=shares)
    kind = type_of_run[np.concatenate([[0], np.cumsum(rng.random(n_cells - 1) < 1 / TYPE_RUN)])]
    columns = {
        "cell_type": (kind, list(CELL_TYPES)),
        "cell_type_ontology_term_id": (kind, [term for _, term in CELL_TYPES.values()]),
        "assay": (dataset % 3, ["10x 3' v3", "10x 3' v2", "10x 5' v1"]),
        "sex": (donor % 2, ["female", "male"]),
        **dict.fromkeys(("tissue", "tissue_general"), (np.zeros(n_cells, np.int8), ["blood"])),
        "suspension_type": (np.zeros(n_cells, np.int8), ["cell"]),
        "disease": (np.zeros(n_cells, np.int8), ["normal"]),
    }
    return obs_table(dataset, donor, columns, np.ones(n_cells, np.bool_))


def obs_table(
    dataset: np.ndarray, donor: np.ndarray, columns: dict[str, tuple[np.ndarray, list[str]]], primary: np.ndarray
) -> pd.DataFrame:
    """Return the obs table of a Census from the codes and names of some columns; the others are "unknown"."""
    zeros = np.zeros(len(dataset), np.int8)
    coded = {"tissue_type": (zeros, ["tissue"])} | columns
    coded["dataset_id"] = dataset, [f"dataset_{index:03d}" for index in range(dataset[-1] + 1)]
    coded["donor_id"] = donor, [f"donor_{index:05d}" for index in range(donor[-1] + 1)]
    unknown = pd.Categorical.from_codes(zeros, ["unknown"])
    table = dict.fromkeys(OBS_LABELS, unknown) | {
        name: pd.Categorical.from_codes(codes, names) for name, (codes, names) in coded.items()
    }
    return pd.DataFrame({**table, "is_primary_data": primary}, copy=False)


def runs(n_cells: int, mean: int, rng: np.random.Generator) -> np.ndarray:
    """Number the cells by consecutive runs, whose lengths are between 0.5 and 1.5 times the mean. Shape (cells,)."""
    ends = np.cumsum(rng.integers(mean // 2, mean + mean // 2 + 1, 2 * n_cells // mean + 2))
    return np.searchsorted(ends, np.arange(n_cells), side="right")


def zipf_weights(n_genes: int, kind: int, seed: int) -> np.ndarray:
    """Return the share of each gene in the molecules of a cell type, genes in a random order. Shape (genes,)."""
    rank = np.random.default_rng([seed, 2]).permutation(n_genes) + 1.0
    weights = (rank + ZIPF_OFFSET) ** -ZIPF * np.random.default_rng([seed, 3, kind]).lognormal(0, SPREAD, n_genes)
    return weights / weights.sum()


def gene_tables(n_genes: int, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the tables with which `sample_cells` turns random words into genes.

    Returns:
        For each cell type: the genes, most frequent first, shape (types, genes); the highest 32-bit word that gives
        each of them, shape (types, genes); and where to search, shape (types, 65537): a word whose upper 16 bits are b
        gives one of the genes `guides[b]` to `guides[b + 1]`. The integers are as short as possible, so that the tables
        stay in the processor's cache.
    """
    short = np.min_scalar_type(n_genes)
    genes, thresholds, guides = [], [], []
    for kind in range(len(CELL_TYPES)):
        weights = zipf_weights(n_genes, kind, seed)
        order = np.argsort(-weights, kind="stable").astype(short)
        threshold = np.minimum(np.cumsum(weights[order]) * 2**32, 2**32 - 1).astype(np.uint32)
        threshold[-1] = 2**32 - 1
        genes.append(order)
        thresholds.append(threshold)
        guides.append(np.searchsorted(threshold, np.minimum(np.arange(65537) << 16, 2**32 - 1)).astype(short))
    return np.stack(genes), np.stack(thresholds), np.stack(guides)


@compiled
def sample_cells(libraries, kinds, by_rank, thresholds, guides, seed, first):
    """Return the number of expressed genes of each cell, and the genes (ascending) and counts of all cells."""
    n_genes, n_most = by_rank.shape[1], int(libraries.sum())
    tally, lengths = np.zeros(n_genes, np.int32), np.zeros(len(libraries), np.int64)
    present = np.zeros((n_genes >> 6) + 1, np.uint64)
    genes, counts = np.empty(n_most, np.int32), np.empty(n_most, np.float32)
    n = 0
    for cell in range(len(libraries)):
        kind = kinds[cell]
        state = np.uint64(seed + 1) * np.uint64(0xD1342543DE82EF95) + (np.uint64(first + cell) << np.uint64(24))
        for _ in range(libraries[cell]):
            state += np.uint64(1)  # the random word is a function of (seed, cell, molecule): SplitMix64's finaliser
            word = state * np.uint64(0x9E3779B97F4A7C15)
            word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
            word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
            word = (word ^ (word >> np.uint64(31))) >> np.uint64(32)
            guide = word >> np.uint64(16)
            low, high = np.int64(guides[kind, guide]), np.int64(guides[kind, guide + np.uint64(1)])
            while low < high:
                middle = (low + high) >> 1
                if thresholds[kind, middle] < word:
                    low = middle + 1
                else:
                    high = middle
            gene = np.int64(by_rank[kind, low])
            tally[gene] += 1
            present[gene >> 6] |= np.uint64(1) << np.uint64(gene & 63)
        before = n
        for word in range(len(present)):
            bits, gene = present[word], word << 6
            present[word] = np.uint64(0)
            while bits:
                if bits & np.uint64(1):
                    genes[n], counts[n], tally[gene] = gene, tally[gene], 0
                    n += 1
                bits, gene = bits >> np.uint64(1), gene + 1
        lengths[cell] = n - before
    return lengths, genes[:n].copy(), counts[:n].copy()


def main() -> None:
    """Write the Census, and print its size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder to create; open it like any local Census")
    parser.add_argument("--cells", type=int, default=100_000, help="number of cells (default: %(default)s)")
    parser.add_argument(
        "--genes", type=int, default=60_664, help="number of genes (default: %(default)s, as the Census)"
    )
    parser.add_argument(
        "--expressed", type=int, default=1500, help="genes that a typical cell expresses (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of the cells (default: %(default)s)")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists; choose another folder or remove it")
    blood = SyntheticBlood(
        arguments.cells, n_genes=arguments.genes, n_expressed=arguments.expressed, seed=arguments.seed
    )
    names = [part.name.removesuffix(".h5ad") for part in blood.parts]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{arguments.out.name}-", dir=arguments.out.parent) as folder:
        temporary = Path(folder, "soma")
        write_soma(str(temporary), "homo_sapiens", blood, blood.labels, names)
        temporary.rename(arguments.out)
    n_donors = blood.labels["donor_id"].nunique()
    print(f"{arguments.out}: {arguments.cells:,} cells, {n_donors} donors, {len(names)} datasets")


if __name__ == "__main__":
    main()
