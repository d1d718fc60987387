"""State the facts of a run once: its errors and baselines, data, optimization, hardware.

Model cards format these facts as Markdown, report pages as HTML, and the last log line of a run as text. Values that
no file of the run records read "not recorded"; nothing is guessed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scgpt_hf.publishing.record import UNKNOWN, RunRecord, read_metrics

Rows = dict[str, str]
_NUMBER = (int, float)
_MAX_VALUES = 30  # of an obs column; a Census query can hold hundreds of data sets

# Predictors of the masked expression values, from the easiest to beat to the best possible one. The key is that of
# the validation metrics without the prefix `eval_`.
_PREDICTORS = {
    "constant_mse": ("one constant", "the mean value of the training cells, whatever the gene: explains no variance"),
    "gene_mean_mse": (
        "each gene's mean over training cells",
        "depends on the gene but not on the cell: a model must be below it to be of use",
    ),
    "gep_mse": (
        "model, from the visible genes (GEP)",
        "gene expression prediction: masked genes, from the visible genes of the same cell",
    ),
    "gepc_mse": (
        "model, from the cell embedding (GEPC)",
        "the same masked genes, from the embedding of the cell alone",
    ),
    "gen_mse": (
        "model, generated from the cell embedding",
        "the same masked genes, in a second pass that reads the cell embedding in place of <cls>",
    ),
    "tie_floor_mse": (
        "lowest possible error (tie floor)",
        "genes with equal counts are put into bins at random, which no model can predict",
    ),
}
_OBJECTIVES = {
    "gep": "gene expression prediction, GEP",
    "gepc": "GEP from the cell embedding, GEPC",
    "gen": "GEP in a second pass from the cell embedding, GEN",
    "gep_zero": "whether a gene is expressed, with GEP",
    "gepc_zero": "whether a gene is expressed, with GEPC",
    "ecs": "elastic cell similarity, ECS",
    "cce": "contrastive cell embedding, CCE",
    "dar": "domain adaptation, DAR",
    "cls": "classification",
    "views": "contrast of two views of each cell",
    "counts": "raw counts of all genes from the cell embedding",
}
_COMPOSITION = {"Tissues": "tissue_general", "Assays": "assay", "Diseases": "disease", "Data sets": "dataset_id"}
_DEMO = "demo: 700 blood cells of one donor that come with scanpy; its eight sequencing wells are used as donors"
PROBE = "probe"  # the classifier that annotation fits by default
_CLASSIFIERS = {
    PROBE: "logistic regression on the frozen cell embedding",
    "lora": "fine-tuned, low-rank updates of the encoder (LoRA)",
    "full": "fine-tuned, all weights",
}


# Scores of the cell embedding on labelled validation cells (`eval_labels`), without the prefix `eval_`. For all, higher
# is better.
EMBEDDING_SCORES = {
    "knn_macro_f1": ("kNN macro-F1", "cell types predicted from the 15 nearest neighbors; mean F1 over types"),
    "nmi": ("NMI", "agreement of k-means clusters with the cell types"),
    "asw_label": ("ASW label", "average silhouette width of the cell types; 0.5: they are not separated"),
    "ilisi": ("iLISI", "diversity of batches, or of donors, among the nearest cells; 1: fully mixed"),
}
_HIGHER_IS_BETTER = {"eval_variance_explained", *(f"eval_{name}" for name in EMBEDDING_SCORES)}


class Code(str):
    """A value to be set as code, e.g. an obs column or a filter."""


class ErrorRow(NamedTuple):
    """The mean squared error of one predictor of masked expression values, in squared bins or log1p values.

    Attributes:
        name: name of the predictor.
        value: its error, None if not recorded.
        meaning: what the predictor uses, in one sentence.
    """

    name: str
    value: float | None
    meaning: str


class ScoreRow(NamedTuple):
    """The scores of one embedding of the labelled validation cells.

    Attributes:
        method: "this model", or a baseline.
        scores: a score for each of `EMBEDDING_SCORES`, None if it cannot be computed or is not recorded.
    """

    method: str
    scores: list[float | None]


def read_summary(run: Path) -> RunRecord:
    """Return the summary of a pretraining run, completed from its split and metrics while it is in progress.

    Args:
        run: the run folder, with any of summary.json, split.json and metrics.jsonl.

    Raises:
        ValueError: a file is malformed; the message names the file and the key or line.
    """
    summary, split = RunRecord.read(run / "summary.json"), RunRecord.read(run / "split.json")
    known: dict[str, Any] = {
        "data": split.get("source", dict),
        "genes": len(split.get("source.genes", list) or []) or None,
        "composition": split.get("source.composition", dict),
        "input_style": split.get("source.tokens.input_style", str),
    }
    if column := split.get("source.steps.supervise_by", str):
        known["supervision"] = {"column": column, "classes": split.get("source.classes", list)}
    for part in ("train", "validation"):
        known[f"{part}_donors"] = len(split.get(f"parts.{part}.donors", list) or []) or None
        known[f"{part}_cells"] = split.get(f"parts.{part}.n_cells", int)
    if not summary.get("best", dict):
        metric = RunRecord.read(run / "settings.yaml").get("training.metric_for_best_model", str)
        path = run / "metrics.jsonl"
        known["best"] = best_validation(read_metrics(path) if path.is_file() else [], metric)
    summary.content |= {key: value for key, value in known.items() if not summary.content.get(key)}
    return summary


def best_validation(lines: Sequence[dict[str, Any]], metric: str | None = None) -> dict[str, Any]:
    """Return the best of the validation lines of a log, or nothing if there is none.

    Args:
        lines: lines of metrics.jsonl.
        metric: the setting `metric_for_best_model`; by default `eval_loss`.

    Raises:
        ValueError: the metric of a line is not a number.

    Example:
        >>> best_validation([{"eval_loss": 2.0}, {"loss": 0.5}, {"eval_loss": 1.0}])
        {'eval_loss': 1.0}
    """
    key = f"eval_{(metric or 'loss').removeprefix('eval_')}"
    values = [RunRecord(line, f"metrics.jsonl, step {line.get('step')}").get(key, _NUMBER) for line in lines]
    sign = -1 if key in _HIGHER_IS_BETTER else 1
    measured = [(sign * value, number) for number, value in enumerate(values) if value is not None]
    return lines[min(measured)[1]] if measured else {}


def score_rows(summary: RunRecord) -> list[ScoreRow]:
    """Return the scores of the model's embedding in the best validation and of the baselines; none without labels.

    Args:
        summary: summary of a run, with `best` and, if the run is finished, `baseline_scores`.

    Raises:
        ValueError: a score is not a number.
    """
    keys = {"this model": "best.eval_{}", "PCA, training cells": "best.eval_pca_{}"}
    keys |= {name: f"baseline_scores.{name}.{{}}" for name in summary.get("baseline_scores", dict) or {}}
    rows = [
        ScoreRow(method, [summary.get(key.format(name), _NUMBER) for name in EMBEDDING_SCORES])
        for method, key in keys.items()
    ]
    return rows if any(score is not None for score in rows[0].scores) else []


def value_unit(summary: RunRecord) -> str:
    """Return the unit of expression values: "bins", or "log1p values". Runs that do not record it have bins."""
    return "log1p values" if summary.get("input_style", str) == "log1p" else "bins"


def explain_values(summary: RunRecord) -> str:
    """Return a sentence on the expression values that a run predicts, and on the unit of their errors."""
    if value_unit(summary) == "bins":
        return "Expression values are bins (ranks within a cell), so errors are in bins squared."
    return "Expression values are log(1 + normalised count), so errors are in squares of these logarithms."


def error_rows(summary: RunRecord) -> list[ErrorRow]:
    """Return the errors of the model and of its baselines in the best validation.

    Quantile bins are nearly uniform, so an error alone is hard to interpret; the baselines, computed on the same masked
    positions, give it a scale. See `training/baselines.py`.

    Args:
        summary: summary of a run, with `best` (validation metrics) and `baselines`.

    Raises:
        ValueError: an error is not a number.
    """
    return [
        ErrorRow(name, value if value is not None else summary.get(f"baselines.{key}", _NUMBER), meaning)
        for key, (name, meaning) in _PREDICTORS.items()
        for value in [summary.get(f"best.eval_{key}", _NUMBER)]
        if key != "tie_floor_mse" or value_unit(summary) == "bins"  # other values have no ties
        if key not in ("gepc_mse", "gen_mse") or value is not None  # not every run has these objectives
    ]


def source_name(summary: RunRecord, requested: list[Any] | None = None) -> str:
    """Return where the cells come from.

    Args:
        summary: summary of a run, with the description of the source at `data`.
        requested: the setting `data` of a pretraining run, which names the demo and caches of the Hub.
    """
    if summary.get("data.census_version", str):
        return "CELLxGENE Census"
    if requested == ["demo"]:
        return _DEMO
    return ", ".join(map(str, requested or summary.get("data.paths", list) or [])) or summary.text("data.uri")


def pretraining_data(summary: RunRecord, settings: RunRecord) -> Rows:
    """Return the facts on the cells and genes of a pretraining run: name → text."""
    cells: Rows = {
        f"{name} cells": f"{summary.number(f'{part}_cells')}, of {summary.number(f'{part}_donors')} donors"
        for name, part in (("Training", "train"), ("Validation", "validation"))
    }
    cells["Split by (each value is in one part only)"] = Code(settings.text("data.donor_key"))
    genes = f"{summary.number('genes')}, selected on the training cells ({settings.text('data.gene_selection')})"
    return _data(summary, cells, genes, settings.get("data.data", list))


def supervision_rows(summary: RunRecord) -> Rows:
    """Return the facts on the labels that a pretraining run learned, name → text; empty if it learned none.

    They are apart from the results of self-supervised objectives, because labels make embeddings fit these labels.
    """
    if not summary.get("supervision", dict):
        return {}
    classes = summary.get("supervision.classes", list) or []
    shares = (summary.number(f"supervision.labelled_{part}", ".1%") for part in ("train", "validation"))
    return {
        "Supervised by (obs column)": Code(summary.text("supervision.column")),
        "Classes": f"{len(classes)}, those of the training cells",
        "Cells with one of these labels": "{} of the training cells, {} of the validation cells".format(*shares),
        "On the labelled validation cells": f"cross entropy {summary.number('best.eval_cls', '.3f')}, "
        f"accuracy {summary.number('best.eval_cls_accuracy', '.1%')}",
    }


def finetuning_data(summary: RunRecord) -> Rows:
    """Return the facts on the cells and genes of a fine-tuning run: name → text."""
    cells: Rows = {}
    for name, part in (("Training cells", "train"), ("Held-out cells", "validation")):
        n_donors = summary.get(f"{part}_donors", int)
        donors = f", of {n_donors:,} donor{'s' * (n_donors != 1)}" if n_donors else ""
        cells[name] = summary.number(f"{part}_cells") + donors
    if summary.get("task", str) == "integrate":
        domains = summary.get("domains", dict) or {}
        n_cells = {domain: sum(parts.values()) for domain, parts in domains.items()}
        cells["Batches, with their cells"] = ", ".join(f"{one} ({n:,})" for one, n in n_cells.items()) or UNKNOWN
    elif summary.get("task", str) == "perturb":
        cells["Cells of the evaluation"] = summary.number("test_cells")
        return _data(summary, cells, summary.number("genes"))
    else:
        held_out = summary.text("held_out")
        by_cell = "nothing: cells of one donor can be in both parts"
        cells["Split by (each value is in one part only)"] = by_cell if held_out == "cells" else Code(held_out)
        left_out = summary.get("left_out", dict) or {}
        cells["Left out"] = ", ".join(f"{reason}: {n:,}" for reason, n in left_out.items() if n) or "none"
    return _data(summary, cells, f"{summary.number('genes')}, those of the pretrained model")


def _data(summary: RunRecord, cells: Rows, genes: str, requested: list[Any] | None = None) -> Rows:
    """Return the facts on the data: source, `cells`, composition, genes, license."""
    keys = ("census_version", "obs_filter", "organism")
    census, obs_filter, organism = (summary.get(f"data.{key}", str) for key in keys)
    return {
        "Source": source_name(summary, requested),
        "Organism": organism.replace("_", " ").capitalize() if organism else UNKNOWN,
        "Census version": census or "none: the cells are not from a release of the Census",
        "Filter": Code(obs_filter) if obs_filter else "none",
        **cells,
        **{name: _composition(summary, column) for name, column in _COMPOSITION.items()},
        "Genes": genes,
        "Gene hash of the source": summary.text("data.gene_hash"),
        "License of the data": "CC BY 4.0, as for all of the Census" if census else "see the sources",
    }


def _composition(summary: RunRecord, column: str) -> str:
    """Return the most frequent values of an obs column, each with its number of cells."""
    cells = summary.get(f"composition.{column}", dict) or {}
    if not all(isinstance(number, int) for number in cells.values()):
        raise ValueError(f"{summary.name}: expected numbers of cells at 'composition.{column}', found {cells}")
    values = [f"{name} ({cells[name]:,})" for name in sorted(cells, key=lambda name: -cells[name])]
    more = [f"and {len(values) - _MAX_VALUES:,} more"] if len(values) > _MAX_VALUES else []
    return ", ".join(values[:_MAX_VALUES] + more) or UNKNOWN


def pretraining_recipe(summary: RunRecord, settings: RunRecord, config: RunRecord) -> Rows:
    """Return the facts on model, optimization and hardware of a pretraining run: name → text."""
    layers, width, heads = (
        settings.number(f"model.{name}", "d") for name in ("num_hidden_layers", "hidden_size", "num_attention_heads")
    )
    train_tokens = settings.get("data.train_tokens", int)
    sampled = f", {train_tokens:,} while training" if train_tokens else ""
    left_out = "; masked genes are left out of the input" if config.get("leave_out_masked", bool) else ""
    if config.get("objective", str) == "generative":
        left_out = "; they are queries by name only, to which no other token attends (generative training)"
    masked = ", ".join(map(str, settings.get("data.mask_ratios", list) or [UNKNOWN]))
    values = f"{settings.text('data.input_style')}, {settings.number('data.n_bins')} bins per cell"
    return {
        "Model": f"{layers} layers, hidden size {width}, {heads} attention heads, "
        f"{summary.number('model_parameters')} parameters",
        "Objectives (weights)": _objectives(config.get("loss_weights", dict)),
        "Input values": f"{values}; at most {settings.number('data.max_tokens')} tokens per cell{sampled}",
        "Masked share of a cell's genes": masked + left_out,
        "Steps": f"{summary.number('steps')}, each of {summary.number('global_batch_size')} cells; "
        f"{summary.number('epochs', '.3g')} epochs",
        **_shortcut_start(settings),
        **_sampling(settings),
        "Dropout": settings.number("model.dropout", "g"),
        **_optimization(summary, settings.number("training.learning_rate", "g")),
        **_hardware(summary, "train_seconds", "validation and checkpoints"),
        "Speed": f"{summary.number('cells_per_second', ',.0f')} cells/s, without validation and checkpoints",
        "Software": _name_values(summary.get("versions", dict)),
    }


def _shortcut_start(settings: RunRecord) -> Rows:
    """Name the parts that are trained before the first step of the run, if any are."""
    if not settings.get("training.shortcut_steps", int):
        return {}
    n_steps = settings.number("training.shortcut_steps")
    return {"Before these steps": f"shortcut and count decoder alone, {n_steps} steps; not included in the time"}


def _sampling(settings: RunRecord) -> Rows:
    """Return how cells are drawn, unless each is visited once an epoch."""
    column, power = settings.get("data.balance_by", str), settings.number("data.balance_power", "g")
    rule = f"values of `{column}` with n cells in proportion to n^(1 − {power}); this uses the column as a label"
    return {"Cells of an epoch": rule} if column else {}


def finetuning_recipe(summary: RunRecord, settings: RunRecord) -> Rows:
    """Return the facts on model, optimization and hardware of a fine-tuning run: name → text."""
    if summary.get("task", str) == "integrate":
        weights = {name: settings.get(f"{name}_weight", _NUMBER) for name in ("gep", "gepc", "ecs", "dar")}
        trained = {"Objectives (weights)": _objectives(weights)}
    elif summary.get("task", str) == "perturb":
        trained = {"Objective": f"squared error of the prediction; target: {settings.text('target')}"}
    elif summary.text("kept") == PROBE:
        return {
            "Pretrained model": Code(summary.text("model")),
            **_probe_recipe(summary),
            **_hardware(summary, "seconds", "embedding of the cells"),
            "Software": _name_values(summary.get("versions", dict)),
        }
    else:
        name = _CLASSIFIERS.get(summary.text("kept"), UNKNOWN)
        trained = {"Classifier": f"{name}; {summary.number('trained_parameters')} trained parameters"}
    return {
        "Pretrained model": Code(summary.text("model")),
        **trained,
        "Steps": f"{summary.number('steps')}, each of {settings.number('batch_size')} cells; "
        f"{summary.number('epochs', '.3g')} epochs",
        **_optimization(summary, settings.number("learning_rate", "g")),
        **_hardware(summary, "seconds", "validation"),
        "Software": _name_values(summary.get("versions", dict)),
    }


def _probe_recipe(summary: RunRecord) -> Rows:
    """Return the facts on a classifier whose encoder was not trained."""
    fit, part = ("refit", "training and held-out") if summary.get("refit", dict) else ("probe", "training")
    rows = {
        "Classifier": _CLASSIFIERS[PROBE],
        "Regularization": f"C = {summary.number(f'{fit}.C', 'g')}",
        "Fitted to": f"{summary.number(f'{fit}.cells')} {part} cells",
    }
    if contradicted := summary.get(f"{fit}.contradicted", dict):
        shown = ", ".join(f"{label}: {n:,}" for label, n in contradicted.items())
        rows["Left out, as most similar to cells of other labels"] = shown
    if (train := summary.text("train")) != PROBE:
        rows["Not kept"] = f"{_CLASSIFIERS.get(train, train)}: macro-F1 did not rise by more than its standard error"
    return rows


def _objectives(weights: dict[str, Any] | None) -> str:
    names = {_OBJECTIVES.get(key, key): weight for key, weight in (weights or {}).items() if weight}
    return "; ".join(f"{name} ({weight})" for name, weight in names.items()) or UNKNOWN


def _optimization(summary: RunRecord, learning_rate: str) -> Rows:
    """Return the facts on the optimizer; `learning_rate` is the highest, as text."""
    warmup = summary.get("recipe.warmup", _NUMBER)
    if warmup == 0:
        rise = "no warm-up"
    elif warmup is not None and warmup < 1:  # as transformers reads it: below 1, a share of the steps
        rise = f"warm-up over {warmup:.0%} of the steps"
    else:
        rise = f"warm-up over {summary.number('recipe.warmup', ',.0f')} steps"
    decay, max_norm = (summary.number(f"recipe.{name}", "g") for name in ("weight_decay", "clipped_at"))
    averaged = {}
    if summary.get("recipe.ema_decay", _NUMBER) is not None:
        kept = summary.number("recipe.ema_decay", "g")
        averaged = {"Validated and saved weights": f"exponential moving average, decay {kept}"}
    return {
        "Learning rate": f"at most {learning_rate}; {rise}; schedule: {summary.text('recipe.schedule')}",
        "Optimizer": f"{summary.text('recipe.optimizer')}, weight decay {decay}, gradient norm clipped at {max_norm}",
        **averaged,
        "Seed": summary.number("recipe.seed", "d"),
    }


def _hardware(summary: RunRecord, time_key: str, included: str) -> Rows:
    """Return the facts on devices and time; `included` names what the time at `time_key` covers besides training."""
    seconds, processes = (summary.get(key, _NUMBER) for key in (time_key, "processes"))
    device_hours = UNKNOWN if seconds is None or processes is None else f"{seconds * processes / 3600:.3g}"
    duration = f"{seconds / 3600:,.1f} h" if seconds is not None and seconds >= 3600 else None
    return {
        "Precision": summary.text("precision"),
        "Hardware": f"{summary.number('processes')} x {summary.text('device')}",
        "Time": f"{duration or summary.number(time_key, ',.0f') + ' s'}, including {included}",
        "Device-hours (to estimate energy)": device_hours,
    }


def classifier_rows(summary: RunRecord) -> list[tuple[str, str, str]]:
    """Return name, macro-F1 and accuracy on the held-out cells of a classifier and of what it is compared with.

    The first row is the classifier of the run. The rows of methods that the run did not fit are left out.
    """
    kept, train = summary.text("kept"), summary.text("train")
    names = {
        "validation": f"this model: {_CLASSIFIERS.get(kept, UNKNOWN)}",
        "probe": _CLASSIFIERS[PROBE],
        "fine_tuned": f"not kept: {_CLASSIFIERS.get(train, train)}",
        "gene_baseline": "logistic regression on variable genes",
        "majority_baseline": f"always {summary.text('majority_baseline.label')}",
    }
    del names["probe" if kept == PROBE else "fine_tuned"]  # the same as the first row
    return [
        (name, summary.number(f"{key}.macro_f1", ".3f"), summary.number(f"{key}.accuracy", ".3f"))
        for key, name in names.items()
        if summary.get(key, dict)
    ]


def about_held_out(summary: RunRecord) -> str:
    """State in one or two sentences how the held-out cells of a classifier were used."""
    if summary.text("kept") != PROBE:
        return (
            "The held-out cells were also used to choose the epoch and to calibrate the confidence, so the scores are "
            "slightly too good."
        )
    scored = "The classifier that was scored was fitted and calibrated without the held-out cells."
    return (
        f"{scored} The saved one was then fitted to training and held-out cells."
        if summary.get("refit", dict)
        else scored
    )


def label_rows(summary: RunRecord) -> list[tuple[str, int, int, str, str]]:
    """Return for each label of a classifier: its name, training cells, held-out cells, recall and precision.

    Recall is the share of the label's held-out cells that were predicted as such; precision is the share of the
    cells predicted as this label that have it. Both are "–" where there are no such cells.

    Raises:
        ValueError: the confusion matrix does not match the labels.
    """
    labels = summary.get("labels", dict) or {}
    counts = np.array(summary.get("confusion.counts", list) or np.zeros((len(labels), len(labels))), dtype=np.int64)
    if counts.shape != (len(labels), len(labels)):
        raise ValueError(
            f"{summary.name}: expected a {len(labels)} x {len(labels)} matrix at 'confusion.counts', one row per "
            f"label, found shape {counts.shape}"
        )
    correct, n_true, n_predicted = counts.diagonal(), counts.sum(axis=1), counts.sum(axis=0)
    return [
        (label, parts["train"], int(n_true[i]), _share(correct[i], n_true[i]), _share(correct[i], n_predicted[i]))
        for i, (label, parts) in enumerate(labels.items())
    ]


def _share(part: Any, total: Any) -> str:
    return f"{part / total:.0%}" if total else "–"


def _name_values(values: dict[str, Any] | None) -> str:
    """Return names and values as one line of text."""
    return ", ".join(f"{name} {value}" for name, value in (values or {}).items()) or UNKNOWN
