"""Make the report page of a fine-tuning run: scores on held-out cells, confusion matrix, F1 scores, calibration.

Numbers come from the run folder, as `publishing/run_summary.py` states them. `page.py` builds the page.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from scgpt_hf.publishing.record import UNKNOWN, RunRecord
from scgpt_hf.publishing.run_summary import (
    about_held_out,
    classifier_rows,
    error_rows,
    finetuning_data,
    finetuning_recipe,
    label_rows,
)
from scgpt_hf.reporting.curves import loss_figures
from scgpt_hf.reporting.page import (
    Html,
    code_block,
    collapsed,
    figures,
    format_value,
    inline_png,
    inline_svg,
    key_numbers,
    page,
    paragraph,
    section,
    table,
)
from scgpt_hf.reporting.plots_predictions import plot_calibration, plot_confusion, plot_f1
from scgpt_hf.scoring.classification import f1_by_type
from scgpt_hf.training.run_folder import BEST_MODEL, SETTINGS, SUMMARY

_CAPTIONS = {"training": "Loss on training cells.", "validation": "Error on masked genes of held-out cells."}
# Long tables of the summary that the page shows as separate figures or tables.
_SHOWN = {"confusion", "labels", "reliability", "data", "composition", "domains"}


def finetuning_report(run: Path) -> str:
    """Return the report page of a fine-tuning run, for annotation or integration.

    Args:
        run: the run folder, with summary.json and any of settings.yaml, metrics.jsonl and umap.png.

    Raises:
        ValueError: a file is malformed; the message names it.
    """
    summary, settings = RunRecord.read(run / SUMMARY), RunRecord.read(run / SETTINGS)
    task = summary.text("task")
    if task == "annotate":
        purpose = f"A classifier that predicts {summary.text('labels_key')!r}"
    elif task == "perturb":
        purpose = "A model that predicts what genetic perturbations do to a cell"
    else:
        purpose = f"An encoder fine-tuned to integrate the batches in {summary.text('batch_key')!r}"
    lead = f"{purpose}, on {summary.number('train_cells')} cells. Pretrained model: {summary.text('model')}."
    umap = inline_png(run / "umap.png", "UMAP of the cells, embedded by the model.")
    details = {key: value for key, value in summary.content.items() if key not in _SHOWN}
    return page(
        run.resolve().name,
        lead,
        _key_numbers(summary),
        _predictions(summary),
        section("Learning", figures(*loss_figures(run, _CAPTIONS), umap), _errors(summary)),
        section("Labels", _labels(summary)),
        section("Data", table([*finetuning_data(summary).items()]), paragraph("Numbers in brackets count cells.")),
        section("Training", table([*finetuning_recipe(summary, settings).items()])),
        _how_to_use(run, task),
        section(
            "Settings and details",
            collapsed("All settings", table(_flatten(settings.content))),
            collapsed("All values of summary.json", table(_flatten(details))),
            collapsed("Description of the data", table(_flatten(summary.get("data", dict) or {}))),
        ),
    )


def _key_numbers(summary: RunRecord) -> Html:
    numbers = {
        "macro-F1 on held-out cells": summary.number("validation.macro_f1", ".3f"),
        "accuracy on held-out cells": summary.number("validation.accuracy", ".3f"),
        "macro-F1 of logistic regression on genes": summary.number("gene_baseline.macro_f1", ".3f"),
        "macro-F1 of always naming the most frequent label": summary.number("majority_baseline.macro_f1", ".3f"),
        "expected calibration error": summary.number("calibration_error.after", ".3f"),
        "of the variance of masked genes explained": summary.number("best.eval_variance_explained", ".1%"),
        "error of predicted effects on validation conditions, of no change": summary.number("best.eval_loss", ".2f")
        if summary.text("task") == "perturb"
        else UNKNOWN,
        "mean squared error of the best model (GEP), bins²": summary.number("best.eval_gep_mse", ".1f"),
        "mean squared error of each gene's mean, bins²": summary.number("best.eval_gene_mean_mse", ".1f"),
    }
    return key_numbers({label: number for label, number in numbers.items() if number != UNKNOWN})


def _predictions(summary: RunRecord) -> Html:
    """Return confusion matrix, F1 scores and calibration, drawn from the counts in the summary."""
    labels, counts = summary.get("confusion.labels", list), summary.get("confusion.counts", list)
    if not labels or not np.any(counts):
        return Html("")
    # The figures are made for one prediction per cell, so expand the counts to as many cells.
    true, predicted = np.nonzero(counts)
    repeats = np.asarray(counts)[true, predicted]
    names = np.asarray(labels, dtype=str)
    true, predicted = np.repeat(names[true], repeats), np.repeat(names[predicted], repeats)
    mean = np.mean(list(f1_by_type(true, predicted).values()))
    drawn = [
        inline_svg(plot_confusion(true, predicted), "Confusion matrix of the held-out cells."),
        inline_svg(
            plot_f1(true, {"model": predicted}), f"F1 score of each type among the held-out cells; mean {mean:.3f}."
        ),
    ]
    if bins := summary.get("reliability", dict):
        cells = np.asarray(bins["cells"], dtype=int)
        correct = np.concatenate(
            [np.arange(n) < round(n * share) for n, share in zip(cells, bins["accuracy"], strict=True)]
        )
        confidence = np.repeat(np.asarray(bins["confidence"], dtype=float), cells)
        caption = "Calibration: share of correct predictions by confidence. The dashed line is perfect calibration."
        drawn.append(inline_svg(plot_calibration(confidence, correct), caption))
    header = ("method", "macro-F1", "accuracy")
    return section(
        "Prediction of cell types",
        table(classifier_rows(summary), header, numeric_columns=[1, 2]),
        paragraph(f"{about_held_out(summary)} Cells were held out by {summary.text('held_out')}."),
        figures(*drawn),
    )


def _errors(summary: RunRecord) -> Html:
    """Return the errors on masked genes; only integration has them."""
    rows = [(row.name, row.meaning, f"{row.value:.2f}") for row in error_rows(summary) if row.value is not None]
    header = ("prediction of masked genes", "what it uses", "mean squared error (bins²)")
    return table(rows, header, numeric_columns=[2]) if rows else Html("")


def _labels(summary: RunRecord) -> Html:
    rows = [(label, f"{train:,}", f"{held_out:,}", *shares) for label, train, held_out, *shares in label_rows(summary)]
    header = ("label", "training cells", "held-out cells", "recall", "precision")
    return table(rows, header, numeric_columns=range(1, len(header))) if rows else Html("")


def _how_to_use(run: Path, task: str) -> Html:
    checkpoint = f"{run.resolve().name}/{BEST_MODEL}"
    command = "annotate" if task == "annotate" else "embed"
    return section("How to use", code_block(f"scgpt-hf {command} data.h5ad --model {checkpoint} --out out.h5ad"))


def _flatten(values: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Return rows of nested values, with keys joined by dots."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        if isinstance(value, Mapping):
            rows += _flatten(value, f"{prefix}{key}.")
        else:
            rows.append((f"{prefix}{key}", format_value(value)))
    return rows
