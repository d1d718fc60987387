"""Simulate what 8, 64 and 512 ranks read and train on, without a model.

  python benchmarks/many_ranks.py --cells 20000000

The plan is that of a run, and `EpochPlan.steps` gives the cells of every rank. For two numbers of cells per rank and
step, the table compares plans with 4 rank groups and a window of 32 chunks, whatever the size of a step, with the plans
that `plan_epoch` makes by default, and with those that also balance tokens:

- chunks read: 2,048-cell chunks that a rank reads, for each 2,048 cells that it trains on. 1 is the least.
- readers: the most ranks that read one chunk.
- imbalance: tokens of the rank with the most, against the mean of all ranks, averaged over the steps of a window; all
  ranks wait for that one.
- MB: bytes of the chunks that a rank reads before its first batch, at 1.8 bytes for a stored count, as in X of
  `large_census.py`.
- plan, window: CPU seconds of this process to plan the epoch and to list the cells of a rank in the first window.

Cells have as many genes as in 13 public sets of blood: the medians of data sets have a log-normal spread of 0.6, the
cells of a data set of 0.35. Data sets and donors are those of `large_census.py`.
"""

import argparse
import time
from dataclasses import replace
from typing import Any

import numpy as np
from large_census import label_cells
from measuring import write_result

from scgpt_hf.cells.block import CHUNK_SIZE
from scgpt_hf.cells.schedule.epoch import EpochPlan, plan_epoch
from scgpt_hf.cells.schedule.tokens import count_tokens

MEDIAN_GENES, DATASET_SPREAD, CELL_SPREAD = 900, 0.6, 0.35
MAX_TOKENS = 1201
BYTES_PER_COUNT = 1.8  # of X on disk


def draw_genes(dataset: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return the number of genes that each cell expresses, by the number of its data set."""
    rng = np.random.default_rng(seed)
    of_dataset = rng.normal(np.log(MEDIAN_GENES), DATASET_SPREAD, dataset.max() + 1)
    spread = rng.standard_normal(len(dataset), np.float32) * np.float32(CELL_SPREAD)
    return np.exp(of_dataset.astype(np.float32)[dataset] + spread).astype(np.int64)


def cells_of_ranks(plan: EpochPlan, world_size: int) -> list[list[np.ndarray]]:
    """Return the cells of each rank in each step of the first window; three ranks are compared with `plan.steps`."""
    window = plan.window(0)
    cuts = plan.cut(window, world_size)
    ranks = [
        [step[start:stop] for step, start, stop in zip(window, cuts[:, rank], cuts[:, rank + 1], strict=True)]
        for rank in range(world_size)
    ]
    for rank in (0, world_size // 2, world_size - 1):
        for one, other in zip(ranks[rank], plan.steps(0, rank=rank, world_size=world_size), strict=True):
            np.testing.assert_array_equal(one, other)
    return ranks


def measure(cell_ids: np.ndarray, n_genes: np.ndarray, world_size: int, per_rank: int, arm: str) -> dict[str, float]:
    """Plan an epoch and describe what the ranks read and train on in its first window."""
    tokens = count_tokens(np.arange(len(n_genes)), n_genes, MAX_TOKENS)
    order: dict[str, Any] = {"seed": 0, "epoch": 0, "batch_size": per_rank * world_size}
    started = time.process_time()
    if arm == "4 groups":
        n_steps = max(1, 32 * CHUNK_SIZE // (per_rank * world_size))
        plan = replace(plan_epoch(cell_ids, **order, rank_groups=4), steps_per_window=n_steps)
    else:
        plan = plan_epoch(cell_ids, **order, tokens=tokens if arm == "balanced" else None)
    planned = time.process_time()
    plan.steps(0, rank=0, world_size=world_size)
    listed = time.process_time()
    ranks = cells_of_ranks(plan, world_size)
    counts_of_chunk = np.add.reduceat(n_genes, np.arange(0, len(n_genes), CHUNK_SIZE))
    chunks = [np.unique(np.concatenate(steps) // CHUNK_SIZE) for steps in ranks]
    sizes = np.array([[len(step) for step in steps] for steps in ranks])
    totals = np.array([[tokens.of(step).sum(dtype=np.int64) for step in steps] for steps in ranks])
    n_bytes = [counts_of_chunk[own].sum() * BYTES_PER_COUNT for own in chunks]
    return {
        "steps_per_window": len(ranks[0]),
        "chunks_read": float(np.mean([len(own) for own in chunks]) * CHUNK_SIZE / sizes.sum(axis=1).mean()),
        "readers": int(np.bincount(np.concatenate(chunks)).max()),
        "imbalance": float((totals.max(axis=0) / totals.mean(axis=0)).mean() - 1),
        "fewest_cells": int(sizes.min()),
        "most_cells": int(sizes.max()),
        "mb_before_first_batch": float(np.mean(n_bytes) / 1e6),
        "mb_before_first_batch_most": float(np.max(n_bytes) / 1e6),
        "plan_cpu_s": planned - started,
        "window_cpu_s": listed - planned,
    }


def main() -> None:
    """Measure all arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", type=int, default=20_000_000, help="cells of the Census (default: %(default)s)")
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 64, 512], help="numbers of ranks")
    parser.add_argument("--per_rank", type=int, nargs="+", default=[64, 512], help="cells of a rank in a step")
    arguments = parser.parse_args()
    labels = label_cells(arguments.cells, seed=0)
    n_genes = draw_genes(labels["dataset_id"].cat.codes.to_numpy())
    cell_ids = np.flatnonzero(labels["is_primary_data"] & (n_genes >= 200)).astype(np.int64)
    print(f"{len(cell_ids):,} of {arguments.cells:,} cells; {n_genes[cell_ids].mean():.0f} genes, on average")
    results = {}
    for per_rank in arguments.per_rank:
        for world_size in arguments.ranks:
            for arm in ("4 groups", "default", "balanced"):
                found = measure(cell_ids, n_genes, world_size, per_rank, arm)
                results[f"{world_size} ranks x {per_rank} cells, {arm}"] = found
                print(world_size, per_rank, arm, found, flush=True)
    write_result("many_ranks", {"cells": len(cell_ids), "results": results})


if __name__ == "__main__":
    main()
