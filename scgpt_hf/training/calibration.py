"""Confidence that can be believed: one temperature, fitted on held-out cells, that the logits are divided by."""

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax

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

    def surprise(log_temperature: float) -> float:
        return float(-(targets * log_softmax(logits / np.exp(log_temperature), axis=1)).sum(axis=1).mean())

    return float(np.exp(minimize_scalar(surprise, bounds=_RANGE, method="bounded").x))


def reliability(logits: Logits, classes: Int64Array, n_bins: int = 15) -> dict[str, list[float]]:
    """Return confidence, accuracy and number of cells of the bins of equal width of confidence that hold any cell.

    Args:
        logits: shape (cells, classes).
        classes: shape (cells,).
        n_bins: of the interval [0, 1].

    Source: 15 bins as in Guo et al. 2017.
    """
    probability = softmax(logits, axis=1)
    confidence, right = probability.max(axis=1), probability.argmax(axis=1) == classes
    of_cell = np.minimum((confidence * n_bins).astype(np.int64), n_bins - 1)
    cells = np.bincount(of_cell, minlength=n_bins)
    held = cells > 0
    means = [np.bincount(of_cell, values, minlength=n_bins)[held] / cells[held] for values in (confidence, right)]
    return {"confidence": means[0].tolist(), "accuracy": means[1].tolist(), "cells": cells[held].tolist()}


def expected_calibration_error(logits: Logits, classes: Int64Array) -> float:
    """Return how far confidence and accuracy are apart, averaged over the cells of the bins of `reliability`.

    Source: Naeini et al. 2015, AAAI 29:2901.
    """
    confidence, accuracy, cells = (np.asarray(values) for values in reliability(logits, classes).values())
    return float(np.average(np.abs(confidence - accuracy), weights=cells))
