"""Mean expression of conditions, and the difference that a perturbation makes (its delta).

    delta(condition) = Σ_b n_b (mean of its cells in b − mean of the control cells in b) / Σ_b n_b

b runs over the experimental batches with cells of the condition and n_b counts these cells, so a condition is compared
with controls of the same batches only. All functions are pure.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import Float64Array, Int64Array

Names = npt.NDArray[np.str_]


def mean_rows(values: csr_matrix, rows: Int64Array) -> Float64Array:
    """Return the mean of some rows; zeros if there are none. Shape (genes,)."""
    if not len(rows):
        return np.zeros(values.shape[1])
    return np.asarray(values[rows].mean(axis=0, dtype=np.float64)).ravel()


def delta_of(values: csr_matrix, batches: Names, rows: Int64Array, controls: Int64Array) -> Float64Array:
    """Return the delta of the cells of a condition.

    Args:
        values: log1p values. Shape (cells, genes).
        batches: experimental batch of each cell. Shape (cells,).
        rows: the cells of the condition.
        controls: the control cells.

    Raises:
        ValueError: a batch with cells of the condition has no control cell.

    Returns:
        Shape (genes,).
    """
    total = np.zeros(values.shape[1])
    for batch in np.unique(batches[rows]):
        perturbed, of_batch = rows[batches[rows] == batch], controls[batches[controls] == batch]
        if not len(of_batch):
            raise ValueError(f"batch {str(batch)!r} has {len(perturbed)} perturbed cells and no control cell")
        total += len(perturbed) * (mean_rows(values, perturbed) - mean_rows(values, of_batch))
    return total / max(len(rows), 1)


def halve(rows: Int64Array, strata: Sequence[str] | Names, seed: int) -> tuple[Int64Array, Int64Array]:
    """Return two random halves of some cells, which contain the same share of each stratum.

    Args:
        rows: the cells. Shape (n,).
        strata: stratum of each cell of the data. Shape (cells,).
        seed: seed of the halves.
    """
    rng = np.random.default_rng(seed)
    labels = np.asarray(strata)
    first: list[Int64Array] = []
    for stratum in np.unique(labels[rows]):
        members = rng.permutation(rows[labels[rows] == stratum])
        # The odd cell of a stratum goes to a random half, so that both halves have the same expected size.
        first.append(members[: (len(members) + int(rng.integers(2))) // 2])
    one = np.sort(np.concatenate(first)) if first else rows[:0]
    return one, np.setdiff1d(rows, one)


def welch_t(values: csr_matrix, rows: Int64Array, controls: Int64Array) -> Float64Array:
    """Return Welch's t of each gene between the cells of a condition and control cells. Shape (genes,).

    A gene without any variance in both has t = 0.

    Source: Welch 1947, Biometrika 34:28.
    """
    means, errors = [], []
    for part in (rows, controls):
        found = values[part]
        mean = mean_rows(values, part)
        squares = np.asarray(found.multiply(found).mean(axis=0, dtype=np.float64)).ravel()
        n = max(len(part), 1)
        errors.append(np.maximum(squares - mean**2, 0) / max(n - 1, 1))
        means.append(mean)
    error = np.sqrt(errors[0] + errors[1])
    return np.divide(means[0] - means[1], error, out=np.zeros_like(error), where=error > 0)
