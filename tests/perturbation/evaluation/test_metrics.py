"""Metrics of effects: what a perfect, an opposite and a constant prediction score."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.perturbation.evaluation.metrics import METRICS, discriminate, mean_scores, pearson, score_delta, top_genes

TRUE = np.random.default_rng(0).normal(size=50)
TOP = top_genes(TRUE)


def test_a_perfect_prediction_has_the_best_score_of_every_metric() -> None:
    found = score_delta(TRUE, TRUE, TOP)
    best = {"pearson_delta": 1, "pearson_top20": 1, "l2": 0, "mse": 0, "mse_top20": 0, "direction_top20": 1}
    assert found == pytest.approx(best)
    assert set(best) | {"discrimination"} == set(METRICS)


def test_the_opposite_prediction_has_the_wrong_direction() -> None:
    found = score_delta(-TRUE, TRUE, TOP)
    assert found["pearson_delta"] == pytest.approx(-1)
    assert found["direction_top20"] == 0
    assert found["l2"] == pytest.approx(2 * np.linalg.norm(TRUE))


def test_no_change_has_no_correlation_and_is_half_right() -> None:
    found = score_delta(np.zeros(50), TRUE, TOP)
    assert np.isnan(found["pearson_delta"])
    assert found["direction_top20"] == 0.5
    assert found["mse"] == pytest.approx(np.mean(TRUE**2))


@settings(deadline=None)
@given(st.integers(0, 100))
def test_pearson_equals_numpy(seed: int) -> None:
    one, other = np.random.default_rng(seed).normal(size=(2, 12))
    assert pearson(one, other) == pytest.approx(np.corrcoef(one, other)[0, 1])


def test_discrimination_counts_the_conditions_that_are_farther_away() -> None:
    true = {name: np.full(3, float(number)) for number, name in enumerate("abcde")}
    assert discriminate(np.full(3, 0.1), true, "a") == 1
    assert discriminate(np.full(3, 3.9), true, "a") == 0
    assert discriminate(np.full(3, 2.0), true, "b") == pytest.approx((2 + 0.5) / 4)
    assert np.isnan(discriminate(np.zeros(3), {"a": np.zeros(3)}, "a"))


def test_means_leave_out_what_is_not_defined() -> None:
    found = mean_scores([{"l2": 1.0, "pearson_delta": float("nan")}, {"l2": 3.0}])
    assert found["l2"] == 2
    assert found["pearson_delta"] is None
