"""Conditions as in GEARS: order does not matter, and errors name the nearest names."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.perturbation.conditions import (
    name_condition,
    nearest_names,
    parse_condition,
    parse_conditions,
    require_conditions,
    require_genes,
)

genes = st.lists(st.sampled_from(["KLF1", "MAP2K6", "STAT1", "JAK2", "CEBPA"]), unique=True, max_size=3)


@settings(deadline=None)
@given(genes)
def test_the_order_of_genes_does_not_matter(names: list[str]) -> None:
    texts = {"+".join(order) or "ctrl" for order in permutations(names)}
    texts |= {f"ctrl+{names[0]}", f"{names[0]}+ctrl"} if len(names) == 1 else set()
    found = {parse_condition(text) for text in texts}
    assert found == {tuple(sorted(names))}
    name = name_condition(next(iter(found)))
    assert parse_condition(name) == tuple(sorted(names))
    assert name.count("+") == max(len(names) - 1, len(names) == 1)


def test_the_control_may_have_another_name() -> None:
    assert parse_condition("non-targeting", "non-targeting") == ()
    assert parse_condition("KLF1+non-targeting", "non-targeting") == ("KLF1",)
    assert name_condition(()) == "ctrl"


@pytest.mark.parametrize(
    ("text", "message"),
    [("KLF1+KLF1", "targets KLF1 twice"), ("KLF1+", "empty name"), ("+", "empty name"), ("", "empty name")],
)
def test_invalid_conditions_raise(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_condition(text)


def test_requested_conditions_are_unique_and_without_the_control() -> None:
    assert parse_conditions(["B+A", "ctrl", "A+B", "C"]) == [("A", "B"), ("C",)]
    assert parse_conditions("A+ctrl") == [("A",)]
    with pytest.raises(ValueError, match="one or more conditions"):
        parse_conditions(["ctrl"])


def test_an_unknown_gene_raises_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"does not know 1 of .*\['STAT11'\].*nearest.*STAT1"):
        require_genes(["JAK2", "STAT11"], ["STAT1", "STAT2", "JAK2"], "the model")
    with pytest.raises(ValueError, match="no name resembles"):
        require_genes(["QQQ"], ["STAT1"], "the model")
    require_genes(["JAK2"], ["JAK2"], "the model")


def test_a_condition_without_cells_raises_with_the_nearest_names() -> None:
    with pytest.raises(ValueError, match=r"no cell in the data.*'STAT3\+ctrl'.*STAT1\+ctrl"):
        require_conditions([("STAT3",)], [("STAT1",), ("KLF1", "JAK2")], "the data")


def test_near_names_ignore_letter_case() -> None:
    assert nearest_names("stat1", ["STAT1", "JAK2"]) == ["STAT1"]
