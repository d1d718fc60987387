"""The report of an evaluation: scores of embeddings beside baselines, what they mean, and for which cells they hold.

The numbers are those of scores.json, the figures those of the folder. `report_page.py` builds the page.
"""

from pathlib import Path
from typing import Any

from scgpt_hf.analysis.evaluation.evaluate import NOT_APPLICABLE
from scgpt_hf.publishing.record import Record
from scgpt_hf.reporting.evaluation_files import GROUPS, SCORES, TABLE
from scgpt_hf.reporting.report_page import Html, facts, figures, fold, page, paragraph, picture, section, table

MEANING = {
    "NMI": "agreement of k-means clusters with the labels, by mutual information; 1 is the same partition",
    "ARI": "agreement of k-means clusters with the labels, over pairs of cells; 0 is chance",
    "ASW label": "how much nearer a cell is to its own label than to the next (silhouette); 0.5 is no nearer",
    "cLISI": "whether the 90 nearest cells carry one label; 1 is one, 0 all alike",
    "ASW batch": "whether batches of a label lie over each other (silhouette); 1 is fully mixed",
    "iLISI": "whether the 90 nearest cells come from many batches; 1 is all alike, 0 is one",
    "graph connectivity": "share of a label's cells that hang together in the graph of 15 neighbours",
    "bio": "mean of the scores of cell types kept apart",
    "batch": "mean of the scores of batches mixed",
    "total": "0.6 bio + 0.4 batch (Luecken et al. 2022)",
    "kNN macro-F1": "types of a cell from its 15 nearest neighbours among other donors; mean over types",
    "linear probe macro-F1": "types of a cell by logistic regression on other donors; mean over types",
    "transfer kNN macro-F1": "types of the query from its 15 nearest neighbours in the reference",
    "transfer linear probe macro-F1": "types of the query by logistic regression on the reference",
}


def report_evaluation(folder: Path) -> str:
    """Return the page of an evaluation.

    Raises:
        ValueError: scores.json is malformed, or lacks a part.
    """
    record = Record(folder / SCORES).content
    try:
        cells, methods = record["cells"], record["methods"]
        lead = f"{cells['n']:,} cells, {len(cells['labels'])} labels, {len(cells['batches'])} batches"
        return page(
            f"Embeddings scored: {folder.resolve().name}",
            f"{record['data']}: {lead}." if "data" in record else f"{lead}.",
            _first_numbers(record["settings"]["keys"], methods),
            _scores(methods),
            section("Figures", figures(*[picture(folder / one["file"], one["caption"]) for one in record["figures"]])),
            section("Types predicted", _predictions(methods)),
            _cells(record),
            _provenance(record),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{SCORES} of {folder} lacks a part: {error}; run evaluate.py again") from error


def _first_numbers(keys: list[str], methods: dict[str, Any]) -> Html:
    """Return the total and the linear probe of the first embedding, beside the best baseline's."""
    numbers, scores = {}, {name: method["scores"] for name, method in methods.items()}
    for metric, what in (("total", "total"), ("linear probe macro-F1", "macro-F1 of the linear probe")):
        baselines = {name: one[metric] for name, one in scores.items() if metric in one and name not in keys}
        if metric in scores[keys[0]]:
            numbers[f"{what}, {keys[0]}"] = f"{scores[keys[0]][metric]:.3f}"
        if baselines:
            best = max(baselines, key=lambda name: baselines[name])
            numbers[f"{what}, {best}"] = f"{baselines[best]:.3f}"
    return facts(numbers)


def _scores(methods: dict[str, Any]) -> Html:
    asked = {metric for method in methods.values() for part in ("scores", "not_computable") for metric in method[part]}
    metrics = [metric for group in GROUPS.values() for metric in group if metric in asked]
    rows = []
    for metric in metrics:
        values = [method["scores"].get(metric) for method in methods.values()]
        rows.append((metric, *["–" if value is None else f"{value:.3f}" for value in values]))
    return section(
        "Scores",
        paragraph("Higher is better. A dash is a score that does not apply to the method or cannot be computed."),
        table(rows, ("score", *methods), numbers=range(1, len(methods) + 1)),
        _causes(methods),
        fold("What the scores say", table([(metric, MEANING.get(metric, "")) for metric in metrics])),
        paragraph(
            "Baselines are computed on these very cells, labels unseen, while the model behind an embedding may never "
            f"have seen them. {TABLE} holds every number."
        ),
    )


def _causes(methods: dict[str, Any]) -> Html:
    """Return what cannot be computed, a row per cause, or nothing."""
    of_cause: dict[str, tuple[dict[str, None], dict[str, None]]] = {}  # dictionaries as sets that keep the order
    for name, method in methods.items():
        for metric, cause in method["not_computable"].items():
            if cause != NOT_APPLICABLE:
                metrics, names = of_cause.setdefault(cause, ({}, {}))
                metrics[metric], names[name] = None, None
    rows = [(", ".join(metrics), ", ".join(names), cause) for cause, (metrics, names) in of_cause.items()]
    return table(rows, ("not computable", "for", "because")) if rows else Html("")


def _predictions(methods: dict[str, Any]) -> Html:
    rows = []
    for name, method in methods.items():
        for metric, one in method["predictions"].items():
            left_out = ", ".join(f"{label} ({number:,})" for label, number in one["left_out"].items()) or "none"
            numbers = (f"{method['scores'][metric]:.3f}", f"{one['accuracy']:.3f}", f"{one['calibration_error']:.3f}")
            rows.append((name, metric.removesuffix(" macro-F1"), *numbers, one["protocol"], left_out))
    head = ("method", "classifier", "macro-F1", "accuracy", "calibration error", "protocol", "types not scored (cells)")
    return table(rows, head, numbers=(2, 3, 4)) if rows else Html("")


def _cells(record: dict[str, Any]) -> Html:
    settings, blocks = record["settings"], []
    for name, what in (("cells", "Scored"), ("reference", "Reference")):
        if name not in record:
            continue
        one = record[name]
        left_out = ", ".join(f"{number:,} {reason}" for reason, number in one["left_out"].items()) or "none"
        rows = [
            (what, f"{one['n']:,} cells"),
            ("Left out", left_out),
            (settings["label"], ", ".join(f"{label} ({number:,})" for label, number in one["labels"].items())),
            (settings["batch"], ", ".join(f"{batch} ({number:,})" for batch, number in one["batches"].items())),
        ]
        blocks.append(table(rows))
    return section("Cells", blocks)


def _provenance(record: dict[str, Any]) -> Html:
    said = {"Data": record.get("data", "an AnnData in memory"), "Reference": record.get("reference_data", "")}
    rows = [(name, text) for name, text in said.items() if text]
    rows += [(name, str(value)) for name, value in record["settings"].items()]
    rows.append(("Software", ", ".join(f"{name} {number}" for name, number in record["versions"].items())))
    return section("Provenance", table(rows))
