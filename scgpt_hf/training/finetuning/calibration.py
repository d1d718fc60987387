"""Calibrate the confidence of a classifier: measure its error, and fit the temperature that corrects it.

The logits are divided by one temperature, which is fitted on held-out cells.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from scgpt_hf.cells.block import Int64Array

Logits = npt.NDArray[np.floating]

# Bounds of the logarithm of the temperature.
_RANGE = np.log(0.05), np.log(20.0)


def fit_temperature(logits: Logits, classes: Int64Array) -> float:
    """Fit the temperature at which the softmax of the logits best predicts the classes of held-out cells.

    Minimizes the negative log-likelihood. The targets include one pseudo-cell of every class, spread over all cells,
    because with a few cells that are all predicted correctly the best temperature would be 0 and the confidence 1.

    Args:
        logits: logits of held-out cells. Shape (cells, classes).
        classes: class ids of the same cells. Shape (cells,).

    Returns:
        The temperature, in [0.05, 20]; above 1 if the model is overconfident.

    Source: Guo et al. 2017, arXiv:1706.04599; pseudo-cells as in Platt 1999 for two classes.
    """
    n_cells, n_classes = logits.shape
    targets = np.full(logits.shape, 1 / (n_cells + n_classes))
    targets[np.arange(n_cells), classes] += n_cells / (n_cells + n_classes)

    def nll(log_temperature: float) -> float:
        return float(-(targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum(axis=1).mean())

    return float(np.exp(minimize_scalar(nll, bounds=_RANGE, method="bounded").x))


def reliability(confidence: npt.ArrayLike, correct: npt.ArrayLike, n_bins: int = 15) -> pd.DataFrame:
    """Return the reliability diagram as a table: one row for each bin of confidence that holds a cell.

    Args:
        confidence: confidence of each prediction, in [0, 1]. Shape (cells,).
        correct: whether the prediction is correct. Shape (cells,).
        n_bins: number of bins of equal width, closed on the right.

    Returns:
        Mean `confidence`, `accuracy` and number of `cells`, indexed by the number of the bin, from 0.

    Raises:
        ValueError: there is no cell, the shapes differ, or a confidence is outside [0, 1].

    Source: 15 bins as in Guo et al. 2017.
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    if confidence.shape != correct.shape or not confidence.size:
        raise ValueError(
            f"expected one confidence and one truth value per cell, found shapes {confidence.shape} and {correct.shape}"
        )
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"expected confidences in [0, 1], found {np.min(confidence):g} to {np.max(confidence):g}")
    bin_of_cell = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    table = pd.DataFrame({"confidence": confidence, "accuracy": correct.astype(float), "cells": 1}).groupby(bin_of_cell)
    return table.agg({"confidence": "mean", "accuracy": "mean", "cells": "sum"})


def calibration_error(confidence: npt.ArrayLike, correct: npt.ArrayLike, n_bins: int = 15) -> float:
    """Return the expected calibration error: the mean of |accuracy − confidence| over bins, weighted by their cells.

    Args:
        confidence: confidence of each prediction, in [0, 1]. Shape (cells,).
        correct: whether the prediction is correct. Shape (cells,).
        n_bins: number of bins of equal width.

    Raises:
        ValueError: see `reliability`.

    Source: Naeini et al. 2015, AAAI 29:2901; Guo et al. 2017, eq. 3.
    """
    bins = reliability(confidence, correct, n_bins)
    return float(np.average((bins["accuracy"] - bins["confidence"]).abs(), weights=bins["cells"]))
