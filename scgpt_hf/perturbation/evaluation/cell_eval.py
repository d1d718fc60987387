"""Score an evaluation with the metrics of cell-eval2, for comparison with results that others computed with it.

The metrics that both have are the same functions of the same effects, so they agree with `metrics.py`; a test compares
them. Those of single cells, such as differential expression, need predicted cells: write them with `perturb predict`,
and pass the file to cell-eval2.
"""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from scgpt_hf.cells.block import Float64Array
from scgpt_hf.perturbation.conditions import CONTROL
from scgpt_hf.perturbation.evaluation.evaluate import TRUTH, Evaluation

CELL_EVAL = "cell_eval_scores.csv"
# Distances over all genes, and shares of the other conditions, as in `metrics.py`.
_DISCRIMINATION = {"rank_denominator": "n-1", "exclude_target_gene": False}
Bulk = tuple[np.ndarray[Any, Any], Float64Array]


def score_with_cell_eval(evaluation: Evaluation) -> pd.DataFrame:
    """Score all methods on the held-out conditions with cell-eval2.

    Args:
        evaluation: result of `evaluate_perturbation`.

    Returns:
        A row for each method and (condition, context): `pearson_delta`, `mse_delta` and `mae_delta` over all genes, and
        `discrimination_l1` and `discrimination_cosine` among the held-out conditions of the context.

    Raises:
        ImportError: cell-eval2 is not installed.

    Example:
        >>> score_with_cell_eval(evaluation).groupby("method").mean(numeric_only=True)  # doctest: +SKIP

    Source: cell-eval2, `cell_eval2/metrics`.
    """
    metrics = _metrics()
    rows = []
    for context in sorted({context for _, context in evaluation.deltas}):
        deltas = {condition: by for (condition, where), by in evaluation.deltas.items() if where == context}
        true = _bulk({condition: by[TRUTH] for condition, by in deltas.items()})
        for method in dict.fromkeys(name for by in deltas.values() for name in by if name != TRUTH):
            predicted = _bulk({condition: by[method] for condition, by in deltas.items() if method in by})
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "An input array is constant")  # no change has no correlation
                scores = pd.DataFrame({name: score(predicted, true) for name, score in metrics.items()})
            scores.insert(0, "context", context)
            scores.insert(0, "method", method)
            rows.append(scores.rename_axis("condition").reset_index())
    return pd.concat(rows, ignore_index=True)


def require_cell_eval() -> None:
    """Raise ImportError unless cell-eval2 is installed."""
    try:
        import cell_eval2  # noqa: F401
    except ImportError as error:
        raise ImportError("these metrics need cell-eval2; install it with: pip install 'scgpt_hf[perturb]'") from error


def _metrics() -> Mapping[str, Callable[[Bulk, Bulk], dict[str, float]]]:
    """Return each metric as a function of predicted and true bulks."""
    require_cell_eval()
    from cell_eval2.metrics import delta
    from cell_eval2.metrics.discrimination import discrimination_score

    def of_delta(name: str) -> Callable[[Bulk, Bulk], dict[str, float]]:
        return lambda predicted, true: getattr(delta, name)(pred_bulk=predicted, real_bulk=true, control=CONTROL)

    def of_distance(distance: str) -> Callable[[Bulk, Bulk], dict[str, float]]:
        return lambda predicted, true: discrimination_score(
            pred_bulk=predicted, real_bulk=true, control=CONTROL, distance=distance, **_DISCRIMINATION
        )

    names = ("pearson_delta", "mse_delta", "mae_delta")
    distances = {f"discrimination_{distance}": of_distance(distance) for distance in ("l1", "cosine")}
    return {name: of_delta(name) for name in names} | distances


def _bulk(deltas: Mapping[str, Float64Array]) -> Bulk:
    """Return effects in the form of cell-eval2: labels, and profiles in which the control is 0."""
    profiles = np.stack([*deltas.values(), np.zeros(len(next(iter(deltas.values()))))])
    return np.array([*deltas, CONTROL]), profiles
