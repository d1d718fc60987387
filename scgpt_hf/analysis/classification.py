"""What predicted cell types are worth: confusions, F1 of each type, calibration of the confidence.

Who predicts them, and for which cells, `probing.py` decides; the figures are in `plots_types.py`.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import f1_score

Labels = npt.NDArray[np.str_]


def count_confusions(
    true: npt.ArrayLike, predicted: npt.ArrayLike
) -> tuple[list[str], list[str], npt.NDArray[np.int64]]:
    """Return the true types by falling number of cells, those and what else is predicted, and counts (true, predicted).

    Raises:
        ValueError: no cell, or not one prediction for each cell.
    """
    table = pd.crosstab(*_pairs(true, predicted))
    sizes = table.sum(axis=1)
    types = sorted(table.index, key=lambda name: (-sizes[name], name))
    columns = types + sorted(set(table.columns) - set(types))
    return types, columns, table.reindex(index=types, columns=columns, fill_value=0).to_numpy(np.int64)


def f1_by_type(true: npt.ArrayLike, predicted: npt.ArrayLike) -> dict[str, float]:
    """Return the F1 of each true type; their mean is the macro-F1. A type that is never predicted has 0.

    Raises:
        ValueError: no cell, or not one prediction for each cell.
    """
    true, predicted = _pairs(true, predicted)
    types = np.unique(true)
    scores = f1_score(true, predicted, labels=types, average=None, zero_division=0.0)
    return dict(zip(types.tolist(), scores.tolist(), strict=True))


def reliability(confidence: npt.ArrayLike, correct: npt.ArrayLike, n_bins: int = 10) -> pd.DataFrame:
    """Return mean `confidence`, `accuracy` and number of `cells` of each bin of confidence that holds a cell.

    The index is the number of the bin, from 0.

    Args:
        confidence: of each prediction, in [0, 1]. Shape (cells,).
        correct: whether it is right. Shape (cells,).
        n_bins: bins of equal width, closed to the right.

    Raises:
        ValueError: no cell, not one truth for each confidence, or a confidence outside [0, 1].
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    if confidence.shape != correct.shape or not confidence.size:
        raise ValueError(f"expected a confidence and a truth for each cell, found {confidence.shape}, {correct.shape}")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"expected confidences in [0, 1], found {np.min(confidence):g} to {np.max(confidence):g}")
    places = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    table = pd.DataFrame({"confidence": confidence, "accuracy": correct.astype(float), "cells": 1}).groupby(places)
    return table.agg({"confidence": "mean", "accuracy": "mean", "cells": "sum"})


def calibration_error(confidence: npt.ArrayLike, correct: npt.ArrayLike, n_bins: int = 10) -> float:
    """Return the expected calibration error: |accuracy − confidence| of each bin, weighted by its cells.

    Raises:
        ValueError: as `reliability`.

    Source: Guo et al. 2017, "On Calibration of Modern Neural Networks", ICML, eq. 5.
    """
    bins = reliability(confidence, correct, n_bins)
    return float(np.average((bins["accuracy"] - bins["confidence"]).abs(), weights=bins["cells"]))


def _pairs(true: npt.ArrayLike, predicted: npt.ArrayLike) -> tuple[Labels, Labels]:
    true, predicted = np.asarray(true, dtype=str), np.asarray(predicted, dtype=str)
    if true.shape != predicted.shape or not true.size:
        raise ValueError(f"expected a true and a predicted type for each cell, found {true.shape}, {predicted.shape}")
    return true, predicted
