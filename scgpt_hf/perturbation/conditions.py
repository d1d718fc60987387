"""Conditions of a perturbation screen, written as in GEARS: `KLF1+ctrl`, `KLF1+MAP2K6`, `ctrl`.

A condition is a set of genes. `A+B`, `B+A` and, for one gene, `A+ctrl`, `ctrl+A` and `A` are the same. The functions
here are pure; `cells.py` reads the conditions of cells, `splits.py` divides them.
"""

import difflib
from collections.abc import Collection, Iterable, Sequence

CONTROL = "ctrl"
"""The name of the condition without a perturbation. Source: GEARS, Roohani et al. 2023, Nature Biotechnology 42:927."""

_SEPARATOR = "+"

Condition = tuple[str, ...]
"""The perturbed genes in alphabetical order; empty for the control."""


def parse_condition(text: str, control: str = CONTROL) -> Condition:
    """Return the genes of a condition in alphabetical order; none for the control.

    Args:
        text: the condition, e.g. `KLF1+ctrl`. Space around names is ignored.
        control: name of the control in the text.

    Raises:
        ValueError: a name is empty, or a gene is targeted twice.

    Example:
        >>> parse_condition("MAP2K6+KLF1"), parse_condition("KLF1+ctrl"), parse_condition("ctrl")
        (('KLF1', 'MAP2K6'), ('KLF1',), ())
    """
    names = [name.strip() for name in str(text).split(_SEPARATOR)] if str(text).strip() != control else []
    if any(not name for name in names):
        raise ValueError(
            f"the condition {text!r} has an empty name; write one gene as 'KLF1+{control}', several as 'KLF1+MAP2K6', "
            f"and the control as {control!r}"
        )
    genes = sorted(name for name in names if name != control)
    if twice := sorted({gene for gene in genes if genes.count(gene) > 1}):
        raise ValueError(f"the condition {text!r} targets {twice[0]} twice; name each gene once")
    return tuple(genes)


def name_condition(condition: Condition) -> str:
    """Return the name of a condition: `ctrl`, `A+ctrl`, or its genes in alphabetical order.

    Example:
        >>> name_condition(("KLF1",)), name_condition(("KLF1", "MAP2K6")), name_condition(())
        ('KLF1+ctrl', 'KLF1+MAP2K6', 'ctrl')
    """
    if not condition:
        return CONTROL
    return _SEPARATOR.join(sorted(condition) if len(condition) > 1 else (*condition, CONTROL))


def parse_conditions(texts: Iterable[str], control: str = CONTROL) -> list[Condition]:
    """Return the conditions that a user asks for, without the control, each once and in the order given.

    Args:
        texts: the conditions; see `parse_condition`.
        control: name of the control.

    Raises:
        ValueError: there is none, or one is invalid.
    """
    if isinstance(texts, str):
        texts = [texts]
    found = list(dict.fromkeys(parse_condition(text, control) for text in texts))
    if not (perturbed := [condition for condition in found if condition]):
        raise ValueError(f"expected one or more conditions such as 'KLF1+{control}', found {sorted(map(str, texts))}")
    return perturbed


def require_conditions(wanted: Sequence[Condition], known: Collection[Condition], where: str) -> None:
    """Raise unless all conditions are among those that are known.

    Raises:
        ValueError: one is not. The message lists the nearest names.
    """
    if missing := [condition for condition in wanted if condition not in known]:
        names = [name_condition(condition) for condition in known if condition]
        near = nearest_names(name_condition(missing[0]), names)
        raise ValueError(
            f"{len(missing)} of the conditions have no cell in {where}, e.g. {name_condition(missing[0])!r}; "
            f"{_describe_near(near, names)}"
        )


def require_genes(wanted: Iterable[str], known: Collection[str], where: str) -> None:
    """Raise unless all perturbed genes are known.

    Args:
        wanted: names of the genes.
        known: names that the vocabulary knows, ids and symbols.
        where: what knows them, for the message.

    Raises:
        ValueError: a gene is unknown. The message lists the nearest names.
    """
    if missing := sorted({gene for gene in wanted if gene not in known}):
        near = nearest_names(missing[0], known)
        raise ValueError(
            f"{where} does not know {len(missing)} of the perturbed genes: {missing[:10]}; "
            f"{_describe_near(near, known)}"
        )


def nearest_names(name: str, known: Iterable[str], n: int = 3) -> list[str]:
    """Return up to `n` known names that resemble a name, the nearest first. Letter case is ignored."""
    by_fold = {one.casefold(): one for one in known}
    return [by_fold[fold] for fold in difflib.get_close_matches(name.casefold(), by_fold, n=n, cutoff=0.5)]


def _describe_near(near: Sequence[str], known: Collection[str]) -> str:
    if near:
        return f"the nearest names to the first are {', '.join(near)}"
    return f"no name resembles the first; the names are such as {', '.join(sorted(known)[:5])}"
