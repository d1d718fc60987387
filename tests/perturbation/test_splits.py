"""Splits: categories of GEARS, nothing leaks from held-out conditions, and clear errors."""

from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.perturbation.conditions import parse_condition
from scgpt_hf.perturbation.splits import CATEGORIES, ConditionSplit, SplitKind, categorize, fold_genes, split_conditions

NAMES = ["A+ctrl", "B+ctrl", "C+ctrl", "D+ctrl", "E+ctrl", "A+B", "C+D", "A+F", "F+G", "B+C"]


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([one for one in get_args(SplitKind) if one not in ("none", "leave_out")]), st.integers(0, 200))
def test_every_condition_is_in_one_part_and_has_the_category_it_claims(kind: Any, seed: int) -> None:
    split = split_conditions(NAMES, kind, test_fraction=0.3, seed=seed)
    parts = [split.train, split.validation, split.tested, split.left_out]
    assert sorted(name for part in parts for name in part) == sorted(
        "+".join(sorted(name.split("+"))) if "ctrl" not in name else name for name in NAMES
    )
    train = [parse_condition(name) for name in split.train]
    seen = {gene for one in train for gene in one}
    for category, names in split.test.items():
        for name in names:
            condition = parse_condition(name)
            assert categorize(condition, train) == category
            if category == "unseen_single":
                assert condition[0] not in seen
            elif kind == "combo_seen0":
                assert category == "combo_seen0"
    if kind == "unseen_single":
        assert set(split.test) == {"unseen_single"}
    if kind == "combo_seen2" and not split.validation:
        assert set(split.test) <= {"combo_seen2"}
    assert ConditionSplit.from_json(split.to_json()) == split


def test_the_same_seed_gives_the_same_split_and_another_one_another() -> None:
    one, same, other = (split_conditions(NAMES, "simulation", seed=seed) for seed in (1, 1, 2))
    assert one == same
    assert one != other


def test_a_gene_that_is_left_out_is_in_no_training_condition() -> None:
    split = split_conditions(NAMES, "leave_out", held_out=["A"], validation_fraction=0)
    assert split.test == {"combo_seen0": ["A+F"], "combo_seen1": ["A+B"], "unseen_single": ["A+ctrl"]}
    assert not any("A" in name.split("+") for name in split.train)
    one = split_conditions(NAMES, "leave_out", held_out=["B+A"], validation_fraction=0)
    assert one.test == {"combo_seen2": ["A+B"]}
    assert {"A+ctrl", "B+ctrl"} <= set(one.train)


@pytest.mark.parametrize(
    ("condition", "category"),
    [("A+B", "combo_seen2"), ("A+X", "combo_seen1"), ("X+Y", "combo_seen0"), ("X", "unseen_single")],
)
def test_categories_count_the_seen_singles(condition: str, category: str) -> None:
    assert categorize(parse_condition(condition), [("A",), ("B",), ("C", "D")]) == category
    assert category in CATEGORIES


def test_folds_contain_every_gene_once() -> None:
    folds = fold_genes(NAMES, 3, seed=0)
    assert sorted(gene for fold in folds for gene in fold) == list("ABCDEFG")
    assert {len(fold) for fold in folds} == {2, 3}


def test_nothing_is_tested_without_a_split() -> None:
    split = split_conditions(NAMES, "none", validation_fraction=0)
    assert not split.test
    assert len(split.train) == len(NAMES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kind": "random"}, "there is no split 'random'"),
        ({"kind": "leave_out"}, "held_out"),
        ({"kind": "simulation", "held_out": ["A"]}, "held_out"),
        ({"kind": "leave_out", "held_out": ["Q"]}, "no cell in the screen"),
        ({"kind": "simulation", "test_fraction": 1.0}, "test_fraction"),
        ({"kind": "simulation", "validation_fraction": -1.0}, "validation_fraction"),
        ({"kind": "leave_out", "held_out": list("ABCDEFG")}, "no training condition is left"),
    ],
)
def test_invalid_splits_raise(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split_conditions(NAMES, **arguments)


def test_a_screen_without_doubles_has_none_to_hold_out() -> None:
    with pytest.raises(ValueError, match="'combo_seen2'; it has 2 singles and 0 combinations"):
        split_conditions(["A+ctrl", "B+ctrl"], "combo_seen2")
