"""The probe: scikit-learn's logistic regression on standardized embeddings, whatever classes and donors there are."""

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scgpt_hf.training.finetuning.calibration import calibration_error
from scgpt_hf.training.finetuning.probe import FEW_CELLS_STRENGTH, MIN_CELLS_TO_CHOOSE, STRENGTHS, fit_probe


def sample(n_cells: int, n_classes: int, seed: int = 0, spread: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """Return embeddings, (cells, 12), of very different scales, one of them constant, and classes, (cells,)."""
    rng = np.random.default_rng(seed)
    classes = np.concatenate([np.arange(n_classes), rng.integers(0, n_classes, n_cells - n_classes)])
    centres = np.random.default_rng(99).normal(size=(n_classes, 12))
    embedding = centres[classes] + spread * rng.normal(size=(n_cells, 12))
    embedding *= np.logspace(-2, 2, 12)
    embedding[:, 3] = 7.1
    return embedding.astype(np.float32), classes


@pytest.mark.parametrize("n_classes", [2, 5])
@pytest.mark.parametrize("balanced", [True, False])
def test_its_logits_are_those_of_scikit_learn_over_the_temperature(n_classes: int, balanced: bool) -> None:
    embedding, classes = sample(200, n_classes)
    probe = fit_probe(embedding, classes, None, balanced=balanced, seed=0)
    assert probe.strength in STRENGTHS
    weight = "balanced" if balanced else None
    expected = make_pipeline(StandardScaler(), LogisticRegression(C=probe.strength, class_weight=weight, max_iter=1000))
    decision = expected.fit(embedding.astype(np.float64), classes).decision_function(embedding.astype(np.float64))
    logits = probe.logits(embedding) * probe.temperature
    found = logits[:, 1] - logits[:, 0] if n_classes == 2 else logits
    np.testing.assert_allclose(found, decision, atol=1e-6)
    assert not probe.weight[:, 3].any()  # the constant feature


def test_cross_validation_regularizes_more_where_features_are_noise() -> None:
    clear, classes = sample(400, 4, spread=0.3)
    noise = np.random.default_rng(1).normal(size=(400, 200))
    strengths = [fit_probe(x, classes, None, balanced=True, seed=0).strength for x in (clear, noise)]
    assert strengths[0] >= 1
    assert strengths[1] == min(STRENGTHS)


def test_the_confidence_is_calibrated_on_other_cells() -> None:
    embedding, classes = sample(2000, 4, spread=2.5)
    probe = fit_probe(embedding[:200], classes[:200], None, balanced=False, seed=0)
    logits = probe.logits(embedding[200:])
    correct = logits.argmax(axis=1) == classes[200:]

    def error(scaled: np.ndarray) -> float:
        odds = np.exp(scaled - scaled.max(axis=1, keepdims=True))
        return calibration_error((odds / odds.sum(axis=1, keepdims=True)).max(axis=1), correct)

    assert 0.4 < correct.mean() < 0.9
    assert error(logits) < 0.06
    assert error(logits) < error(logits * probe.temperature)


def test_donors_stay_together_in_cross_validation() -> None:
    # One feature identifies the donor and with it the class; in another donor it means nothing.
    rng = np.random.default_rng(0)
    donors = np.repeat([f"donor{n}" for n in range(8)], 25).astype(object)
    classes = np.tile([0, 1], 100)
    of_donor = rng.normal(size=(8, 2, 30))
    codes = np.repeat(np.arange(8), 25)
    embedding = of_donor[codes, classes] + 0.1 * rng.normal(size=(200, 30))
    together = fit_probe(embedding, classes, donors, balanced=True, seed=0)
    apart = fit_probe(embedding, classes, None, balanced=True, seed=0)
    assert together.strength < apart.strength
    assert together.temperature > apart.temperature  # less confident of cells of other donors


def test_a_few_cells_have_a_fixed_regularization() -> None:
    embedding, classes = sample(MIN_CELLS_TO_CHOOSE - 1, 3)
    assert fit_probe(embedding, classes, None, balanced=True, seed=0).strength == FEW_CELLS_STRENGTH[True]
    alone = fit_probe(embedding[:3], classes[:3], None, balanced=True, seed=0)  # one cell of each class: no folds
    assert classes[:3].tolist() == [0, 1, 2]
    assert alone.temperature == 1
    assert alone.logits(embedding[:3]).argmax(axis=1).tolist() == [0, 1, 2]
    # Two cells of each class, and more donors than that: as many folds as a class has cells.
    pairs, donors = np.array([0, 0, 1, 1, 2, 2]), np.array([*"abcabc"], dtype=object)
    assert np.isfinite(fit_probe(embedding[:6], pairs, donors, balanced=True, seed=0).weight).all()


def test_classes_that_a_fold_lacks_do_not_stop_it() -> None:
    embedding, classes = sample(100, 3)
    classes[:2] = 3  # two cells, of one donor
    donors = np.array(["one", "one"] + ["two", "three"] * 49, dtype=object)
    probe = fit_probe(embedding, classes, donors, balanced=True, seed=0)
    assert np.isfinite(probe.logits(embedding)).all()
    assert f1_score(classes, probe.logits(embedding).argmax(axis=1), average="macro") > 0.6
    # Each donor has its own class, so no fold of donors can be scored: the folds are of cells.
    alone = fit_probe(embedding, classes % 2, np.where(classes % 2, "one", "two").astype(object), balanced=True, seed=0)
    assert alone.strength in STRENGTHS
    assert alone.temperature != 1


def test_the_global_random_state_has_no_effect() -> None:
    embedding, classes = sample(300, 4)
    np.random.seed(1)
    one = fit_probe(embedding, classes, None, balanced=True, seed=3)
    np.random.seed(2)
    again = fit_probe(embedding, classes, None, balanced=True, seed=3)
    assert np.array_equal(one.weight, again.weight)
    assert one.temperature == again.temperature
