"""Score the embeddings of labelled cells, and baselines on the same cells.

    select cells      selected_cells.py       labelled cells, at most 50,000
    compute features  baseline_embeddings.py  of the baselines; those of the embeddings are in obsm
                      run_baselines.py        of the baselines that belong to a pretraining run
    score             metrics.py              separation of cell types, mixing of batches
                      probing.py              cell types predicted across donors, and transferred from a reference

`reporting/evaluation_results.py` writes the results to a folder.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import pandas as pd

from scgpt_hf.analysis.evaluation.baseline_embeddings import (
    BASELINES,
    RANKS,
    baseline_features,
    transfer_features,
)
from scgpt_hf.analysis.evaluation.run_baselines import available_baselines, run_features
from scgpt_hf.analysis.evaluation.selected_cells import MAX_CELLS, SelectedCells, select_cells
from scgpt_hf.cells.block import FloatArray
from scgpt_hf.cells.source import open_source
from scgpt_hf.progress_bar import progress_bar
from scgpt_hf.scoring.metrics import (
    AVERAGES,
    BATCH,
    BIO,
    NotComputable,
    add_averages,
    integration_scorers,
)
from scgpt_hf.scoring.probing import CLASSIFIERS, Classifier, Predictions, predict_held_out, predict_query

if TYPE_CHECKING:
    from anndata import AnnData

PREDICTION = tuple(f"{classifier} macro-F1" for classifier in CLASSIFIERS)
TRANSFER = tuple(f"transfer {metric}" for metric in PREDICTION)
METRICS = BIO + BATCH + PREDICTION + TRANSFER
NOT_APPLICABLE = "does not apply to this method"

Scorers = dict[str, Callable[[], float]]
Pair = tuple[FloatArray, FloatArray]


class EvaluationSettings(TypedDict, total=False):
    """Optional settings of an evaluation.

    Attributes:
        metrics: names from `METRICS`. If you pass names, a metric that cannot be computed raises an error. By default
            all metrics are tried, and those that cannot be computed are reported with the cause.
        baselines: names from `BASELINES`. By default all but scVI; those of a run only if `run` is passed.
        run: folder of the pretraining run of the embeddings, for the baselines that know its training cells.
        layer: layer with the raw counts, which the baselines need; by default `X`, or the only other one that has them.
        round_counts: round fractional counts; by default false.
        unlabeled_categories: values of `labels_key` that mean a cell has no label; by default "unknown".
        max_cells: if there are more cells, they are sampled; by default 50,000. See `sample_cells`.
        seed: seed of samples, folds and baselines; by default 0.
        progress: show a progress bar; by default true.
    """

    metrics: Sequence[str] | None
    baselines: Sequence[str] | None
    run: str | Path | None
    layer: str | None
    round_counts: bool
    unlabeled_categories: Sequence[str]
    max_cells: int
    seed: int
    progress: bool


DEFAULTS: EvaluationSettings = {
    "metrics": None,
    "baselines": None,
    "run": None,
    "layer": None,
    "round_counts": False,
    "unlabeled_categories": ("unknown",),
    "max_cells": MAX_CELLS,
    "seed": 0,
    "progress": True,
}


@dataclass
class MethodScores:
    """The scores of one embedding or baseline.

    Attributes:
        values: metric → score, with the averages.
        reasons: metric → why it has no score.
        predictions: metric of predicted types → the predictions that it scores.
    """

    values: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    predictions: dict[str, Predictions] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of several methods on the same cells.

    Attributes:
        methods: embedding or baseline → its scores; embeddings first.
        cells: the scored cells, with the embeddings of the baselines added.
        reference: the cells from which types are transferred, or None.
        settings: all settings, with defaults, `embedding_keys`, `labels_key` and `batch_key`.
    """

    methods: dict[str, MethodScores]
    cells: SelectedCells
    reference: SelectedCells | None
    settings: dict[str, Any]


def evaluate_embeddings(
    adata: "AnnData",
    embedding_keys: Sequence[str],
    labels_key: str = "cell_type",
    batch_key: str = "donor_id",
    *,
    reference: "AnnData | None" = None,
    **settings: Unpack[EvaluationSettings],
) -> Evaluation:
    """Score embeddings, and baselines on the same cells.

    Args:
        adata: labelled cells with embeddings in obsm and, for the baselines, raw counts. In memory or backed.
        embedding_keys: keys of the embeddings in obsm.
        labels_key: obs column with cell types.
        batch_key: obs column with batches, usually donors. A batch is never split between training and test cells.
        reference: labelled cells with the same embeddings, from which types are transferred to `adata`.
        settings: see `EvaluationSettings`.

    Returns:
        The scores of each method, the cells, and the settings.

    Raises:
        NotComputable: a metric that you passed by name cannot be computed.
        ValueError: a column, an embedding, a metric or a baseline does not exist, an embedding is not finite, or the
            counts are not raw; see `select_cells`.
        ModuleNotFoundError: scvi-tools, or scib-metrics for a metric that you passed by name, is not installed.

    Example:
        >>> result = evaluate_embeddings(adata, ["X_scgpt"], "cell_type", "donor_id")  # doctest: +SKIP
        >>> result.methods["X_scgpt"].values["total"]  # doctest: +SKIP
        0.61
    """
    complete: Any = {**DEFAULTS, **settings}
    _require_names(complete, with_reference=reference is not None)
    complete["baselines"] = _choose_baselines(complete["baselines"], complete["run"])
    selection = {name: complete[name] for name in ("unlabeled_categories", "max_cells", "seed")}
    cells = select_cells(adata, embedding_keys, labels_key, batch_key, **selection)
    reference_cells = None
    if reference is not None:
        reference_cells = select_cells(reference, embedding_keys, labels_key, batch_key, **selection)
    features, pairs = _compute_features(adata, cells, reference, reference_cells, complete)
    metrics = complete["metrics"] or [name for name in METRICS if reference is not None or name not in TRANSFER]
    methods = {}
    for method in progress_bar(features, unit="methods", description="scoring", show=complete["progress"]):
        scores = methods[method] = MethodScores()
        scorers = _scorers(method, features[method], cells, scores.predictions, complete["seed"])
        if reference_cells is not None and method in pairs:
            scorers |= _transfer_scorers(method, pairs[method], reference_cells, cells, scores.predictions)
        _score(scores, scorers, metrics, strict=bool(complete["metrics"]))
    # The features of a classifier are thousands of genes, not an embedding to draw.
    embeddings = {method: features[method] for method in features if not _is_classifier(method)}
    scored = SelectedCells(cells.rows, cells.labels, cells.batches, embeddings, cells.left_out)
    keys = {"embedding_keys": list(embedding_keys), "labels_key": labels_key, "batch_key": batch_key}
    return Evaluation(methods, scored, reference_cells, {**keys, **complete})


def _require_names(settings: dict[str, Any], *, with_reference: bool) -> None:
    """Raise ValueError if a metric or a baseline does not exist, or if a metric needs a reference."""
    for what, known in (("metrics", METRICS), ("baselines", BASELINES)):
        if unknown := sorted(set(settings[what] or ()) - set(known)):
            raise ValueError(f"unknown {what.removesuffix('s')} {unknown[0]!r}; expected some of {list(known)}")
    if not with_reference and (transfer := sorted(set(settings["metrics"] or ()) & set(TRANSFER))):
        raise ValueError(f"{transfer[0]!r} needs labelled reference cells; pass them as reference (--reference)")


def _choose_baselines(names: Sequence[str] | None, run: str | Path | None) -> list[str]:
    """Return the names of the baselines to compute: those that are wanted, or all that can be computed.

    Raises:
        ValueError: a baseline needs a run, and none was passed.
    """
    of_run = [] if run is None else available_baselines(Path(run))
    if run is not None and not of_run:
        raise ValueError(f"{run} is not the folder of a pretraining run: it has no best_model; name another folder")
    if names is None:
        return [name for name, one in BASELINES.items() if one.by_default and (not one.needs_run or name in of_run)]
    if run is None and (lacking := [name for name in names if BASELINES[name].needs_run]):
        raise ValueError(f"{lacking[0]!r} belongs to a pretraining run; pass the run folder as run (--run)")
    return list(names)


def _is_classifier(method: str) -> bool:
    return method in BASELINES and BASELINES[method].is_classifier


def _compute_features(
    adata: "AnnData",
    cells: SelectedCells,
    reference: "AnnData | None",
    reference_cells: SelectedCells | None,
    settings: dict[str, Any],
) -> tuple[dict[str, FloatArray], dict[str, Pair]]:
    """Return the features of each method.

    Returns:
        Method → features of the cells; and method → features of (reference cells, cells), for the methods that can
        transfer types.
    """
    features, pairs = dict(cells.embeddings), {}
    if reference_cells is not None:
        pairs = {key: (reference_cells.embeddings[key], features[key]) for key in features}
    baselines, seed = settings["baselines"], settings["seed"]
    reading = {name: settings[name] for name in ("layer", "round_counts")}
    if not baselines:
        return features, pairs
    source = open_source(adata, primary_only=False, **reading)
    counts, genes = source.read(cells.rows).counts, pd.Index(source.genes["feature_id"])
    features |= baseline_features(counts, cells.batches, baselines, seed, progress=settings["progress"])
    embed = partial(run_features, baselines=baselines, progress=settings["progress"])
    run = settings["run"]
    if run is not None:
        features |= embed(Path(run), source, cells.rows)
    if reference is not None and reference_cells is not None:
        reference_source = open_source(reference, primary_only=False, **reading)
        reference_counts = reference_source.read(reference_cells.rows).counts
        reference_genes = pd.Index(reference_source.genes["feature_id"])
        if run is not None:
            of_reference = embed(Path(run), reference_source, reference_cells.rows)
            pairs |= {name: (of_reference[name], features[name]) for name in of_reference}
        shared = genes.intersection(reference_genes, sort=False)
        if not len(shared):
            raise ValueError(
                f"reference and query have no gene in common: {list(reference_genes[:3])} and {list(genes[:3])}; use "
                "the same gene ids in both"
            )
        reference_counts = reference_counts[:, reference_genes.get_indexer(shared)]
        counts = counts[:, genes.get_indexer(shared)]
        pairs |= transfer_features(reference_counts, reference_cells.batches, counts, baselines, seed)
    return features, pairs


def _scorers(
    method: str, features: FloatArray, cells: SelectedCells, predictions: dict[str, Predictions], seed: int
) -> Scorers:
    """Return a function for each metric that applies to the method. They add their predictions to `predictions`."""

    def predict(metric: str, classifier: Classifier) -> float:
        predictions[metric] = predict_held_out(features, cells.labels, cells.batches, classifier, seed=seed)
        return predictions[metric].macro_f1

    classify: Scorers = {
        metric: partial(predict, metric, classifier) for metric, classifier in zip(PREDICTION, CLASSIFIERS, strict=True)
    }
    if _is_classifier(method):  # its features are no embedding
        return {PREDICTION[-1]: partial(predict, PREDICTION[-1], _classifier_of(method))}
    return integration_scorers(features, cells.labels, cells.batches) | classify


def _transfer_scorers(
    method: str, pair: Pair, reference: SelectedCells, cells: SelectedCells, predictions: dict[str, Predictions]
) -> Scorers:
    """Return a function for each transfer metric that applies to the method, as `_scorers` does."""

    def predict(metric: str, classifier: Classifier) -> float:
        predictions[metric] = predict_query(pair[0], reference.labels, pair[1], cells.labels, classifier)
        return predictions[metric].macro_f1

    transfer: Scorers = {
        metric: partial(predict, metric, classifier) for metric, classifier in zip(TRANSFER, CLASSIFIERS, strict=True)
    }
    return (
        {TRANSFER[-1]: partial(predict, TRANSFER[-1], _classifier_of(method))} if _is_classifier(method) else transfer
    )


def _classifier_of(method: str) -> Classifier:
    """Return the classifier of a baseline that is one."""
    return "ANOVA probe" if method == RANKS else "linear probe"


def _score(scores: MethodScores, scorers: Scorers, metrics: Sequence[str], *, strict: bool) -> None:
    """Compute the metrics and their averages into `scores`. With `strict`, a metric that cannot be computed raises."""
    for metric in metrics:
        if metric not in scorers:
            scores.reasons[metric] = NOT_APPLICABLE
            continue
        try:
            scores.values[metric] = scorers[metric]()
        except (NotComputable, ModuleNotFoundError) as error:
            if strict:
                raise
            scores.reasons[metric] = error.cause if isinstance(error, NotComputable) else str(error)
    scores.values = add_averages(scores.values)
    for average, parts in AVERAGES.items():
        if missing := [part for part in parts if part in scores.reasons]:
            not_applicable = all(scores.reasons[part] == NOT_APPLICABLE for part in missing)
            scores.reasons[average] = NOT_APPLICABLE if not_applicable else f"needs {' and '.join(missing)}"
