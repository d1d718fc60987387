"""Simple predictors: where they apply, and what they return."""

import numpy as np
import pytest

from scgpt_hf.perturbation.evaluation.baselines import (
    BASELINES,
    RIDGE,
    Training,
    additive,
    mean_of_training,
    nearest_targets,
    ridge_linear,
)

RANDOM = np.random.default_rng(0)
GENES = {name: number for number, name in enumerate("ABCDEFGH")}


def make_training(*conditions: tuple[str, ...]) -> Training:
    deltas = {one: RANDOM.normal(size=len(GENES)) for one in conditions}
    base = RANDOM.random(len(GENES))
    return Training(deltas, np.stack([base, *(base + delta for delta in deltas.values())]), GENES)


def test_the_additive_model_adds_what_it_knows() -> None:
    training = make_training(("A",), ("B",), ("C", "D"))
    np.testing.assert_allclose(additive(training, ("A", "B")), training.deltas[("A",)] + training.deltas[("B",)])
    np.testing.assert_allclose(additive(training, ("A", "C")), training.deltas[("A",)])
    assert additive(training, ("C",)) is None


def test_the_mean_is_over_all_training_conditions() -> None:
    training = make_training(("A",), ("B", "C"))
    np.testing.assert_allclose(mean_of_training(training, ("H",)), np.mean(list(training.deltas.values()), axis=0))


def test_the_nearest_target_correlates_most() -> None:
    training = make_training(("A",), ("B",), ("C",), ("D",), ("E",))
    values = training.profiles
    near = sorted("ABCDE", key=lambda one: -np.corrcoef(values[:, GENES["F"]], values[:, GENES[one]])[0, 1])
    expected = np.mean([training.deltas[one,] for one in near[:3]], axis=0)
    np.testing.assert_allclose(nearest_targets(training, ("F",)), expected)
    assert nearest_targets(training, ("OUTSIDE",)) is None


def test_ridge_equals_a_slow_version() -> None:
    training = make_training(("A",), ("B",), ("C", "D"), ("E",), ("OUTSIDE",))
    usable = [one for one in training.deltas if "OUTSIDE" not in one]
    centered = training.profiles - training.profiles.mean(axis=0)
    u, s, _ = np.linalg.svd(centered.T, full_matrices=False)
    vectors = (u * s)[:, :10]
    inputs = np.stack([sum(vectors[GENES[gene]] for gene in one) for one in usable])
    offset = np.mean(list(training.deltas.values()), axis=0)
    responses = np.stack([training.deltas[one] - offset for one in usable], axis=1)
    penalty = RIDGE * np.eye(vectors.shape[1])
    weights = np.linalg.inv(vectors.T @ vectors + penalty) @ vectors.T @ responses @ inputs
    weights = weights @ np.linalg.inv(inputs.T @ inputs + penalty)
    expected = vectors @ weights @ vectors[GENES["F"]] + offset
    np.testing.assert_allclose(ridge_linear(training, ("F",)), expected, atol=1e-8)
    assert ridge_linear(training, ("OUTSIDE",)) is None


@pytest.mark.parametrize("name", list(BASELINES))
def test_every_baseline_returns_a_delta_or_nothing(name: str) -> None:
    training = make_training(("A",), ("B",), ("C",))
    for condition in (("A", "B"), ("D",), ("OUTSIDE",), ("A", "OUTSIDE")):
        found = BASELINES[name](training, condition)
        assert found is None or (found.shape == (len(GENES),) and np.isfinite(found).all())
