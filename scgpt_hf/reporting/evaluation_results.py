"""Write the results of an evaluation to a folder: scores.csv, scores.json and figures.

`analysis/evaluation/evaluate.py` computes the scores; `evaluation_report.py` makes a page of the folder.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scgpt_hf.analysis.embed import umap_of
from scgpt_hf.analysis.evaluation.baseline_embeddings import BASELINES
from scgpt_hf.analysis.evaluation.evaluate import PREDICTION, TRANSFER, Evaluation, MethodScores
from scgpt_hf.analysis.evaluation.selected_cells import SelectedCells
from scgpt_hf.cells.locking import rename_new
from scgpt_hf.output import require_free_folder, write_beside
from scgpt_hf.reporting.plots import UMAP_CELLS, plot_scores, plot_umap, save_figure
from scgpt_hf.reporting.plots_predictions import plot_calibration, plot_confusion, plot_f1
from scgpt_hf.scoring.classification import f1_by_type
from scgpt_hf.scoring.metrics import AVERAGES, BATCH, BIO
from scgpt_hf.scoring.probing import Predictions
from scgpt_hf.training.finetuning.calibration import calibration_error

# Headings of the metrics, in figures and reports.
GROUPS = {
    "separation of cell types": BIO,
    "mixing of batches": BATCH,
    "averages": tuple(AVERAGES),
    "prediction of types": PREDICTION + TRANSFER,
}
SCORES, TABLE = "scores.json", "scores.csv"
_MAX_METHODS = 8  # in one figure of F1 scores
_PROBE = PREDICTION[-1]


def write_evaluation(
    evaluation: Evaluation, folder: Path, *, vector: Sequence[str] = (), extra: dict[str, Any] | None = None
) -> None:
    """Write scores.csv, scores.json and figures to a folder.

    They are written to a temporary folder first, so `folder` is never incomplete. If another process writes to `folder`
    at the same time, the scores are kept beside it.

    Args:
        evaluation: the scores.
        folder: new, or empty.
        vector: formats of the figures besides PNG: "svg", "pdf".
        extra: more values for scores.json, such as the names of the scored files.

    Raises:
        OSError: the folder is not empty, or cannot be written. The message says where the scores are.
    """
    # A folder of this process alone: another one may write to the same folder.
    temporary = folder.with_name(f".{folder.name}.{uuid4().hex[:8]}.part")
    try:
        require_free_folder(folder)
        temporary.mkdir(parents=True)
        figures = []
        for name, caption, figure in _draw_figures(evaluation):
            for suffix in ("png", *vector):
                save_figure(figure, temporary / f"{name}.{suffix}")
            figures.append({"file": f"{name}.png", "caption": caption})
        _write_scores(temporary, evaluation, {**(extra or {}), "figures": figures})
        rename_new(temporary, folder)
    except Exception as error:
        scores_only = partial(_write_scores, evaluation=evaluation, extra={**(extra or {}), "figures": []})
        raise write_beside(folder, scores_only, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_scores(folder: Path, evaluation: Evaluation, extra: dict[str, Any]) -> None:
    """Write scores.csv and scores.json, with further values in the latter."""
    tabulate(evaluation).to_csv(folder / TABLE, index=False)
    record = {**extra, **_describe_evaluation(evaluation)}
    (folder / SCORES).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def tabulate(evaluation: Evaluation) -> pd.DataFrame:
    """Return the scores as a table with a row per method and metric.

    Returns:
        Columns `method`, `metric`, `value` (NaN if there is none) and `reason` (why there is no value, or "").
    """
    rows = [
        (method, metric, scores.values.get(metric), scores.reasons.get(metric, ""))
        for method, scores in evaluation.methods.items()
        for metric in _ordered_metrics(scores)
    ]
    return pd.DataFrame(rows, columns=["method", "metric", "value", "reason"])


def _ordered_metrics(scores: MethodScores) -> list[str]:
    """Return the requested metrics, computable or not, in the order of `GROUPS`."""
    requested = scores.values.keys() | scores.reasons.keys()
    return [metric for metrics in GROUPS.values() for metric in metrics if metric in requested]


def _describe_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Return the content of scores.json, without `figures`."""
    cells = {"cells": _describe_cells(evaluation.cells)}
    if evaluation.reference is not None:
        cells["reference"] = _describe_cells(evaluation.reference)
    methods = {
        method: {
            **_describe_baseline(method),
            "scores": scores.values,
            "not_computable": scores.reasons,
            "predictions": {metric: _describe_predictions(one) for metric, one in scores.predictions.items()},
        }
        for method, scores in evaluation.methods.items()
    }
    settings = {name: value for name, value in evaluation.settings.items() if name != "progress"}
    settings["run"] = None if settings["run"] is None else Path(settings["run"]).resolve().name
    versions = {name: _version(name) for name in ("scgpt_hf", "scib-metrics", "scanpy", "scikit-learn", "scvi-tools")}
    return {
        "kind": "evaluation",
        "settings": settings,
        **cells,
        "methods": methods,
        "versions": {name: number for name, number in versions.items() if number},
    }


def _draw_figures(evaluation: Evaluation) -> Iterator[tuple[str, str, Figure]]:
    """Yield the name, the caption and the figure of each plot: scores, F1 scores, confusion, calibration, UMAPs."""
    methods = evaluation.methods
    if any(scores.values for scores in methods.values()):
        yield (
            "scores",
            "All scores. Higher is better; the best score of each column is bold.",
            plot_scores({method: scores.values for method, scores in methods.items()}, GROUPS),
        )
    probes = {method: scores.predictions[_PROBE] for method, scores in methods.items() if _PROBE in scores.predictions}
    if probes:
        first = next(iter(probes.values()))
        predicted = {method: one.predicted for method, one in list(probes.items())[:_MAX_METHODS]}
        yield (
            "f1",
            f"F1 score of each type, predicted by the linear probe; {first.protocol}.",
            plot_f1(first.true, predicted),
        )
    for method, scores in methods.items():
        if method in evaluation.settings["embedding_keys"]:
            yield from _draw_predictions(method, scores.predictions)
    yield from _draw_umaps(evaluation)


def _draw_umaps(evaluation: Evaluation) -> Iterator[tuple[str, str, Figure]]:
    cells = evaluation.cells
    drawn = np.sort(np.random.default_rng(evaluation.settings["seed"]).permutation(len(cells.rows))[:UMAP_CELLS])
    for method, embedding in cells.embeddings.items():
        if len(drawn) < 4:  # too few neighbors for UMAP
            continue
        coordinates = umap_of(embedding[drawn], evaluation.settings["seed"])
        for name, key, values in (("label", "labels_key", cells.labels), ("batch", "batch_key", cells.batches)):
            column = evaluation.settings[key]
            caption = f"UMAP of {method}: {len(drawn):,} cells, colored by {column}."
            figure = plot_umap(coordinates, {f"{method}: {column}": values[drawn].tolist()})
            yield f"umap-{_slug(method)}-{name}", caption, figure


def _draw_predictions(method: str, predictions: dict[str, Predictions]) -> Iterator[tuple[str, str, Figure]]:
    for metric in (_PROBE, TRANSFER[-1]):
        if metric in predictions:
            one, classifier = predictions[metric], metric.removesuffix(" macro-F1")
            name, caption = f"{_slug(method)}-{_slug(classifier)}", f"{classifier} on {method}; {one.protocol}."
            yield f"confusion-{name}", f"Confusion matrix: {caption}", plot_confusion(one.true, one.predicted)
            correct = one.true == one.predicted
            yield f"calibration-{name}", f"Calibration: {caption}", plot_calibration(one.confidence, correct)


def _describe_cells(cells: SelectedCells) -> dict[str, Any]:
    return {
        "n": len(cells.rows),
        "labels": dict(Counter(cells.labels.tolist()).most_common()),
        "batches": dict(Counter(cells.batches.tolist()).most_common()),
        "left_out": dict(cells.left_out),
    }


def _describe_baseline(method: str) -> dict[str, str]:
    """Return the description and the source of a baseline; nothing for an embedding."""
    if method not in BASELINES:
        return {}
    return {"meaning": BASELINES[method].meaning, "source": BASELINES[method].source}


def _describe_predictions(predictions: Predictions) -> dict[str, Any]:
    correct = predictions.true == predictions.predicted
    return {
        "protocol": predictions.protocol,
        "cells": len(predictions.cells),
        "left_out": predictions.left_out,
        "accuracy": predictions.accuracy,
        "calibration_error": calibration_error(predictions.confidence, correct),
        "f1": f1_by_type(predictions.true, predictions.predicted),
    }


def _slug(name: str) -> str:
    """Return a name with letters, digits and hyphens only, for a file."""
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
