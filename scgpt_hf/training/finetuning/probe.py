"""Fit a probe: a multinomial logistic regression on the frozen cell embedding, as the weights of a linear class head.

Arrays come in and go out; `annotate.py` embeds the cells and writes the weights into the model. All choices are made
among the cells that are passed: cross-validation chooses the regularization, and its logits fit the temperature.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import log_softmax
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.training.finetuning.calibration import fit_temperature
from scgpt_hf.training.finetuning.labels import balanced_weights

Float64Array = npt.NDArray[np.float64]
Fold = tuple[Int64Array, Int64Array]  # positions of the training cells, and of the cells to predict

# Values of `C`, the inverse strength of the regularization, to choose from; scikit-learn's default is 1.
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
# With fewer cells, cross-validation chooses at random. The value is then fixed, with and without equal class weights.
# On 13 cells of OneK1K (six samples), C = 0.01 has a macro-F1 of 0.84 with equal class weights, and the value chosen by
# cross-validation 0.80. Without class weights a small C predicts the most frequent class only.
MIN_CELLS_TO_CHOOSE = 30
FEW_CELLS_STRENGTH = {True: 0.01, False: 1.0}
# Cross-validation uses at most this number of cells, and the final fit all cells.
MAX_CELLS_TO_CHOOSE = 5_000
_N_FOLDS = 5
_MAX_ITERATIONS = 1_000


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear classifier of cell embeddings.

    Attributes:
        weight: weights of the embedding as the encoder returns it, divided by the temperature. Shape (classes, hidden).
        bias: bias of each class, divided by the temperature. Shape (classes,).
        strength: inverse strength of the regularization, `C` in scikit-learn.
        temperature: calibrates the confidence.
    """

    weight: Float64Array
    bias: Float64Array
    strength: float
    temperature: float

    def logits(self, embedding: npt.NDArray[np.floating]) -> Float64Array:
        """Return calibrated logits, (cells, classes), of embeddings, (cells, hidden)."""
        return np.asarray(embedding @ self.weight.T + self.bias)


def fit_probe(
    embedding: npt.NDArray[np.floating],
    classes: Int64Array,
    donors: npt.NDArray[np.object_] | None,
    *,
    balanced: bool,
    seed: int,
) -> Probe:
    """Fit a calibrated multinomial logistic regression on cell embeddings.

    The embedding is standardized, and the weights include the standardization. The regularization is the one with the
    lowest log loss in cross-validation, and the temperature is fitted to the same out-of-fold logits. Cells of one
    donor are in one fold if there are several donors. With few cells the regularization is fixed. If no class has two
    cells, there are no folds, and the temperature is 1.

    Args:
        embedding: embedding of each cell, not normalized. Shape (cells, hidden).
        classes: class id of each cell. Every class 0, 1, ... occurs, and there are at least two. Shape (cells,).
        donors: donor of each cell; None if it is not known. Shape (cells,).
        balanced: whether all classes have the same total weight.
        seed: determines the folds.

    Returns:
        The probe; the same on every process that passes the same arguments.

    Example:
        >>> embedding, classes = np.array([[0.0], [0.2], [2.0], [2.2]]), np.array([0, 0, 1, 1])
        >>> fit_probe(embedding, classes, None, balanced=True, seed=0).logits(embedding).argmax(axis=1)
        array([0, 0, 1, 1])

    Source: Alain & Bengio 2016, arXiv:1610.01644, for linear probes; `sklearn.linear_model.LogisticRegression`.
    """
    embedding = np.asarray(embedding, dtype=np.float64)
    centre, scale = embedding.mean(axis=0), embedding.std(axis=0)
    # A feature that is constant up to rounding gets the weight 0.
    scale[scale <= np.finfo(np.float32).eps * np.abs(embedding).max(axis=0)] = np.inf
    features = (embedding - centre) / scale
    chosen = np.sort(np.random.default_rng(seed).permutation(len(classes))[:MAX_CELLS_TO_CHOOSE])
    folds = _make_folds(classes[chosen], None if donors is None else donors[chosen], seed)
    choose = len(classes) >= MIN_CELLS_TO_CHOOSE and len(folds) > 0
    strengths = STRENGTHS if choose else (FEW_CELLS_STRENGTH[balanced],)
    held_out = _predict_held_out(features[chosen], classes[chosen], folds, strengths, balanced)
    weights = balanced_weights(classes, classes.max() + 1) if balanced else np.ones(classes.max() + 1)
    strength = min(strengths, key=lambda one: _log_loss(*held_out[one], weights)) if choose else strengths[0]
    temperature = fit_temperature(*held_out[strength]) if folds else 1.0
    weight, bias = _weights(_fit(_new_model(strength, balanced), features, classes))
    weight = weight / scale / temperature
    return Probe(weight, bias / temperature - weight @ centre, strength, temperature)


def _make_folds(classes: Int64Array, donors: npt.NDArray[np.object_] | None, seed: int) -> list[Fold]:
    """Return the folds that can be used: with two or more classes in training, and a cell of one of them to predict."""
    n_donors = 0 if donors is None else len(set(donors))
    most = min(_N_FOLDS, int(np.bincount(classes).max()))  # scikit-learn needs a class with as many cells as folds
    for n_folds, grouped in ((min(n_donors, most), True), (most, False)):
        if n_folds < 2:
            continue
        splitter = (StratifiedGroupKFold if grouped else StratifiedKFold)(n_folds, shuffle=True, random_state=seed)
        with warnings.catch_warnings():
            # A class with fewer cells than folds is predicted in some folds only.
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            folds = list(splitter.split(classes, classes, donors if grouped else None))
        folds = [
            (train, test[np.isin(classes[test], classes[train])])
            for train, test in folds
            if len(set(classes[train])) > 1 and np.isin(classes[test], classes[train]).any()
        ]
        if folds:
            return folds
    return []


def _predict_held_out(
    features: Float64Array, classes: Int64Array, folds: list[Fold], strengths: Sequence[float], balanced: bool
) -> dict[float, tuple[Float64Array, Int64Array]]:
    """Return, for each strength, the out-of-fold logits of all predicted cells, and their classes.

    A class that the training cells of a fold lack gets the lowest logit of the cell.
    """
    logits: dict[float, list[Float64Array]] = {strength: [] for strength in strengths}
    for train, test in folds:
        model = _new_model(strengths[0], balanced)
        model.warm_start = True  # the weights of one strength are a good start for the next one
        for strength in strengths:
            model.C = strength
            weight, bias = _weights(_fit(model, features[train], classes[train]))
            known = features[test] @ weight.T + bias
            of_all = np.repeat(known.min(axis=1, keepdims=True), classes.max() + 1, axis=1)
            of_all[:, model.classes_] = known
            logits[strength].append(of_all)
    predicted = np.concatenate([classes[test] for _, test in folds]) if folds else classes[:0]
    return {strength: (np.concatenate(parts), predicted) for strength, parts in logits.items() if parts}


def _new_model(strength: float, balanced: bool) -> LogisticRegression:
    return LogisticRegression(C=strength, class_weight="balanced" if balanced else None, max_iter=_MAX_ITERATIONS)


def _fit(model: LogisticRegression, features: Float64Array, classes: Int64Array) -> LogisticRegression:
    with warnings.catch_warnings():
        # A model that has not converged is scored like any other.
        warnings.simplefilter("ignore", ConvergenceWarning)
        return model.fit(features, classes)


def _weights(model: LogisticRegression) -> tuple[Float64Array, Float64Array]:
    """Return weights, (classes, features), and biases, (classes,), of a fitted model."""
    if len(model.classes_) > 2:
        return model.coef_, model.intercept_
    # Of two classes, scikit-learn stores the difference of the logits only.
    return np.concatenate([-model.coef_, model.coef_]) / 2, np.concatenate([-model.intercept_, model.intercept_]) / 2


def _log_loss(logits: Float64Array, classes: Int64Array, class_weights: npt.NDArray[np.floating]) -> float:
    nll = -log_softmax(logits, axis=1)[np.arange(len(classes)), classes]
    return float(np.average(nll, weights=class_weights[classes]))
