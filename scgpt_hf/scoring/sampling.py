"""Sample cells: by label and batch, so that rare labels stay, or from few chunks, so that a source reads little."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from scgpt_hf.scoring.metrics import Labels

Rows = npt.NDArray[np.int64]

KEPT_PER_LABEL = 20  # cells of each label that a sample keeps, so that rare types stay
_MIN_CHUNKS = 32


def sample_cells(
    labels: Labels, batches: Labels, max_cells: int, seed: int, *, kept_per_label: int = KEPT_PER_LABEL
) -> Rows:
    """Return all cells, or a sample of `max_cells` cells that is stratified by label and batch.

    The sample first keeps `kept_per_label` cells of each label, or all of them if a label has fewer. The other cells
    are sampled so that each label in each batch has its share, to within one cell.

    Args:
        labels: label of each cell. Shape (cells,).
        batches: batch of each cell. Shape (cells,).
        max_cells: highest number of cells.
        seed: seed of the sample; the same seed gives the same cells.
        kept_per_label: cells of each label that are kept.

    Returns:
        Positions of the sampled cells, ascending.

    Raises:
        ValueError: `max_cells` is too small for these cells of each label.
    """
    if len(labels) <= max_cells:
        return np.arange(len(labels))
    random = np.random.default_rng(seed).random(len(labels))
    cells = pd.DataFrame({"label": labels, "batch": batches, "random": random})
    kept = (cells.groupby("label")["random"].rank(method="first") <= kept_per_label).to_numpy()
    n_rest = max_cells - int(kept.sum())
    if n_rest < 0:
        raise ValueError(
            f"max_cells is {max_cells:,}, which is too few for {kept_per_label} cells of each label; raise max_cells"
        )
    # Sorted by stratum and taken at even distances, each stratum gets its share; within it the order is random.
    rest = cells[~kept].sort_values(["label", "batch", "random"]).index.to_numpy()
    evenly_spaced = ((np.arange(n_rest) + 0.5) * len(rest) / max(n_rest, 1)).astype(np.int64)
    return np.sort(np.concatenate([np.flatnonzero(kept), rest[evenly_spaced]]))


def sample_chunks(cell_ids: Rows, n_cells: int, seed: int, chunk_size: int) -> Rows:
    """Sample cells from few chunks, so that a source reads little.

    Chunks are drawn at random, 32 or as many as have enough cells, and the cells from these chunks. 32 chunks are what
    a run shuffles together.

    Args:
        cell_ids: ids to sample from, ascending. Shape (cells,).
        n_cells: number of cells; all are returned if there are no more.
        seed: the same seed gives the same cells.
        chunk_size: cells of a chunk of the source.

    Returns:
        Ids, ascending, int64 (n_cells,).
    """
    if len(cell_ids) <= n_cells:
        return cell_ids
    rng = np.random.default_rng(seed)
    _, chunk_of_cell, sizes = np.unique(cell_ids // chunk_size, return_inverse=True, return_counts=True)
    order = rng.permutation(len(sizes))
    n_chunks = max(_MIN_CHUNKS, int(np.searchsorted(np.cumsum(sizes[order]), n_cells)) + 1)
    candidates = cell_ids[np.isin(chunk_of_cell, order[:n_chunks])]
    return np.sort(rng.permutation(candidates)[:n_cells])
