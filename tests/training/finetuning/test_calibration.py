"""Calibration: the fitted temperature is the true one, and a few correct cells do not make the confidence 1."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from scgpt_hf.training.finetuning.calibration import calibration_error, fit_temperature, reliability


def overconfident_logits(temperature: float, n_cells: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Return logits that are overconfident by a factor, and classes drawn from the correct probabilities."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n_cells, 4)) * 2
    classes = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return logits * temperature, classes


def error_of(logits: np.ndarray, classes: np.ndarray) -> float:
    return calibration_error(softmax(logits, axis=1).max(axis=1), logits.argmax(axis=1) == classes)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_fitted_temperature_is_the_true_one_and_calibrates(temperature: float) -> None:
    logits, classes = overconfident_logits(temperature, 20_000)
    found = fit_temperature(logits, classes)
    assert found == pytest.approx(temperature, rel=0.05)
    after = error_of(logits / found, classes)
    assert after < 0.02
    if temperature != 1:
        assert after < error_of(logits, classes) / 3


@settings(deadline=None, max_examples=20)
@given(st.integers(5, 60), st.integers(0, 10))
def test_no_other_temperature_has_a_lower_nll(n_cells: int, seed: int) -> None:
    logits, classes = overconfident_logits(2.0, n_cells, seed)
    targets = (np.eye(4)[classes] * n_cells + 1) / (n_cells + 4)

    def nll(temperature: float) -> float:
        return float(-(targets * log_softmax(logits / temperature, axis=1)).sum(axis=1).mean())

    best = min(nll(temperature) for temperature in np.geomspace(0.05, 20, 200))
    assert nll(fit_temperature(logits, classes)) <= best + 1e-6


def test_a_few_cells_that_are_all_correct_do_not_make_the_confidence_1() -> None:
    logits, classes = np.eye(3)[[0, 1, 2, 0]] * 50, np.array([0, 1, 2, 0])
    confidence = softmax(logits / fit_temperature(logits, classes), axis=1).max()
    assert 0.6 < confidence < 0.95


def test_calibration_error_of_a_worked_example() -> None:
    confidence, correct = [0.95, 0.85, 0.85, 0.15], [True, True, False, False]
    bins = reliability(confidence, correct)
    assert bins.index.tolist() == [2, 12, 14]
    assert bins["accuracy"].tolist() == [0, 0.5, 1]
    assert bins["cells"].tolist() == [1, 2, 1]
    assert calibration_error(confidence, correct) == pytest.approx((0.15 + 2 * 0.35 + 0.05) / 4)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), min_size=1, max_size=50), st.integers(1, 12))
def test_each_confidence_is_counted_in_its_bin(cells: list[tuple[float, bool]], n_bins: int) -> None:
    confidence, correct = map(np.array, zip(*cells, strict=True))
    bins = reliability(confidence, correct, n_bins)
    assert bins["cells"].sum() == len(cells)
    assert (
        (bins["confidence"] >= bins.index / n_bins - 1e-9) & (bins["confidence"] <= (bins.index + 1) / n_bins + 1e-9)
    ).all()
    assert (bins["accuracy"] * bins["cells"]).sum() == pytest.approx(correct.sum())


@pytest.mark.parametrize(
    ("confidence", "correct", "message"),
    [
        ([], [], "found shapes"),
        ([0.5], [True, False], "found shapes"),
        ([1.5], [True], "1.5"),
    ],
)
def test_values_that_are_no_confidences_raise(confidence: list[float], correct: list[bool], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibration_error(confidence, correct)
