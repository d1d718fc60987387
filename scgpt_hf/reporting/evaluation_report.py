"""Make the report page of an evaluation: scores of embeddings and baselines, their meaning, and the scored cells.

Numbers come from scores.json and figures from the folder, see `evaluation_results.py`. `page.py` builds the page.
"""

from pathlib import Path
from typing import Any

from scgpt_hf.analysis.evaluation.evaluate import NOT_APPLICABLE
from scgpt_hf.publishing.record import RunRecord
from scgpt_hf.reporting.evaluation_results import GROUPS, SCORES, TABLE
from scgpt_hf.reporting.page import (
    Html,
    collapsed,
    figures,
    format_value,
    inline_png,
    key_numbers,
    page,
    paragraph,
    section,
    table,
    to_html,
)

_MEANING = {
    "NMI": "agreement of k-means clusters with the labels (normalized mutual information); 1: identical partitions",
    "ARI": "agreement of k-means clusters with the labels (adjusted Rand index, over pairs of cells); 0: chance",
    "ASW label": "average silhouette width of the labels: how much closer a cell is to its own label than to the "
    "next one; 0.5: no closer",
    "cLISI": "label diversity among the 90 nearest cells (local inverse Simpson index); 1: one label, 0: all labels "
    "equally frequent",
    "ASW batch": "average silhouette width of the batches within each label; 1: fully mixed",
    "iLISI": "batch diversity among the 90 nearest cells; 1: all batches equally frequent, 0: one batch",
    "graph connectivity": "share of a label's cells that are connected in the graph of 15 nearest neighbors",
    "bio": "mean of the scores for the separation of cell types",
    "batch": "mean of the scores for the mixing of batches",
    "total": "0.6 bio + 0.4 batch (Luecken et al. 2022)",
    "kNN macro-F1": "cell types predicted from the 15 nearest neighbors among other donors; mean F1 over types",
    "linear probe macro-F1": "cell types predicted by logistic regression trained on other donors; mean F1 over types",
    "transfer kNN macro-F1": "cell types of the query predicted from the 15 nearest neighbors in the reference",
    "transfer linear probe macro-F1": "cell types of the query predicted by logistic regression trained on the "
    "reference",
}


def evaluation_report(folder: Path) -> str:
    """Return the report page of an evaluation.

    Args:
        folder: folder with scores.json and the figures that it lists.

    Raises:
        ValueError: scores.json is malformed or incomplete.
    """
    record = RunRecord.read(folder / SCORES).content
    try:
        cells, methods = record["cells"], record["methods"]
        lead = f"{cells['n']:,} cells, {len(cells['labels'])} labels, {len(cells['batches'])} batches"
        return page(
            f"Evaluation of embeddings: {folder.resolve().name}",
            f"{record['data']}: {lead}." if "data" in record else f"{lead}.",
            _first_numbers(record["settings"]["embedding_keys"], methods),
            _scores(methods),
            section(
                "Figures", figures(*[inline_png(folder / one["file"], one["caption"]) for one in record["figures"]])
            ),
            section("Prediction of cell types", _predictions(methods)),
            _cells(record),
            _provenance(record),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"{SCORES} of {folder} is incomplete: {error} is missing; run scgpt-hf evaluate again"
        ) from error


def _first_numbers(keys: list[str], methods: dict[str, Any]) -> Html:
    """Return the total and the score of the linear probe, for the first embedding and for the best baseline."""
    numbers, scores = {}, {name: method["scores"] for name, method in methods.items()}
    for metric, label in (("total", "total score"), ("linear probe macro-F1", "macro-F1 of the linear probe")):
        baselines = {name: one[metric] for name, one in scores.items() if metric in one and name not in keys}
        if metric in scores[keys[0]]:
            numbers[f"{label}, {keys[0]}"] = f"{scores[keys[0]][metric]:.3f}"
        if baselines:
            best = max(baselines, key=lambda name: baselines[name])
            numbers[f"{label}, {best}"] = f"{baselines[best]:.3f}"
    return key_numbers(numbers)


def _scores(methods: dict[str, Any]) -> Html:
    requested = {
        metric for method in methods.values() for part in ("scores", "not_computable") for metric in method[part]
    }
    metrics = [metric for group in GROUPS.values() for metric in group if metric in requested]
    rows = []
    for metric in metrics:
        values = [method["scores"].get(metric) for method in methods.values()]
        rows.append((metric, *["–" if value is None else f"{value:.3f}" for value in values]))
    return section(
        "Scores",
        paragraph("Higher is better. A dash means that the score does not apply to the method or cannot be computed."),
        table(rows, ("score", *methods), numeric_columns=range(1, len(methods) + 1)),
        _causes(methods),
        collapsed("What the scores mean", table([(metric, _MEANING.get(metric, "")) for metric in metrics])),
        _baselines(methods),
        paragraph(f"{TABLE} holds all numbers."),
    )


def _baselines(methods: dict[str, Any]) -> Html:
    """Return a table that describes each baseline and names its source."""
    rows = [(name, one["meaning"], one["source"]) for name, one in methods.items() if "meaning" in one]
    text = (
        "Baselines that are fitted to these cells have an advantage: the model of an embedding may never have seen "
        "them. Those that are fitted to the training cells of its run have none."
    )
    return to_html([table(rows, ("baseline", "what it is", "source")), paragraph(text)]) if rows else Html("")


def _causes(methods: dict[str, Any]) -> Html:
    """Return the scores that cannot be computed, a row per cause, or nothing."""
    of_cause: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # dictionaries as ordered sets
    for name, method in methods.items():
        for metric, cause in method["not_computable"].items():
            if cause != NOT_APPLICABLE:
                metrics, names = of_cause.setdefault(cause, ({}, {}))
                metrics[metric], names[name] = None, None
    rows = [(", ".join(metrics), ", ".join(names), cause) for cause, (metrics, names) in of_cause.items()]
    return table(rows, ("cannot be computed", "methods", "reason")) if rows else Html("")


def _predictions(methods: dict[str, Any]) -> Html:
    rows = []
    for name, method in methods.items():
        for metric, one in method["predictions"].items():
            left_out = ", ".join(f"{label} ({number:,})" for label, number in one["left_out"].items()) or "none"
            numbers = (f"{method['scores'][metric]:.3f}", f"{one['accuracy']:.3f}", f"{one['calibration_error']:.3f}")
            rows.append((name, metric.removesuffix(" macro-F1"), *numbers, one["protocol"], left_out))
    header = ("method", "classifier", "macro-F1", "accuracy", "calibration error", "protocol", "types left out (cells)")
    return table(rows, header, numeric_columns=(2, 3, 4)) if rows else Html("")


def _cells(record: dict[str, Any]) -> Html:
    settings, blocks = record["settings"], []
    for name, heading in (("cells", "Scored"), ("reference", "Reference")):
        if name not in record:
            continue
        one = record[name]
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in one["left_out"].items()) or "none"
        rows = [
            (heading, f"{one['n']:,} cells"),
            ("Left out", left_out),
            (settings["labels_key"], ", ".join(f"{label} ({number:,})" for label, number in one["labels"].items())),
            (settings["batch_key"], ", ".join(f"{batch} ({number:,})" for batch, number in one["batches"].items())),
        ]
        blocks.append(table(rows))
    return section("Cells", blocks)


def _provenance(record: dict[str, Any]) -> Html:
    sources = {"Data": record.get("data", "an AnnData in memory"), "Reference": record.get("reference_data", "")}
    rows = [(name, text) for name, text in sources.items() if text]
    rows += [(name, format_value(value)) for name, value in record["settings"].items()]
    rows.append(("Software", ", ".join(f"{name} {number}" for name, number in record["versions"].items())))
    return section("Provenance", table(rows))
