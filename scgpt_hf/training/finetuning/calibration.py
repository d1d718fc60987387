"""Confidence that can be believed: how far it is off, and the temperature that mends it.

The logits are divided by one temperature, fitted on held-out cells.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from scgpt_hf.cells.block import Int64Array

Logits = npt.NDArray[np.floating]

_RANGE = np.log(0.05), np.log(20.0)


def fit_temperature(logits: Logits, classes: Int64Array) -> float:
    """Return the temperature at which the softmax of the logits best predicts the classes of held-out cells.

    Minimises the negative log-likelihood, with one pseudo-cell of every class for all cells together, so that a few
    cells which are all told rightly do not make the confidence 1.

    Args:
        logits: of held-out cells. Shape (cells, classes).
        classes: their classes. Shape (cells,).

    Returns:
        The temperature, in [0.05, 20]; above 1 where the model was too sure of itself.

    Source: Guo et al. 2017, arXiv:1706.04599; the pseudo-cells as in Platt 1999 for two classes.
    """
    n_cells, n_classes = logits.shape
    targets = np.full(logits.shape, 1 / (n_cells + n_classes))
    targets[np.arange(n_cells), classes] += n_cells / (n_cells + n_classes)

    def nll(log_temperature: float) -> float:
        return float(-(targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum(axis=1).mean())

    return float(np.exp(minimize_scalar(nll, bounds=_RANGE, method="bounded").x))


def reliability(confidence: npt.ArrayLike, correct: npt.ArrayLike, n_bins: int = 15) -> pd.DataFrame:
    """Return mean `confidence`, `accuracy` and number of `cells` of each bin of confidence that holds a cell.

    The index is the number of the bin, from 0.

    Args:
        confidence: of each prediction, in [0, 1]. Shape (cells,).
        correct: whether it is right. Shape (cells,).
        n_bins: bins of equal width, closed to the right.

    Raises:
        ValueError: no cell, not one truth for each confidence, or a confidence outside [0, 1].

    Source: 15 bins as in Guo et al. 2017.
    """
    confidence, correct = np.asarray(confidence, dtype=float), np.asarray(correct, dtype=bool)
    if confidence.shape != correct.shape or not confidence.size:
        raise ValueError(f"expected a confidence and a truth for each cell, found {confidence.shape}, {correct.shape}")
    if not ((confidence >= 0) & (confidence <= 1)).all():
        raise ValueError(f"expected confidences in [0, 1], found {np.min(confidence):g} to {np.max(confidence):g}")
    places = np.clip(np.ceil(confidence * n_bins).astype(int) - 1, 0, n_bins - 1)
    table = pd.DataFrame({"confidence": confidence, "accuracy": correct.astype(float), "cells": 1}).groupby(places)
    return table.agg({"confidence": "mean", "accuracy": "mean", "cells": "sum"})


def calibration_error(confidence: npt.ArrayLike, correct: npt.ArrayLike, n_bins: int = 15) -> float:
    """Return the expected calibration error: |accuracy − confidence| of each bin, weighted by its cells.

    Raises:
        ValueError: as `reliability`.

    Source: Naeini et al. 2015, AAAI 29:2901; Guo et al. 2017, eq. 3.
    """
    bins = reliability(confidence, correct, n_bins)
    return float(np.average((bins["accuracy"] - bins["confidence"]).abs(), weights=bins["cells"]))
