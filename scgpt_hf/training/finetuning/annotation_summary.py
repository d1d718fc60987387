"""Describe a run of annotation for summary.json: its cells, and its scores on the held-out cells."""

from typing import Any

import numpy as np
from scipy.special import softmax
from sklearn.metrics import confusion_matrix

from scgpt_hf.cells.source import CellSource
from scgpt_hf.training.finetuning.calibration import Logits, calibration_error, reliability
from scgpt_hf.training.finetuning.classifier import agreement, score
from scgpt_hf.training.finetuning.labels import LabelledCells
from scgpt_hf.training.finetuning.settings import AnnotateSettings


def describe_cells(source: CellSource, cells: LabelledCells, settings: AnnotateSettings) -> dict[str, Any]:
    """Return the number of cells of each label and part, and the number of cells that were left out."""
    n_cells = {
        part: np.bincount(cells.classes(part), minlength=len(cells.class_names)).tolist() for part in cells.parts
    }
    donors = {}
    if cells.donor_key is not None:
        donor_of = source.obs([cells.donor_key])[cells.donor_key]
        donors = {f"{part}_donors": int(donor_of.reindex(ids).nunique()) for part, ids in cells.parts.items()}
    return {
        "labels_key": settings.labels_key,
        "train": settings.train,
        "held_out": "cells" if cells.donor_key is None else cells.donor_key,
        **{f"{part}_cells": len(ids) for part, ids in cells.parts.items()},
        **donors,
        "labels": {
            label: dict(zip(n_cells, counts, strict=True))
            for label, *counts in zip(cells.class_names, *n_cells.values(), strict=True)
        },
        "left_out": cells.left_out,
        "rare_labels": cells.rare,
        "data": source.describe(),
    }


def describe_scores(cells: LabelledCells, logits: Logits, temperature: float) -> dict[str, Any]:
    """Return the scores on the held-out cells, and those of a baseline that always predicts the most frequent label.

    Args:
        cells: training and held-out cells.
        logits: calibrated logits of the held-out cells. Shape (cells, classes).
        temperature: the temperature by which the logits were divided.
    """
    classes = cells.classes("validation")
    majority = int(np.bincount(cells.classes("train")).argmax())
    predicted = logits.argmax(axis=1)
    before, after = (softmax(scaled, axis=1).max(axis=1) for scaled in (logits * temperature, logits))
    correct = predicted == classes
    confusion = confusion_matrix(classes, predicted, labels=range(len(cells.class_names)))
    return {
        "validation": score(logits.astype(np.float32), classes),
        "majority_baseline": {
            "label": cells.class_names[majority],
            **agreement(classes, np.full_like(classes, majority)),
        },
        "temperature": temperature,
        "calibration_error": {"before": calibration_error(before, correct), "after": calibration_error(after, correct)},
        "reliability": reliability(after, correct).to_dict("list"),
        "confusion": {"labels": cells.class_names, "counts": confusion.tolist()},
    }
