"""Cell types predicted across donors and from a reference: who is trained on whom, and which cells are scored."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.scoring import probing
from scgpt_hf.scoring.metrics import NotComputable
from scgpt_hf.scoring.probing import CLASSIFIERS, predict_held_out, predict_query

rng = np.random.default_rng(0)
types = np.tile(["T", "B", "NK"], 40)
donors = np.repeat([f"donor {n}" for n in range(6)], 20)
cells = rng.normal(size=(120, 4)) + 8 * np.eye(4)[np.tile([0, 1, 2], 40)]


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("uvwxyz")), min_size=2, max_size=40))
def test_a_classifier_is_never_trained_on_the_donor_and_always_on_the_type(pairs: list[tuple[str, str]]) -> None:
    labels, groups = map(np.array, zip(*pairs, strict=True))
    features = np.arange(len(pairs), dtype=float)[:, None]
    folds = []

    def record(
        train: np.ndarray, known: np.ndarray, test: np.ndarray, classifier: str
    ) -> tuple[np.ndarray, np.ndarray]:
        folds.append((train[:, 0].astype(int), test[:, 0].astype(int)))
        return np.resize(known, len(test)), np.ones(len(test))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(probing, "_predict", record)
        try:
            predictions = predict_held_out(features, labels, groups, "kNN")
        except NotComputable:
            return
    for train, test in folds:
        assert len(set(groups)) == 1 or not set(groups[train]) & set(groups[test])
        assert set(labels[test]) <= set(labels[train])
    assert sorted(predictions.cells) == sorted(cell for _, test in folds for cell in test)
    assert len(set(predictions.cells)) == len(predictions.cells)
    assert sum(predictions.left_out.values()) == len(labels) - len(predictions.cells)


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_separable_types_are_predicted_without_error(classifier: probing.Classifier) -> None:
    predictions = predict_held_out(cells, types, donors, classifier)
    assert predictions.macro_f1 == predictions.accuracy == 1


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_noise_predicts_nothing(classifier: probing.Classifier) -> None:
    predictions = predict_held_out(np.random.default_rng(1).normal(size=(120, 4)), types, donors, classifier)
    assert max(predictions.macro_f1, predictions.accuracy) < 0.55


def test_the_protocol_states_how_donors_were_held_out() -> None:
    assert predict_held_out(cells, types, donors, "kNN").protocol == "5 folds by donor (6 donors)"
    assert "one donor" in predict_held_out(cells, types, ["me"] * 120, "kNN").protocol
    two = predict_held_out(cells, types, np.repeat(["x", "y"], 60), "kNN")
    assert two.protocol == "2 folds by donor (2 donors)"


def test_a_type_of_a_single_donor_is_counted_but_not_scored() -> None:
    labels = np.where(donors == "donor 0", "only here", types)
    predictions = predict_held_out(cells, labels, donors, "kNN")
    assert predictions.left_out == {"only here": 20}
    assert "only here" not in predictions.true
    assert len(predictions.cells) == 100


@pytest.mark.parametrize("labels", [["T"] * 120, np.where(donors == "donor 0", "B", "T")])
def test_fewer_than_two_types_cannot_be_scored(labels: list[str]) -> None:
    with pytest.raises(NotComputable, match="kNN macro-F1 cannot be computed: fewer than two types"):
        predict_held_out(cells, labels, donors, "kNN")


def test_types_with_one_cell_each_cannot_be_scored() -> None:
    with pytest.raises(NotComputable, match="fewer than two types"):
        predict_held_out(cells[:4], ["a", "b", "c", "d"], ["me"] * 4, "linear probe")


@pytest.mark.parametrize("classifier", CLASSIFIERS)
def test_a_query_is_predicted_and_types_that_the_reference_lacks_are_counted(classifier: probing.Classifier) -> None:
    reference, known = cells[types != "NK"][:60], types[types != "NK"][:60]
    known = np.where(known == "T", "a T cell with a long name, longer than any of the query", known)
    query_types = np.where(types == "T", "a T cell with a long name, longer than any of the query", types)
    predictions = predict_query(reference, known, cells, query_types, classifier)
    assert predictions.macro_f1 == 1
    assert predictions.left_out == {"NK": 40}
    assert predictions.protocol == "trained on 60 cells of the reference"


def test_long_names_of_the_reference_are_not_truncated() -> None:
    known = np.where(types == "T", "T", "quite a long name")
    predictions = predict_query(cells, known, cells[::-1], np.resize(["T", "quite a long name"], 120), "kNN")
    assert set(predictions.predicted) == {"T", "quite a long name"}


def test_invalid_input_raises() -> None:
    with pytest.raises(NotComputable, match=r"no type in common: \['B', 'NK', 'T'\] and \['t'\]"):
        predict_query(cells, types, cells, ["t"] * 120, "kNN")
    with pytest.raises(NotComputable, match="only one type: 'T'"):
        predict_query(cells, ["T"] * 120, cells, types, "kNN")
    with pytest.raises(ValueError, match="the reference has 4 features, the query 2"):
        predict_query(cells, types, cells[:, :2], types, "kNN")
    with pytest.raises(ValueError, match=r"a label and a donor for each cell, found shapes \(120,\), \(3,\)"):
        predict_held_out(cells, types, donors[:3], "kNN")
    with pytest.raises(ValueError, match="1 of 120 cells have NaN or infinity"):
        predict_held_out(np.where(np.arange(120)[:, None] == 3, np.inf, cells), types, donors, "kNN")
