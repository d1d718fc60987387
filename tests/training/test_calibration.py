"""The temperature finds the true one, and nothing rates a few right cells as certainty."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import log_softmax, softmax

from scgpt_hf.training.calibration import expected_calibration_error, fit_temperature


def draw(temperature: float, n_cells: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are too sure of themselves by a factor, and classes drawn from what they should have been."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(n_cells, 4)) * 2
    classes = (logits + rng.gumbel(size=logits.shape)).argmax(axis=1)
    return logits * temperature, classes


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_the_temperature_is_found_and_calibrates(temperature: float) -> None:
    logits, classes = draw(temperature, 20_000)
    found = fit_temperature(logits, classes)
    assert found == pytest.approx(temperature, rel=0.05)
    after = expected_calibration_error(logits / found, classes)
    assert after < 0.02
    if temperature != 1:
        assert after < expected_calibration_error(logits, classes) / 3


@settings(deadline=None, max_examples=20)
@given(st.integers(5, 60), st.integers(0, 10))
def test_no_temperature_of_a_grid_is_better(n_cells: int, seed: int) -> None:
    logits, classes = draw(2.0, n_cells, seed)
    targets = (np.eye(4)[classes] * n_cells + 1) / (n_cells + 4)

    def surprise(temperature: float) -> float:
        return float(-(targets * log_softmax(logits / temperature, axis=1)).sum(axis=1).mean())

    best = min(surprise(temperature) for temperature in np.geomspace(0.05, 20, 200))
    assert surprise(fit_temperature(logits, classes)) <= best + 1e-6


def test_a_few_cells_that_are_all_right_are_no_certainty() -> None:
    logits, classes = np.eye(3)[[0, 1, 2, 0]] * 50, np.array([0, 1, 2, 0])
    confidence = softmax(logits / fit_temperature(logits, classes), axis=1).max()
    assert 0.6 < confidence < 0.95


def test_the_calibration_error_of_a_worked_case() -> None:
    logits = np.log([[0.9, 0.1], [0.9, 0.1], [0.4, 0.6]])
    assert expected_calibration_error(logits, np.array([0, 1, 1])) == pytest.approx((2 * 0.4 + 0.4) / 3)
