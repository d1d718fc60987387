"""Make the report page of a perturbation evaluation: one figure for each claim, tables, provenance.

Numbers come from perturbation_scores.json. `page.py` builds the page.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scgpt_hf.perturbation.evaluation.evaluate import CEILING, MODEL
from scgpt_hf.perturbation.evaluation.metrics import HIGHER_IS_BETTER, METRICS
from scgpt_hf.perturbation.evaluation.results import RESULTS, TABLE
from scgpt_hf.publishing.record import RunRecord
from scgpt_hf.reporting.page import (
    Html,
    collapsed,
    figures,
    format_value,
    inline_svg,
    key_numbers,
    page,
    paragraph,
    section,
    table,
)
from scgpt_hf.reporting.perturbation.figures import plot_ceiling, plot_effects, plot_methods

_PROVENANCE = ("run", "data", "control_cells", "n_cells", "seed", "versions")
_BASELINE_TEXT = (
    "Baselines are fitted to the training conditions of the same split. Truth and predictors use different control "
    "cells; with shared ones every predictor, a wrong one too, has a positive correlation. A method is averaged over "
    "the conditions that it can predict (column items). A dash means that a metric is not defined."
)


def perturbation_report(folder: Path) -> str:
    """Return the report page of a perturbation evaluation.

    Args:
        folder: folder with perturbation_scores.json.

    Raises:
        ValueError: the file is malformed or incomplete.
    """
    record = RunRecord.read(folder / RESULTS).content
    try:
        return _page(folder, record)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{RESULTS} of {folder} is incomplete: {error}; run `perturb evaluate` again") from error


def _page(folder: Path, record: dict[str, Any]) -> str:
    groups = {"that replicate": record["replicating"], "that do not": record["not_replicating"]}
    n_replicating = sum(one["split_half"] >= record["replicates_from"] for one in record["conditions"])
    lead = (
        f"{len(record['conditions'])} held-out conditions, of which {n_replicating} replicate (split-half correlation "
        f"of {record['replicates_from']} or more). Split: {record['split']['kind']}, seed {record['split']['seed']}."
    )
    drawn = [
        inline_svg(
            plot_methods(groups, "pearson_delta", "correlation of the effect"),
            f"{_claim(record['replicating'], 'pearson_delta')} Correlation of predicted and true effect over all "
            "genes, for conditions that replicate and those that do not.",
        ),
        inline_svg(
            plot_methods(groups, "l2", "L2 error of the effect"),
            f"{_claim(record['replicating'], 'l2')} Length of the difference between predicted and true effect; lower "
            "is better. It also counts whether an effect is as large as predicted.",
        ),
        inline_svg(
            plot_effects(record["conditions"]),
            "How large the effects of the 20 most affected genes are, predicted by the model and measured.",
        ),
        inline_svg(
            plot_ceiling(record["scores"], record["conditions"]),
            "What can be predicted at all: a condition to the left does not agree with itself.",
        ),
    ]
    return page(
        f"Perturbation prediction: {folder.resolve().name}",
        lead,
        _key_numbers(record["replicating"] or record["all"]),
        section("Figures", figures(*drawn)),
        section(
            "Scores",
            paragraph(_BASELINE_TEXT),
            *[_scores(heading, one) for heading, one in _tables(record).items()],
            collapsed("What the scores mean", table([*METRICS.items()])),
            paragraph(f"{TABLE} holds the scores of each condition."),
        ),
        section("Split", _split(record["split"])),
        section(
            "Provenance",
            table([(name, format_value(record[name])) for name in ("run", "data", "versions") if name in record]),
        ),
    )


def _claim(methods: Mapping[str, Mapping[str, Any]], metric: str) -> str:
    """Return in one sentence whether the model or a baseline is better, of those that predict the same conditions."""
    if MODEL not in methods or methods[MODEL][metric] is None:
        return ""
    own, n = methods[MODEL][metric], methods[MODEL]["items"]
    others = {
        name: values[metric]
        for name, values in methods.items()
        if name not in (MODEL, CEILING) and values[metric] is not None and values["items"] == n
    }
    if not others:
        return "No baseline predicts the same conditions."
    sign = 1 if metric in HIGHER_IS_BETTER else -1
    best = max(others, key=lambda name: sign * others[name])
    if f"{own:.2f}" == f"{others[best]:.2f}":
        return f"The model is as good as {best} ({own:.2f})."
    better = sign * own > sign * others[best]
    subject, worse = ("The model", best) if better else (f"The baseline {best!r}", "the model")
    values = (own, others[best]) if better else (others[best], own)
    return f"{subject} is better than {worse} ({values[0]:.2f} against {values[1]:.2f})."


def _key_numbers(methods: Mapping[str, Mapping[str, Any]]) -> Html:
    numbers = {}
    for name in (MODEL, "additive", "ridge linear", CEILING):
        if name in methods and (value := methods[name]["pearson_delta"]) is not None:
            numbers[f"correlation of the effect, {name} ({methods[name]['items']} conditions)"] = f"{value:.2f}"
    return key_numbers(numbers)


def _tables(record: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    named = {f"Conditions of the category {name}": one for name, one in record["categories"].items()}
    return {
        "Conditions that replicate": record["replicating"],
        "Conditions that do not replicate: nothing can be predicted": record["not_replicating"],
        **named,
    }


def _scores(heading: str, methods: Mapping[str, Mapping[str, Any]]) -> Html:
    """Return a table of methods and metrics, or nothing if there is no method."""
    if not methods:
        return Html("")
    rows = [
        (name, str(values["items"]), *["–" if values[one] is None else f"{values[one]:.3f}" for one in METRICS])
        for name, values in methods.items()
    ]
    return collapsed(heading, table(rows, ("method", "items", *METRICS), numeric_columns=range(1, len(METRICS) + 2)))


def _split(split: Mapping[str, Any]) -> Html:
    rows = [("training", ", ".join(split["train"])), ("validation", ", ".join(split["validation"]) or "none")]
    rows += [(f"test, {name}", ", ".join(names)) for name, names in split["test"].items()]
    rows += [("left out, because they contain a held-out gene", ", ".join(split["left_out"]) or "none")]
    return table(rows)
