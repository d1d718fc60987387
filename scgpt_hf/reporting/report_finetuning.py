"""The report of a fine-tuned model: scores on held-out cells beside a constant guess, confusion, F1, calibration.

The numbers are those of the run folder. `report_page.py` builds the page.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scgpt_hf.analysis.evaluation.classification import f1_by_type
from scgpt_hf.publishing.record import UNKNOWN, Record
from scgpt_hf.reporting.curves import plot_loss, read_metrics
from scgpt_hf.reporting.plots_types import plot_calibration, plot_confusion, plot_f1
from scgpt_hf.reporting.report_page import (
    Html,
    code,
    drawing,
    facts,
    figures,
    fold,
    page,
    paragraph,
    picture,
    section,
    table,
)
from scgpt_hf.training.run_folder import BEST_MODEL, METRICS, SETTINGS, SUMMARY

_SHOWN = {"confusion", "labels", "validation", "majority_baseline", "calibration_error", "reliability", "data"}


def report_finetuning(run: Path) -> str:
    """Return the page of a fine-tuning run, for annotation or integration.

    Raises:
        ValueError: a file is malformed; the message names it.
    """
    summary = Record(run / SUMMARY)
    lead = f"Fine-tuned to {summary.text('task')}, from {summary.text('model')}: {summary.number('train_cells')} cells."
    return page(
        run.resolve().name,
        lead,
        _first_numbers(summary),
        _predictions(summary),
        section(
            "How it learned", figures(*_curves(run), picture(run / "umap.png", "Cells on a map of their embeddings."))
        ),
        section("Cells", _labels(summary), table(_flat(summary.get("data", dict) or {}))),
        _use(run, summary),
        _provenance(run, summary),
    )


def _first_numbers(summary: Record) -> Html:
    numbers = {
        "macro-F1 on held-out cells": summary.number("validation.macro_f1", ".3f"),
        "accuracy on held-out cells": summary.number("validation.accuracy", ".3f"),
        "macro-F1 of the most frequent label": summary.number("majority_baseline.macro_f1", ".3f"),
        "calibration error": summary.number("calibration_error.after", ".3f"),
    }
    return facts({what: number for what, number in numbers.items() if number != UNKNOWN})


def _predictions(summary: Record) -> Html:
    """Return confusion, F1 and calibration, from the counts that the summary keeps."""
    labels, counts = summary.get("confusion.labels", list), summary.get("confusion.counts", list)
    if not labels or not np.any(counts):
        return Html("")
    true, predicted = np.nonzero(counts)
    repeats = np.asarray(counts)[true, predicted]
    names = np.asarray(labels, dtype=str)
    true, predicted = np.repeat(names[true], repeats), np.repeat(names[predicted], repeats)
    macro = np.mean(list(f1_by_type(true, predicted).values()))
    drawn = [
        drawing(plot_confusion(true, predicted), "Which types are taken for which, held-out cells."),
        drawing(
            plot_f1(true, {"model": predicted}), f"F1 of each type that held-out cells have; their mean is {macro:.3f}."
        ),
    ]
    if bins := summary.get("reliability", dict):
        cells = np.asarray(bins["cells"], dtype=int)
        right = np.concatenate(
            [np.arange(n) < round(n * share) for n, share in zip(cells, bins["accuracy"], strict=True)]
        )
        confidence = np.repeat(np.asarray(bins["confidence"], dtype=float), cells)
        drawn.append(
            drawing(plot_calibration(confidence, right), "How often predictions of each confidence are right.")
        )
    text = (
        "The best epoch and the calibration were chosen on these held-out cells, so the scores are a little too good; "
        f"they were held out by {summary.text('held_out')}."
    )
    return section("Types predicted", paragraph(text), figures(*drawn))


def _curves(run: Path) -> list[Html]:
    metrics = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    panels = {"training": "loss", "validation": "eval_gep_mse"}
    captions = {"training": "Loss on training cells.", "validation": "Error of hidden genes on held-out cells."}
    drawn = [panel for panel, key in panels.items() if any(key in line for line in metrics)]
    return [drawing(plot_loss(metrics, [panel]), captions[panel]) for panel in drawn]


def _labels(summary: Record) -> Html:
    labels = summary.get("labels", dict) or {}
    rows = [(name, *(f"{number:,}" for number in parts.values())) for name, parts in labels.items()]
    head = ("label", *next(iter(labels.values()), {}))
    return table(rows, head, numbers=range(1, len(head))) if rows else Html("")


def _use(run: Path, summary: Record) -> Html:
    checkpoint = f"{run.resolve().name}/{BEST_MODEL}"
    script = "annotate.py" if summary.text("task") == "annotate" else "embed.py"
    return section("How to use", code(f"python scripts/{script} data.h5ad --model {checkpoint} --out out.h5ad"))


def _provenance(run: Path, summary: Record) -> Html:
    rest = {key: value for key, value in summary.content.items() if key not in _SHOWN}
    settings = Record(run / SETTINGS).content
    return section("Provenance", table(_flat(rest)), fold("All settings", table(_flat(settings))))


def _flat(values: Mapping[str, Any], before: str = "") -> list[tuple[str, str]]:
    """Return rows of nested values, keys joined by dots."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flat(value, f"{before}{key}.")
        else:
            rows.append((f"{before}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows
