"""Write the scores of an evaluation to a folder: perturbation_scores.json and scores.csv."""

import json
import math
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pandas as pd

from scgpt_hf.output import require_free_folder, write_beside
from scgpt_hf.perturbation.evaluation.evaluate import CEILING, MODEL, REPLICATES, TRUTH, Evaluation
from scgpt_hf.perturbation.evaluation.metrics import METRICS

RESULTS, TABLE = "perturbation_scores.json", "scores.csv"
_N_SHOWN = 20  # genes of each condition that are kept for the figures


def write_results(evaluation: Evaluation, folder: str | Path) -> Path:
    """Write the scores to a new or empty folder, and return its path.

    The files are written to a temporary folder first, so `folder` is never incomplete. If it cannot be written, the
    scores are kept beside it.

    Raises:
        FileExistsError: the folder is not empty.
        OSError: it cannot be written. The message names the folder with the scores.
    """
    folder = Path(folder)
    require_free_folder(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    try:
        with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as temporary:
            made = Path(temporary, folder.name)
            made.mkdir()
            _write(evaluation, made)
            if folder.exists():
                folder.rmdir()
            os.rename(made, folder)
    except OSError as error:
        raise write_beside(folder, lambda place: _write(evaluation, place), error) from error
    return folder


def describe(evaluation: Evaluation) -> dict[str, Any]:
    """Return the evaluation as JSON: means by category and by whether a condition replicates, and all scores."""
    categories = sorted({row["category"] for row in evaluation.scores})
    return {
        "methods": evaluation.methods,
        "metrics": METRICS,
        "replicates_from": REPLICATES,
        "all": evaluation.table(),
        "categories": {category: evaluation.table(category) for category in categories},
        "replicating": evaluation.table(replicates=True),
        "not_replicating": evaluation.table(replicates=False),
        "conditions": [_describe_condition(evaluation, item) for item in evaluation.deltas],
        "scores": [_plain(row) for row in evaluation.scores],
        **evaluation.facts,
    }


def _describe_condition(evaluation: Evaluation, item: tuple[str, str]) -> dict[str, Any]:
    """Return the most affected genes of a condition, with their true and predicted deltas."""
    deltas = evaluation.deltas[item]
    top = np.argsort(-np.abs(deltas[TRUTH]), kind="stable")[:_N_SHOWN]
    shown = {name: [round(float(delta[gene]), 4) for gene in top] for name, delta in deltas.items()}
    return {
        "condition": item[0],
        "context": item[1],
        "split_half": round(evaluation.split_half[item], 4),
        "genes": [evaluation.genes[gene] for gene in top],
        "deltas": shown,
    }


def _write(evaluation: Evaluation, folder: Path) -> None:
    text = json.dumps(describe(evaluation), indent=1, default=str, allow_nan=False)
    (folder / RESULTS).write_text(text + "\n", encoding="utf-8")
    pd.DataFrame(evaluation.scores).to_csv(folder / TABLE, index=False)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row with None instead of NaN, and plain types."""
    plain = {name: value.item() if isinstance(value, np.generic) else value for name, value in row.items()}
    return {name: None if isinstance(value, float) and math.isnan(value) else value for name, value in plain.items()}


_SHOWN_METRICS = ("pearson_delta", "pearson_top20", "l2")


def format_table(tables: dict[str, dict[str, Any]], metrics: tuple[str, ...] = _SHOWN_METRICS) -> str:
    """Return a table of methods and metrics as text, the model first.

    Args:
        tables: result of `Evaluation.table`.
        metrics: the columns.
    """
    width = max(len(name) for name in (*tables, CEILING, MODEL))
    lines = [f"{'':{width}}  items  " + "  ".join(f"{name:>15}" for name in metrics)]
    for name, values in tables.items():
        cells = ["–" if values[metric] is None else f"{values[metric]:.3f}" for metric in metrics]
        lines.append(f"{name:{width}}  {values['items']:>5}  " + "  ".join(f"{cell:>15}" for cell in cells))
    return "\n".join(lines)
