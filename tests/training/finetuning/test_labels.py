"""Labelled cells: every cell is used or counted, no donor is divided, labels are in both parts."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.training.finetuning.labels import (
    LabelledCells,
    balanced_weights,
    keep_share,
    select_labelled,
)

pytestmark = pytest.mark.usefixtures("text_type")


def select(obs: pd.DataFrame, **changed: object) -> LabelledCells:
    defaults = {"donor_key": None, "validation_fraction": 0.3, "label_fraction": 1.0, "ignore_labels": ["unknown"]}
    return select_labelled(obs, "type", **{**defaults, "min_cells": 2, "seed": 0, **changed})


def obs_of(types: list[str | None], donors: list[str] | None = None) -> pd.DataFrame:
    table = {"type": types} | ({} if donors is None else {"donor_id": donors})
    return pd.DataFrame(table, index=pd.Index(range(10, 10 + len(types)), name="cell_id", dtype=np.int64))


@settings(deadline=None, max_examples=20)
@given(
    types=st.lists(st.sampled_from(["a", "b", "c", "d", "unknown", "", None]), min_size=1, max_size=60),
    n_donors=st.integers(1, 6),
    seed=st.integers(0, 5),
    label_fraction=st.sampled_from([0.1, 0.5, 1.0]),
)
def test_every_cell_is_used_once_or_counted(
    types: list[str | None], n_donors: int, seed: int, label_fraction: float
) -> None:
    obs = obs_of(types, [f"donor{cell % n_donors}" for cell in range(len(types))])
    try:
        cells = select(obs, seed=seed, label_fraction=label_fraction)
    except ValueError as error:
        if "labels" in str(error) or "training cells have only" in str(error):  # too few labels are left
            return
        raise
    used = np.concatenate(list(cells.parts.values()))
    assert len(set(used)) == len(used) == len(obs) - sum(cells.left_out.values())
    assert set(obs.loc[used, "type"]) <= set(cells.class_names)
    for part, ids in cells.parts.items():
        assert (np.diff(ids) > 0).all()
        assert [cells.class_names[index] for index in cells.classes(part)] == obs.loc[ids, "type"].tolist()
    assert set(cells.classes("train")) == set(range(len(cells.class_names)))
    if cells.donor_key is not None:
        donors = [set(obs.loc[ids, "donor_id"]) for ids in cells.parts.values()]
        assert not donors[0] & donors[1]


def test_whole_donors_are_held_out_and_most_labels_are_in_both_parts() -> None:
    # Of four donors, only the last two have the rare type: one of them has to be held out.
    obs = obs_of(["a", "b"] * 8 + ["a", "rare"] * 8, [donor for donor in "wxyz" for _ in range(8)])
    for seed in range(5):
        cells = select(obs, seed=seed, validation_fraction=0.25)
        assert cells.donor_key == "donor_id"
        assert {"rare"} < set(obs.loc[cells.parts["train"], "type"])
        n_shared = len(set(cells.classes("train")) & set(cells.classes("validation")))
        assert n_shared == 2


def test_with_one_donor_a_share_of_every_label_is_held_out(caplog: pytest.LogCaptureFixture) -> None:
    cells = select(obs_of(["a"] * 10 + ["b"] * 2 + ["c"] * 40, ["only"] * 52), validation_fraction=0.2)
    assert "say nothing about new donors" in caplog.text
    assert cells.donor_key is None
    assert np.bincount(cells.classes("validation")).tolist() == [2, 1, 8]
    assert np.bincount(cells.classes("train")).tolist() == [8, 1, 32]


def test_unlabelled_and_rare_cells_are_counted(caplog: pytest.LogCaptureFixture) -> None:
    cells = select(obs_of(["a"] * 5 + ["b"] * 5 + ["single"] + ["unknown", None, ""]))
    assert cells.class_names == ["a", "b"]
    assert cells.rare == {"single": 1}
    assert (cells.left_out["unlabelled"], cells.left_out["rare label"]) == (3, 1)
    assert "{'single': 1}" in caplog.text


def test_labels_that_only_held_out_donors_have_are_not_scored(caplog: pytest.LogCaptureFixture) -> None:
    # Each donor has a type that the other one lacks, so one of the two cannot be learned.
    obs = obs_of(["a", "b"] * 10 + ["x"] * 3 + ["y"] * 4, ["one"] * 10 + ["two"] * 10 + ["one"] * 3 + ["two"] * 4)
    cells = select(obs, validation_fraction=0.5)
    (lost,) = {"x", "y"} - set(cells.class_names)
    assert cells.left_out["label of held-out donors only"] == {"x": 3, "y": 4}[lost]
    assert f"['{lost}']" in caplog.text


def test_a_donor_with_a_type_of_its_own_is_not_held_out() -> None:
    obs = obs_of(["a", "b"] * 20 + ["x"] * 2, [donor for donor in "vwxyz" for _ in range(8)] + ["z"] * 2)
    for seed in range(5):
        cells = select(obs, seed=seed, validation_fraction=0.2)
        assert cells.class_names == ["a", "b", "x"]
        assert sum(cells.left_out.values()) == 0


@pytest.mark.parametrize(
    ("types", "message"),
    [
        (["a"] * 4, r"has only 'a' \(4 cells\)"),
        (["unknown", None], "has none"),
        (["a", "a", "single"], r"too few cells \(fewer than min_cells 2\) have {'single': 1}"),
    ],
)
def test_fewer_than_two_labels_raise(types: list[str | None], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(obs_of(types))


def test_labels_that_never_occur_in_two_donors_raise() -> None:
    obs = obs_of(["a"] * 4 + ["b"] * 4 + ["c"] * 4, ["x"] * 4 + ["y"] * 4 + ["z"] * 4)
    with pytest.raises(ValueError, match=r"no held-out cell has a label .* in obs\['donor_id'\]"):
        select(obs)


def test_messages_list_few_of_many_rare_labels(caplog: pytest.LogCaptureFixture) -> None:
    numbers = [str(number) for number in range(500)]
    with pytest.raises(ValueError, match="and 490 more") as error:
        select(obs_of(numbers))
    assert len(str(error.value)) < 600
    assert len(select(obs_of([*numbers, *"aabb"])).rare) == 500
    assert "and 490 more" in caplog.text
    assert "'77'" not in caplog.text


def test_a_label_that_no_training_donor_shares_raises() -> None:
    with pytest.raises(ValueError, match="training cells have only"):
        select(obs_of(["a"] * 4 + ["b"] * 4, ["one"] * 4 + ["two"] * 4))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.sampled_from("abc"), min_size=1, max_size=50), st.floats(0.05, 1), st.integers(0, 3))
def test_a_smaller_share_is_a_subset_of_a_larger_one(types: list[str], share: float, seed: int) -> None:
    labels = pd.Series(types, index=np.arange(len(types)))
    kept, more = keep_share(labels, share / 2, seed), keep_share(labels, share, seed)
    assert set(kept) <= set(more)
    for label in set(types):
        n = types.count(label)
        assert (labels.loc[more] == label).sum() == max(1, int(np.ceil(share * n - 1e-9)))


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 3), min_size=8, max_size=50))
def test_balanced_weights_are_those_of_scikit_learn(classes: list[int]) -> None:
    from sklearn.utils.class_weight import compute_class_weight

    all_classes = np.array([*classes, 0, 1, 2, 3])
    weights = balanced_weights(all_classes, 4)
    np.testing.assert_allclose(
        weights, compute_class_weight("balanced", classes=np.arange(4), y=all_classes), rtol=1e-6
    )
    assert weights[all_classes].mean() == pytest.approx(1, rel=1e-5)
