"""Simple predictors of perturbation effects, fitted to the training conditions of the same split.

Each takes the training deltas of one context and the genes of a condition, and returns a delta, or None where it does
not apply. All are pure functions.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from scgpt_hf.cells.block import Float64Array
from scgpt_hf.perturbation.conditions import Condition

N_COMPONENTS, RIDGE = 10, 0.1
"""Source: Ahlmann-Eltze, Huber and Anders 2025, Nature Methods 22:1657 (`linear_perturbation_prediction`)."""
N_NEAREST = 3


@dataclass(frozen=True, eq=False)
class Training:
    """The knowledge of a baseline: effects and profiles of the training conditions.

    Attributes:
        deltas: training condition → mean difference to control cells. Shape (genes,) each; at least one.
        profiles: mean values of each training condition and of the control cells. Shape (conditions + 1, genes).
        column_of: name of a measured gene → its column.
    """

    deltas: Mapping[Condition, Float64Array]
    profiles: Float64Array
    column_of: Mapping[str, int]

    @property
    def n_genes(self) -> int:
        """Return the number of genes."""
        return int(self.profiles.shape[1])


def no_change(training: Training, condition: Condition) -> Float64Array | None:
    """Predict a delta of 0."""
    return np.zeros(training.n_genes)


def mean_of_training(training: Training, condition: Condition) -> Float64Array | None:
    """Predict the mean delta of the training conditions."""
    mean: Float64Array = np.mean(list(training.deltas.values()), axis=0)
    return mean


def additive(training: Training, condition: Condition) -> Float64Array | None:
    """Predict the sum of the deltas of the single perturbations; a single that is not known counts as 0."""
    known = [training.deltas[gene,] for gene in condition if (gene,) in training.deltas]
    return np.sum(known, axis=0) if known else None


def nearest_targets(training: Training, condition: Condition) -> Float64Array | None:
    """Predict the mean delta of the singles of the nearest genes; of several perturbed genes, the sum.

    Genes are near if their values correlate over the training conditions and the control. Perturbed genes and training
    targets must be measured.
    """
    singles = {
        one[0]: delta for one, delta in training.deltas.items() if len(one) == 1 and one[0] in training.column_of
    }
    if not singles or any(gene not in training.column_of for gene in condition):
        return None
    total = np.zeros(training.n_genes)
    for gene in condition:
        others = [one for one in singles if one != gene]
        if not others:
            return None
        near = sorted(others, key=lambda one, gene=gene: -_similarity(training, gene, one))  # type: ignore[misc]
        total += np.mean([singles[one] for one in near[:N_NEAREST]], axis=0)
    return total


def ridge_linear(training: Training, condition: Condition) -> Float64Array | None:
    """Predict by the linear model Y = G W Pᵀ + b of the gene vectors of all genes (G) and of the perturbed ones (P).

    G are the first 10 principal components of the genes over the training profiles, P those of the perturbed genes
    (their sum, if there are several), b is the mean training delta, and W solves ridge regressions with penalty 0.1.
    Perturbed genes must be measured; training conditions whose genes are not are left out.

    Source: Ahlmann-Eltze, Huber and Anders 2025, Nature Methods 22:1657. There Y are profiles, here deltas; the
        control's profile is in b either way.
    """
    usable = [one for one in training.deltas if all(gene in training.column_of for gene in one)]
    if len(usable) < 2 or any(gene not in training.column_of for gene in condition):
        return None
    centered = training.profiles - training.profiles.mean(axis=0)
    _, _, components = np.linalg.svd(centered, full_matrices=False)
    scale = np.linalg.norm(centered @ components.T, axis=0)
    n = min(N_COMPONENTS, len(components))
    vectors = (components[:n] * scale[:n, None]).T  # (genes, components)
    responses = np.stack([training.deltas[one] for one in usable], axis=1)  # (genes, conditions)
    offset = np.mean(list(training.deltas.values()), axis=0)
    inputs = np.stack([_sum_vectors(training, vectors, one) for one in usable])  # (conditions, components)
    left = np.linalg.solve(vectors.T @ vectors + RIDGE * np.eye(n), vectors.T @ (responses - offset[:, None]))
    weights = np.linalg.solve(inputs.T @ inputs + RIDGE * np.eye(n), (left @ inputs).T).T
    found: Float64Array = vectors @ weights @ _sum_vectors(training, vectors, condition) + offset
    return found


BASELINES: dict[str, Callable[[Training, Condition], Float64Array | None]] = {
    "no change": no_change,
    "mean of training": mean_of_training,
    "additive": additive,
    "nearest targets": nearest_targets,
    "ridge linear": ridge_linear,
}
"""Each baseline by its name in tables."""


def _sum_vectors(training: Training, vectors: Float64Array, condition: Condition) -> Float64Array:
    total: Float64Array = vectors[[training.column_of[gene] for gene in condition]].sum(axis=0)
    return total


def _similarity(training: Training, one: str, other: str) -> float:
    """Return the correlation of two genes over the training profiles; −1 if one of them is constant."""
    first, second = (training.profiles[:, training.column_of[gene]] for gene in (one, other))
    first, second = first - first.mean(), second - second.mean()
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / scale if scale else -1.0
