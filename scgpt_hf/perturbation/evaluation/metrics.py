"""Metrics of predicted effects. An effect, or delta, is the mean difference that a perturbation makes to each gene.

All are computed from deltas, (genes,): `true` from cells that no predictor saw, against control cells that no predictor
saw. With shared controls every predictor, a wrong one too, has a positive correlation.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from scgpt_hf.cells.block import Float64Array, Int64Array

N_TOP = 20
"""Genes in the metrics of the most affected genes. Source: GEARS, Roohani et al. 2023."""

METRICS: dict[str, str] = {
    "pearson_delta": "correlation of predicted and true delta over all genes; not defined for no change",
    "pearson_top20": "the same over the 20 genes with the largest Welch t between perturbed and control cells",
    "l2": "length of the difference between predicted and true delta",
    "mse": "mean squared difference over all genes",
    "mse_top20": "the same over the top 20 genes",
    "direction_top20": "share of the top 20 genes whose delta has the right sign; a delta of 0 is half right",
    "discrimination": "share of the other conditions whose true delta is farther from the prediction (L1) than the "
    "right one; 0.5 is chance",
}
"""Each metric and its meaning."""
HIGHER_IS_BETTER = {"pearson_delta", "pearson_top20", "direction_top20", "discrimination"}


def score_delta(predicted: Float64Array, true: Float64Array, top: Int64Array) -> dict[str, float]:
    """Return all metrics of one condition but `discrimination`.

    Args:
        predicted: predicted delta. Shape (genes,).
        true: true delta. Shape (genes,).
        top: the most affected genes. Shape (up to 20,).

    Returns:
        Metric → value; NaN where a correlation is not defined.
    """
    error = predicted - true
    right = np.where(predicted[top] == 0, 0.5, np.sign(predicted[top]) == np.sign(true[top]))
    return {
        "pearson_delta": pearson(predicted, true),
        "pearson_top20": pearson(predicted[top], true[top]),
        "l2": float(np.linalg.norm(error)),
        "mse": float(np.mean(error**2)),
        "mse_top20": float(np.mean(error[top] ** 2)),
        "direction_top20": float(np.mean(right)),
    }


def pearson(one: Float64Array, other: Float64Array) -> float:
    """Return the correlation of two vectors; NaN if one of them is constant."""
    first, second = one - one.mean(), other - other.mean()
    scale = float(np.linalg.norm(first) * np.linalg.norm(second))
    return float(first @ second) / scale if scale > 0 else float("nan")


def discriminate(predicted: Float64Array, true: Mapping[str, Float64Array], own: str) -> float:
    """Return how well a prediction is recognized among the true deltas of all tested conditions, from 0 to 1.

    Args:
        predicted: predicted delta of the condition `own`. Shape (genes,).
        true: true delta of each condition.
        own: name of the condition that is predicted.

    Returns:
        Share of the other conditions that are farther from the prediction than `own`; NaN if there is no other one.
        Equal distances count half.

    Source: perturbation discrimination score of cell-eval, ArcInstitute/cell-eval; Virtual Cell Challenge 2025. There
        ranks are divided by the number of conditions, here by that of the other ones, so that chance is 0.5.
    """
    distances = {name: float(np.abs(predicted - delta).sum()) for name, delta in true.items()}
    others = [distance for name, distance in distances.items() if name != own]
    if not others:
        return float("nan")
    return float(np.mean([(distance > distances[own]) + 0.5 * (distance == distances[own]) for distance in others]))


def top_genes(statistic: Float64Array, n: int = N_TOP) -> Int64Array:
    """Return the genes with the largest absolute statistic, the largest first."""
    chosen: Int64Array = np.argsort(-np.abs(statistic), kind="stable")[:n].astype(np.int64)
    return chosen


def mean_scores(scores: Sequence[Mapping[str, float]]) -> dict[str, float | None]:
    """Return the mean of each metric over conditions; None where it is not defined for any."""
    means: dict[str, float | None] = {}
    for name in METRICS:
        values = np.array([one.get(name, np.nan) for one in scores], np.float64)
        known = values[np.isfinite(values)]
        means[name] = float(known.mean()) if len(known) else None
    return means
