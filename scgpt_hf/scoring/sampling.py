"""Sample labelled cells so that each label and batch keeps its share and rare labels stay."""

import numpy as np
import numpy.typing as npt
import pandas as pd

from scgpt_hf.scoring.metrics import Labels

Rows = npt.NDArray[np.int64]

KEPT_PER_LABEL = 20  # cells of each label that a sample keeps, so that rare types stay


def sample_cells(labels: Labels, batches: Labels, max_cells: int, seed: int) -> Rows:
    """Return all cells, or a sample of `max_cells` cells that is stratified by label and batch.

    The sample first keeps 20 cells of each label, or all of them if a label has fewer. The other cells are sampled so
    that each label in each batch has its share, to within one cell.

    Args:
        labels: label of each cell. Shape (cells,).
        batches: batch of each cell. Shape (cells,).
        max_cells: highest number of cells.
        seed: seed of the sample; the same seed gives the same cells.

    Returns:
        Positions of the sampled cells, ascending.

    Raises:
        ValueError: `max_cells` is too small for 20 cells of each label.
    """
    if len(labels) <= max_cells:
        return np.arange(len(labels))
    random = np.random.default_rng(seed).random(len(labels))
    cells = pd.DataFrame({"label": labels, "batch": batches, "random": random})
    kept = (cells.groupby("label")["random"].rank(method="first") <= KEPT_PER_LABEL).to_numpy()
    n_rest = max_cells - int(kept.sum())
    if n_rest < 0:
        raise ValueError(f"max_cells is {max_cells:,}, which is too few for 20 cells of each label; raise max_cells")
    # Sorted by stratum and taken at even distances, each stratum gets its share; within it the order is random.
    rest = cells[~kept].sort_values(["label", "batch", "random"]).index.to_numpy()
    evenly_spaced = ((np.arange(n_rest) + 0.5) * len(rest) / max(n_rest, 1)).astype(np.int64)
    return np.sort(np.concatenate([np.flatnonzero(kept), rest[evenly_spaced]]))
