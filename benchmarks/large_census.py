"""A Census of 100 million cells: all of obs, and X only of the chunks of cells that a benchmark reads.

`write_obs` writes a Census without counts, with the numbers of datasets, donors, tissues, cell types, assays and
diseases of a human Census of that size, and with totals for each cell in obs. `write_chunks` adds the counts of some
chunks of cells. They are a function of the cell, and have the totals that obs states, about 500 expressed genes. So
readers notice no difference as long as they read only these chunks; of others they would report that X is damaged.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import tiledbsoma as soma
from scipy.sparse import csr_matrix
from synthetic_census import TYPE_RUN, Dataset, obs_table, runs, zipf_weights

from scgpt_hf.cells.block import CHUNK_SIZE
from scgpt_hf.cells.compiled import compiled
from scgpt_hf.cells.soma.build import entries_by_tile, write_soma

ORGANISM = "homo_sapiens"
N_GENES, N_EXPRESSED, EXPRESSED_SPREAD = 60_664, 500, 0.45  # genes, median and log-normal spread of expressed ones
MOLECULES_PER_GENE = 3
CELLS_PER_DATASET, CELLS_PER_DONOR = 66_000, 4_000  # 1,500 datasets and 25,000 donors in 100 million cells
# obs column → the cells that share a value, number of values, one of them with its share. The others follow Zipf's law.
VALUES = {
    "tissue_general": ("dataset", 60, "blood", 0.12),
    "assay": ("dataset", 25, "10x 3' v3", 0.5),
    "suspension_type": ("dataset", 3, "na", 0.03),
    "tissue": ("donor", 350, "blood", 0.12),
    "disease": ("donor", 120, "normal", 0.55),
    "sex": ("donor", 3, "female", 0.48),
    "development_stage": ("donor", 170, "adult stage", 0.3),
    "self_reported_ethnicity": ("donor", 30, "unknown", 0.6),
    "cell_type": ("run", 800, "neuron", 0.08),
}
PRIMARY_SHARE = 0.6  # of the datasets; the others repeat cells


@dataclass(frozen=True)
class Body:
    """What `write_soma` needs of a source whose counts are written later."""

    parts: list[Dataset]
    genes: pd.DataFrame


def write_obs(folder: Path, n_cells: int, seed: int = 0) -> None:
    """Write a Census without counts."""
    genes = pd.DataFrame({"feature_id": [f"ENSG{gene:011d}" for gene in range(N_GENES)]})
    genes = genes.assign(feature_name=[f"GENE{gene}" for gene in range(N_GENES)], feature_length=1000)
    labels = label_cells(n_cells, seed)
    datasets = labels["dataset_id"].cat
    sizes = np.bincount(datasets.codes).tolist()
    parts = [
        # after the first one with few genes, because the matrix of measured genes is not read here
        Dataset(f"{name}.h5ad", pd.DataFrame(index=range(size)), genes.iloc[: 2000 if number else None])
        for number, (name, size) in enumerate(zip(datasets.categories, sizes, strict=True))
    ]
    names = list(datasets.categories)

    def state_totals(*_: Any) -> tuple[pd.DataFrame, np.ndarray]:
        rng = np.random.default_rng([seed, 6])
        spread = rng.standard_normal(n_cells, np.float32) * np.float32(EXPRESSED_SPREAD)
        nnz = np.clip(N_EXPRESSED * np.exp(spread), 50, N_GENES // 8).astype(np.int64)
        mean = np.full(n_cells, MOLECULES_PER_GENE, np.float32)
        numbers = {"raw_sum": (nnz * mean).astype(np.float32), "nnz": nnz, "raw_mean_nnz": mean}
        return pd.DataFrame(numbers, copy=False), np.full(N_GENES, n_cells)

    write_soma(str(folder), ORGANISM, Body(parts, genes), labels, names, write_counts=state_totals)  # type: ignore[arg-type]


def write_chunks(folder: Path, chunks: Iterable[int], seed: int = 0) -> None:
    """Add the counts of some chunks of cells, each to be written once."""
    experiment = f"{folder}/census_data/{ORGANISM}"
    weights = zipf_weights(N_GENES, 0, seed)
    order = np.argsort(-weights, kind="stable").astype(np.int32)
    thresholds = np.minimum(np.cumsum(weights[order]) * 2**32, 2**32 - 1).astype(np.uint32)
    with (
        soma.DataFrame.open(f"{experiment}/obs") as obs,
        soma.SparseNDArray.open(f"{experiment}/ms/RNA/X/raw", "w") as raw,
    ):
        for chunk in sorted(set(chunks)):
            first = chunk * CHUNK_SIZE
            rows = obs.read((slice(first, first + CHUNK_SIZE - 1),), column_names=["nnz"]).concat()
            lengths = rows["nnz"].to_numpy()
            data, genes = sample_cells(lengths, order, thresholds, MOLECULES_PER_GENE, np.uint64(first))
            counts = csr_matrix((data, genes, np.append(0, np.cumsum(lengths))), shape=(len(lengths), N_GENES))
            entries = entries_by_tile(counts, first)
            raw.write(entries, platform_config=soma.TileDBWriteOptions(sort_coords=False))


def label_cells(n_cells: int, seed: int) -> pd.DataFrame:
    """Return the obs table: contiguous datasets, contiguous donors within them, and short runs of cell types."""
    rng = np.random.default_rng([seed, 4])
    dataset = runs(n_cells, CELLS_PER_DATASET, rng).astype(np.int32)
    donor_run = runs(n_cells, CELLS_PER_DONOR, rng).astype(np.int32)
    donor = np.cumsum(np.diff(dataset + donor_run, prepend=0) != 0, dtype=np.int32)
    del donor_run
    run = np.cumsum(rng.random(n_cells, np.float32) < 1 / TYPE_RUN, dtype=np.int32)
    units = {"dataset": dataset, "donor": donor, "run": run}
    columns = {}
    for column, (unit, n_values, name, share) in VALUES.items():
        zipf = 1 / np.arange(1, n_values)
        bounds = np.cumsum(np.append(share, zipf * ((1 - share) / zipf.sum())))
        draws = spread_draws(units[unit][-1] + 1, rng)
        of_unit = np.minimum(np.searchsorted(bounds, draws, side="right"), n_values - 1).astype(np.int16)
        columns[column] = of_unit[units[unit]], [name, *(f"{column} {index}" for index in range(1, n_values))]
    return obs_table(dataset, donor, columns, (spread_draws(dataset[-1] + 1, rng) < PRIMARY_SHARE)[dataset])


def spread_draws(n: int, rng: np.random.Generator) -> np.ndarray:
    """Return numbers in [0, 1) of which even a few are spread evenly, so that few datasets have the common values."""
    return (np.arange(n) + rng.random(n))[rng.permutation(n)] / n


@compiled
def sample_cells(lengths, by_rank, thresholds, molecules_per_gene, first):
    """Return counts and ascending genes of cells that express `lengths` genes.

    Genes are drawn by their frequency until there are enough different ones. Then further molecules are given to them,
    most to those that were drawn first, until there are `molecules_per_gene` on average.
    """
    counts, genes = np.empty(lengths.sum(), np.float32), np.empty(lengths.sum(), np.int32)
    tally = np.zeros(len(by_rank), np.int32)
    start = 0
    for cell in range(len(lengths)):
        state, n = (first + np.uint64(cell)) << np.uint64(24), 0
        drawn = genes[start : start + lengths[cell]]
        while n < len(drawn):
            state += np.uint64(1)
            gene = by_rank[np.searchsorted(thresholds, np.uint32(random_word(state)))]
            if tally[gene] == 0:
                drawn[n], tally[gene], n = gene, 1, n + 1
        for _ in range(len(drawn) * (molecules_per_gene - 1)):
            state += np.uint64(1)
            share = random_word(state) / 2.0**32
            tally[drawn[int(share * share * share * len(drawn))]] += 1
        drawn.sort()
        for place in range(len(drawn)):
            counts[start + place], tally[drawn[place]] = tally[drawn[place]], 0
        start += len(drawn)
    return counts, genes


@compiled
def random_word(state):
    """Return 32 random bits of a counter: the finalizer of SplitMix64."""
    word = state * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return (word ^ (word >> np.uint64(31))) >> np.uint64(32)
