"""Pair perturbed cells with control cells of the same experimental batch.

Sequencing destroys a cell, so no cell is measured both before and after a perturbation. As in scGPT, each perturbed
cell is paired with a random control cell. The choice is a function of (seed, epoch, cell) alone: it does not depend on
the other cells, their order, or the number of processes.

Source: bowang-lab/scGPT:tutorials/Tutorial_Perturbation.ipynb; GEARS draws controls at random, too, without regard to
    batches.
"""

import numpy as np
import numpy.typing as npt

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.perturbation.pseudobulk import Names
from scgpt_hf.tokens.randomness_scgpt import PAIRED_CELLS, PAIRING, cell_keys, random_words

_ONE_NUMBER = np.zeros(1, np.int64)  # one random number for each cell: the counter stays 0


def require_controls(batches: Names, is_control: npt.NDArray[np.bool_], batch_key: str | None) -> None:
    """Raise unless every experimental batch with perturbed cells has control cells.

    Args:
        batches: batch of each cell. Shape (cells,).
        is_control: whether a cell is a control. Shape (cells,).
        batch_key: obs column of the batches, for the message.

    Raises:
        ValueError: there are no control cells at all, or a batch has none.
    """
    if not is_control.any():
        raise ValueError("there is no control cell, with which perturbed cells could be compared")
    lacking = np.setdiff1d(batches[~is_control], batches[is_control])
    if len(lacking):
        n_cells = int(np.isin(batches[~is_control], lacking).sum())
        raise ValueError(
            f"{len(lacking)} of the {len(np.unique(batches))} batches in {batch_key} have perturbed cells "
            f"({n_cells:,}) and no control cell, e.g. {lacking[:3].tolist()}; leave their cells out, or compare cells "
            "within larger groups: choose another batch_key, or none"
        )


def pair_controls(cells: Int64Array, batches: Names, controls: Int64Array, *, seed: int, epoch: int) -> Int64Array:
    """Return a control cell of the same batch for each perturbed cell.

    Args:
        cells: the perturbed cells. Shape (n,).
        batches: batch of each cell of the data; cells are positions in it. Shape (cells,).
        controls: the control cells to choose from.
        seed: seed of the run.
        epoch: epoch; the pairs change with it.

    Returns:
        One of `controls` for each perturbed cell. Shape (n,).

    Raises:
        ValueError: a batch has no control cell.

    Example:
        >>> batches = np.array(["a", "a", "b", "b"])
        >>> pair_controls(np.array([1, 3]), batches, np.array([0, 2]), seed=0, epoch=0)
        array([0, 2])
    """
    words = random_words(cell_keys(cells, seed=seed, epoch=epoch, purpose=PAIRING), _ONE_NUMBER)
    paired = np.empty(len(cells), np.int64)
    for batch in np.unique(batches[cells]):
        members = np.flatnonzero(batches[cells] == batch)
        of_batch = np.sort(controls[batches[controls] == batch])
        if not len(of_batch):
            raise ValueError(f"batch {str(batch)!r} has no control cell")
        paired[members] = of_batch[(words[members] % np.uint64(len(of_batch))).astype(np.int64)]
    return paired


def draw_cells(cells: Int64Array, n: int, *, seed: int, epoch: int) -> Int64Array:
    """Return `n` of the cells of a condition, each as often as the others, at most by one.

    The cells are ranked by a random number of (seed, epoch, cell). If there are fewer than `n`, they are repeated.

    Args:
        cells: the cells of the condition. Shape (at least 1,).
        n: number of cells to draw.
        seed: seed of the run.
        epoch: epoch; the sample changes with it.
    """
    words = random_words(cell_keys(cells, seed=seed, epoch=epoch, purpose=PAIRED_CELLS), _ONE_NUMBER)
    ranked = cells[np.argsort(words, kind="stable")]
    return np.resize(ranked, n)
