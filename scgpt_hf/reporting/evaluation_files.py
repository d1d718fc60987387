"""The folder of an evaluation: scores.csv, scores.json and figures, whole or not at all.

What is scored and how, `evaluation.py` decides; `report.py` makes a page of the folder.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from scgpt_hf.analysis.embed import umap_of
from scgpt_hf.analysis.evaluation.classification import f1_by_type
from scgpt_hf.analysis.evaluation.evaluate import PREDICTION, TRANSFER, Evaluation, MethodScores
from scgpt_hf.analysis.evaluation.metrics import AVERAGES, BATCH, BIO
from scgpt_hf.analysis.evaluation.probing import Predictions
from scgpt_hf.analysis.evaluation.scored_cells import ScoredCells
from scgpt_hf.reporting.plots import plot_umap, save_figure
from scgpt_hf.reporting.plots_scores import plot_scores
from scgpt_hf.reporting.plots_types import plot_calibration, plot_confusion, plot_f1
from scgpt_hf.training.finetuning.calibration import calibration_error

GROUPS = {
    "cell types kept apart": BIO,
    "batches mixed": BATCH,
    "averages": tuple(AVERAGES),
    "types predicted": PREDICTION + TRANSFER,
}
SCORES, TABLE = "scores.json", "scores.csv"
MAPPED_CELLS = 5_000  # a map of more says no more, and UMAP takes minutes
_PROBE = PREDICTION[-1]


def require_free_folder(folder: Path) -> None:
    """Raise unless the folder can be made: it must not exist, or be empty.

    Raises:
        FileExistsError: it holds something.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists and is not empty; name a new folder with --out, or remove it")


def write_evaluation(
    evaluation: Evaluation, folder: Path, *, vector: Sequence[str] = (), told: dict[str, Any] | None = None
) -> None:
    """Write the folder of an evaluation; it appears whole, figures as PNG.

    Args:
        evaluation: what was scored.
        folder: new, or empty.
        vector: more formats for every figure: "svg", "pdf".
        told: what else a reader should know, added to scores.json, as the names of the files.

    Raises:
        FileExistsError: the folder holds something.
    """
    require_free_folder(folder)
    beside = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        figures = []
        for name, caption, figure in draw_figures(evaluation):
            for suffix in ("png", *vector):
                save_figure(figure, beside / f"{name}.{suffix}")
            figures.append({"file": f"{name}.png", "caption": caption})
        tabulate(evaluation).to_csv(beside / TABLE, index=False)
        record = {**(told or {}), **describe_evaluation(evaluation), "figures": figures}
        (beside / SCORES).write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        if folder.exists():
            folder.rmdir()
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def tabulate(evaluation: Evaluation) -> pd.DataFrame:
    """Return a row per method and metric: its `value`, or the reason why there is `none`."""
    rows = [
        {"method": method, "metric": metric, "value": scores.values.get(metric), "none": scores.reasons.get(metric, "")}
        for method, scores in evaluation.methods.items()
        for metric in ordered_metrics(scores)
    ]
    return pd.DataFrame(rows, columns=["method", "metric", "value", "none"])


def ordered_metrics(scores: MethodScores) -> list[str]:
    """Return the metrics that were asked for, computable or not, in the order of the groups."""
    asked = scores.values.keys() | scores.reasons.keys()
    return [metric for metrics in GROUPS.values() for metric in metrics if metric in asked]


def describe_evaluation(evaluation: Evaluation) -> dict[str, Any]:
    """Return what scores.json says of an evaluation."""
    cells = {"cells": _describe_cells(evaluation.cells)}
    if evaluation.reference is not None:
        cells["reference"] = _describe_cells(evaluation.reference)
    methods = {
        method: {
            "scores": scores.values,
            "not_computable": scores.reasons,
            "predictions": {metric: _describe_predictions(one) for metric, one in scores.predictions.items()},
        }
        for method, scores in evaluation.methods.items()
    }
    settings = {name: value for name, value in evaluation.settings.items() if name != "progress"}
    versions = {name: _version(name) for name in ("scgpt_hf", "scib-metrics", "scanpy", "scikit-learn", "scvi-tools")}
    return {
        "kind": "evaluation",
        "settings": settings,
        **cells,
        "methods": methods,
        "versions": {name: number for name, number in versions.items() if number},
    }


def draw_figures(evaluation: Evaluation) -> Iterator[tuple[str, str, Figure]]:
    """Yield the name, the caption and the figure: scores, F1 by type, confusions, calibration, maps."""
    methods, cells = evaluation.methods, evaluation.cells
    if any(scores.values for scores in methods.values()):
        yield (
            "scores",
            "Every score, higher is better; the best of a column is bold",
            plot_scores({method: scores.values for method, scores in methods.items()}, GROUPS),
        )
    probes = {method: scores.predictions[_PROBE] for method, scores in methods.items() if _PROBE in scores.predictions}
    if probes:
        first = next(iter(probes.values()))
        predicted = {method: one.predicted for method, one in list(probes.items())[:8]}
        yield "f1", f"F1 of each type by the linear probe, {first.protocol}", plot_f1(first.true, predicted)
    for method, scores in methods.items():
        if method in evaluation.settings["keys"]:
            yield from _draw_predictions(method, scores.predictions)
    drawn = np.sort(np.random.default_rng(evaluation.settings["seed"]).permutation(len(cells.rows))[:MAPPED_CELLS])
    for method, embedding in cells.embeddings.items():
        if len(drawn) < 4:
            continue
        place = umap_of(embedding[drawn], evaluation.settings["seed"])
        for what, of in (("label", cells.labels), ("batch", cells.batches)):
            column = evaluation.settings[what]
            caption = f"UMAP of {method}, {len(drawn):,} cells, by {column}"
            yield f"umap-{_slug(method)}-{what}", caption, plot_umap(place, {f"{method}: {column}": of[drawn].tolist()})


def _draw_predictions(method: str, predictions: dict[str, Predictions]) -> Iterator[tuple[str, str, Figure]]:
    for metric in (_PROBE, TRANSFER[-1]):
        if metric in predictions:
            one, what = predictions[metric], metric.removesuffix(" macro-F1")
            name, caption = f"{_slug(method)}-{_slug(what)}", f"{what} on {method}, {one.protocol}"
            yield f"confusion-{name}", f"Confusion: {caption}", plot_confusion(one.true, one.predicted)
            correct = one.true == one.predicted
            yield f"calibration-{name}", f"Calibration: {caption}", plot_calibration(one.confidence, correct)


def _describe_cells(cells: ScoredCells) -> dict[str, Any]:
    return {
        "n": len(cells.rows),
        "labels": dict(Counter(cells.labels.tolist()).most_common()),
        "batches": dict(Counter(cells.batches.tolist()).most_common()),
        "left_out": dict(cells.left_out),
    }


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
    return re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-").lower()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
