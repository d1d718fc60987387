"""Hold out conditions of a screen, so that the prediction of perturbations that were never seen can be judged.

A gene is *seen* if its single perturbation, `A+ctrl`, is a training condition: that is what an additive model needs to
know. Held-out conditions have the categories of GEARS:

- `unseen_single`: a single perturbation of a gene that is in no training condition;
- `combo_seen0`, `combo_seen1`, `combo_seen2`: a double of which 0, 1 or 2 genes are seen.

GEARS calls a gene seen if it is in any training condition; for screens with a single of every gene this is the same.

Source: Roohani et al. 2023, Nature Biotechnology 42:927; snap-stanford/GEARS:gears/data_utils.py.
"""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

import numpy as np

from scgpt_hf.perturbation.conditions import Condition, name_condition, parse_condition, require_conditions

SplitKind = Literal["none", "simulation", "unseen_single", "combo_seen0", "combo_seen1", "combo_seen2", "leave_out"]
CATEGORIES = ("unseen_single", "combo_seen0", "combo_seen1", "combo_seen2")


@dataclass(frozen=True)
class ConditionSplit:
    """Which conditions a model is trained on, validated on and tested on. Conditions are names such as `KLF1+ctrl`.

    Attributes:
        kind: how the conditions were chosen.
        seed: seed of the choice.
        train: training conditions.
        validation: conditions that decide which checkpoint is kept.
        test: held-out conditions by category.
        left_out: conditions that contain a held-out gene and are in no part.
    """

    kind: SplitKind
    seed: int
    train: list[str]
    validation: list[str] = field(default_factory=list)
    test: dict[str, list[str]] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)

    @property
    def tested(self) -> list[str]:
        """Return the held-out conditions of all categories."""
        return [name for names in self.test.values() for name in names]

    def to_json(self) -> dict[str, Any]:
        """Return the split as JSON, for split.json."""
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "ConditionSplit":
        """Return the split that `to_json` has described."""
        return cls(**content)


def categorize(condition: Condition, train: Iterable[Condition]) -> str:
    """Return the category of a condition, given the training conditions.

    Example:
        >>> categorize(("A", "B"), [("A",), ("C",)]), categorize(("B",), [("A",)])
        ('combo_seen1', 'unseen_single')
    """
    train = set(train)
    if len(condition) == 1:
        in_any = any(condition[0] in other for other in train)
        return "single_in_combo" if in_any else "unseen_single"
    return f"combo_seen{sum((gene,) in train for gene in condition)}"


def split_conditions(
    names: Sequence[str],
    kind: SplitKind,
    *,
    test_fraction: float = 0.25,
    held_out: Sequence[str] = (),
    validation_fraction: float = 0.1,
    seed: int = 42,
) -> ConditionSplit:
    """Divide the conditions of a screen.

    - "none": nothing is held out.
    - "simulation": a share of the genes is unseen. Every condition with such a gene is tested, and the same share of
      the doubles whose genes are both seen.
    - "unseen_single": a share of the genes is unseen. Their singles are tested.
    - "combo_seen0", "combo_seen1", "combo_seen2": a share of the doubles is tested; 2, 1 or none of their genes are
      unseen, so all other conditions with these leave the training conditions.
    - "leave_out": `held_out` lists genes, each with all of its conditions, or conditions such as `A+B`.

    Args:
        names: the perturbed conditions of the screen.
        kind: which conditions to hold out.
        test_fraction: share of the genes or doubles to hold out, at least one.
        held_out: genes and conditions of "leave_out".
        validation_fraction: share of the remaining conditions that choose the checkpoint; 0 for none.
        seed: seed of the choice.

    Raises:
        ValueError: the kind is unknown, a share is out of range, the screen has no condition of this kind, a condition
            in `held_out` does not exist, or no training condition is left.

    Example:
        >>> split = split_conditions(["A+ctrl", "B+ctrl", "A+B"], "leave_out", held_out=["A+B"], validation_fraction=0)
        >>> split.train, split.test
        (['A+ctrl', 'B+ctrl'], {'combo_seen2': ['A+B']})
    """
    _require_valid(kind, test_fraction, validation_fraction, held_out)
    conditions = sorted({parse_condition(name) for name in names} - {()})
    rng = np.random.default_rng(seed)
    tested = _choose_tested(conditions, kind, test_fraction, held_out, rng)
    unseen = _unseen_genes(tested, conditions, kind, held_out, rng)
    train = [one for one in conditions if one not in tested and not unseen & set(one)]
    left_out = [one for one in conditions if one not in tested and unseen & set(one)]
    if not train:
        raise ValueError(
            f"no training condition is left: all {len(conditions)} conditions are held out; hold out fewer"
        )
    validation = _choose_share(train, validation_fraction, rng) if validation_fraction and len(train) > 2 else []
    train = [one for one in train if one not in validation]
    by_category: dict[str, list[str]] = {}
    for one in sorted(tested):
        by_category.setdefault(categorize(one, train), []).append(name_condition(one))
    parts = ([name_condition(one) for one in part] for part in (train, sorted(validation), left_out))
    first, second, third = parts
    return ConditionSplit(kind, seed, sorted(first), second, dict(sorted(by_category.items())), third)


def fold_genes(names: Sequence[str], n_folds: int, seed: int) -> list[list[str]]:
    """Return the perturbed genes of a screen in `n_folds` groups of almost equal size, to leave out one after another.

    Args:
        names: the perturbed conditions of the screen.
        n_folds: number of groups.
        seed: seed of the order.
    """
    genes = sorted({gene for name in names for gene in parse_condition(name)})
    order = np.random.default_rng(seed).permutation(len(genes))
    return [sorted(genes[index] for index in order[fold::n_folds]) for fold in range(min(n_folds, len(genes)))]


def _choose_tested(
    conditions: Sequence[Condition],
    kind: SplitKind,
    test_fraction: float,
    held_out: Sequence[str],
    rng: np.random.Generator,
) -> set[Condition]:
    """Return the conditions to test."""
    singles, combos = ([one for one in conditions if (len(one) > 1) == double] for double in (False, True))
    if kind == "none":
        return set()
    if kind == "leave_out":
        return _named(conditions, held_out)
    if kind == "simulation":
        genes = sorted({gene for one in conditions for gene in one})
        unseen = {genes[index] for index in rng.permutation(len(genes))[: _share(len(genes), test_fraction)]}
        tested = {one for one in conditions if unseen & set(one)}
        seen = [one for one in combos if one not in tested]
        return tested | set(_choose_share(seen, test_fraction, rng))
    if kind == "unseen_single":
        pool = singles
    else:
        known = {gene for one in singles for gene in one}
        n_seen = int(kind[-1])
        pool = [one for one in combos if len(one) == 2 and sum(gene in known for gene in one) >= n_seen]
    if not pool:
        raise ValueError(f"the screen has no condition to hold out for {kind!r}; it has {len(singles)} singles and "
                         f"{len(combos)} combinations")  # fmt: skip
    return set(_choose_share(pool, test_fraction, rng))


def _unseen_genes(
    tested: set[Condition],
    conditions: Sequence[Condition],
    kind: SplitKind,
    held_out: Sequence[str],
    rng: np.random.Generator,
) -> set[str]:
    """Return the genes of which the training conditions must not contain any."""
    known = {one[0] for one in conditions if len(one) == 1}
    unseen: set[str] = set()
    for one in sorted(tested):
        if len(one) == 1 and kind != "leave_out":
            unseen |= set(one)
        elif kind in ("combo_seen0", "combo_seen1"):
            hidden = {gene for gene in one if gene not in known} | (unseen & set(one))
            wanted = 2 - int(kind[-1])
            others = list(rng.permutation(sorted(set(one) - hidden)))
            unseen |= set(others[: max(0, wanted - len(hidden))]) | hidden
    genes = {gene for one in conditions for gene in one}
    return unseen | ({name for name in held_out if name in genes} if kind == "leave_out" else set())


def _named(conditions: Sequence[Condition], held_out: Sequence[str]) -> set[Condition]:
    """Return the conditions that a user names: a gene stands for all conditions that contain it."""
    genes = {gene for one in conditions for gene in one}
    tested: set[Condition] = set()
    for name in held_out:
        if name in genes:
            tested |= {one for one in conditions if name in one}
        else:
            wanted = parse_condition(name)
            require_conditions([wanted], conditions, "the screen")
            tested.add(wanted)
    return tested


def _choose_share(pool: Sequence[Condition], fraction: float, rng: np.random.Generator) -> list[Condition]:
    return [pool[index] for index in sorted(rng.permutation(len(pool))[: _share(len(pool), fraction)])]


def _share(n: int, fraction: float) -> int:
    """Return a share of n, at least 1 and, if there are several, less than all."""
    return min(max(1, round(n * fraction)), max(n - 1, 1)) if n else 0


def _require_valid(kind: str, test_fraction: float, validation_fraction: float, held_out: Sequence[str]) -> None:
    if kind not in get_args(SplitKind):
        raise ValueError(f"there is no split {kind!r}; choose one of {', '.join(get_args(SplitKind))}")
    if not 0 < test_fraction < 1:
        raise ValueError(f"expected test_fraction between 0 and 1, found {test_fraction}")
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"expected validation_fraction from 0 to below 1, found {validation_fraction}")
    if bool(held_out) != (kind == "leave_out"):
        raise ValueError(
            f"the split {kind!r} came with held_out={list(held_out)}; name genes or conditions to hold out with the "
            "split 'leave_out', and only with it"
        )
