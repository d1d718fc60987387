"""Scores embeddings of an AnnData beside baselines computed on the same cells, and transfer from a reference.

Which cells are scored is decided in `scored_cells.py`, what a score is in `metrics.py` and `probing.py`, the baselines
in `baseline_embeddings.py`; `evaluation_files.py` writes what comes out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import pandas as pd
from scipy.sparse import csr_matrix
from tqdm import tqdm

from scgpt_hf.analysis.evaluation.baseline_embeddings import (
    BASELINES,
    LOGISTIC,
    PCA,
    baseline_features,
    transfer_features,
)
from scgpt_hf.analysis.evaluation.metrics import (
    AVERAGES,
    BATCH,
    BIO,
    FloatArray,
    NotComputable,
    integration_scorers,
    with_averages,
)
from scgpt_hf.analysis.evaluation.probing import CLASSIFIERS, Classifier, Predictions, predict_held_out, predict_query
from scgpt_hf.analysis.evaluation.scored_cells import MAX_CELLS, ScoredCells, choose_scored
from scgpt_hf.cells.source import open_source

if TYPE_CHECKING:
    from anndata import AnnData

PREDICTION = tuple(f"{classifier} macro-F1" for classifier in CLASSIFIERS)
TRANSFER = tuple(f"transfer {metric}" for metric in PREDICTION)
METRICS = BIO + BATCH + PREDICTION + TRANSFER
NOT_APPLICABLE = "does not apply to this method"

Scorers = dict[str, Callable[[], float]]
Pair = tuple[FloatArray, FloatArray]


class EvaluationSettings(TypedDict, total=False):
    """How embeddings are evaluated; what is left out takes the default.

    Attributes:
        metrics: of `METRICS`; a score asked for by name that cannot be computed is an error. By default all are tried,
            and those that these cells do not allow are reported with the cause.
        baselines: of `BASELINES`; by default variable genes with PCA and with logistic regression.
        layer: with the raw counts, which the baselines need; `X` by default.
        unlabelled: values of the label that mean there is none; "unknown" by default.
        max_cells: more cells than these are sampled, 50,000 by default; see `sample_cells`.
        seed: of samples, folds and baselines; 0 by default.
        progress: show a bar, true by default.
    """

    metrics: Sequence[str] | None
    baselines: Sequence[str]
    layer: str | None
    unlabelled: Sequence[str]
    max_cells: int
    seed: int
    progress: bool


DEFAULTS: EvaluationSettings = {
    "metrics": None,
    "baselines": (PCA, LOGISTIC),
    "layer": None,
    "unlabelled": ("unknown",),
    "max_cells": MAX_CELLS,
    "seed": 0,
    "progress": True,
}


@dataclass
class MethodScores:
    """What one embedding or baseline reached.

    Attributes:
        values: metric → score, averages included.
        reasons: metric → why it is not computable.
        predictions: metric of predicted types → the predictions it is made of.
    """

    values: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    predictions: dict[str, Predictions] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Scores of several methods on the same cells.

    Attributes:
        methods: embedding or baseline → its scores; embeddings first.
        cells: that were scored, with the embeddings of the baselines added.
        reference: the cells learnt from for transfer, if any.
        settings: what was asked, complete, with `keys`, `label` and `batch`.
    """

    methods: dict[str, MethodScores]
    cells: ScoredCells
    reference: ScoredCells | None
    settings: dict[str, Any]


def evaluate_embeddings(
    adata: "AnnData",
    keys: Sequence[str],
    label: str,
    batch: str,
    *,
    reference: "AnnData | None" = None,
    **settings: Unpack[EvaluationSettings],
) -> Evaluation:
    """Return the scores of embeddings beside those of baselines.

    Args:
        adata: labelled cells with the embeddings in obsm and, for baselines, raw counts; in memory or backed.
        keys: embeddings in obsm.
        label: obs column with cell types.
        batch: obs column with donors, which are never split between training and test.
        reference: labelled cells with the same embeddings, from which types are transferred to `adata`.
        settings: see `EvaluationSettings`.

    Raises:
        NotComputable: a score asked for by name.
        ValueError: no such column or embedding, values that are not finite, counts that are not raw, names of metrics
            or baselines that do not exist; see `choose_scored`.
        ModuleNotFoundError: scib-metrics or scvi-tools is needed, and not installed.
    """
    complete: Any = {**DEFAULTS, **settings}
    _require_names(complete, with_reference=reference is not None)
    chosen = {name: complete[name] for name in ("unlabelled", "max_cells", "seed")}
    cells = choose_scored(adata, keys, label, batch, **chosen)
    known = None if reference is None else choose_scored(reference, keys, label, batch, **chosen)
    features, pairs = _all_features(adata, cells, reference, known, complete)
    methods = {}
    for method in tqdm(features, unit="method", desc="scoring", disable=not complete["progress"]):
        scores = methods[method] = MethodScores()
        scorers = _scorers(method, features[method], cells, scores.predictions, complete["seed"])
        if known is not None and method in pairs:
            scorers |= _transfer_scorers(method, pairs[method], known, cells, scores.predictions)
        _score(scores, scorers, _asked(complete, with_reference=known is not None), strict=bool(complete["metrics"]))
    embeddings = {method: features[method] for method in features if method != LOGISTIC}
    shown = ScoredCells(cells.rows, cells.labels, cells.batches, embeddings, cells.left_out)
    asked = {"keys": list(keys), "labels_key": label, "batch_key": batch, **complete}
    return Evaluation(methods, shown, known, asked)


def _require_names(settings: dict[str, Any], *, with_reference: bool) -> None:
    for what, known in (("metrics", METRICS), ("baselines", BASELINES)):
        if unknown := sorted(set(settings[what] or ()) - set(known)):
            raise ValueError(f"no {what.removesuffix('s')} is called {unknown[0]!r}; expected some of {list(known)}")
    if not with_reference and (asked := sorted(set(settings["metrics"] or ()) & set(TRANSFER))):
        raise ValueError(f"{asked[0]!r} needs a reference with labels; give one with --reference")


def _asked(settings: dict[str, Any], *, with_reference: bool) -> Sequence[str]:
    return settings["metrics"] or [name for name in METRICS if with_reference or name not in TRANSFER]


def _all_features(
    adata: "AnnData",
    cells: ScoredCells,
    reference: "AnnData | None",
    known: ScoredCells | None,
    settings: dict[str, Any],
) -> tuple[dict[str, FloatArray], dict[str, Pair]]:
    """Return the features of each method, and for transfer (of the reference, of these cells); not all transfer."""
    features, pairs = dict(cells.embeddings), {}
    if known is not None:
        pairs = {key: (known.embeddings[key], features[key]) for key in features}
    if not settings["baselines"]:
        return features, pairs
    counts, genes = _read_counts(adata, cells, settings["layer"])
    asked, seed = settings["baselines"], settings["seed"]
    features |= baseline_features(counts, cells.batches, asked, seed, progress=settings["progress"])
    if reference is not None and known is not None:
        known_counts, known_genes = _read_counts(reference, known, settings["layer"])
        shared = genes.intersection(known_genes, sort=False)
        if not len(shared):
            raise ValueError(
                f"reference and query share no gene: {list(known_genes[:3])} and {list(genes[:3])}; name genes alike"
            )
        known_counts, counts = known_counts[:, known_genes.get_indexer(shared)], counts[:, genes.get_indexer(shared)]
        pairs |= transfer_features(known_counts, known.batches, counts, settings["baselines"], settings["seed"])
    return features, pairs


def _read_counts(adata: "AnnData", cells: ScoredCells, layer: str | None) -> tuple[csr_matrix, pd.Index]:
    """Return raw counts (cells, genes) and gene ids."""
    source = open_source(adata, layer=layer, primary_only=False)
    return source.read(cells.rows).counts, pd.Index(source.genes["feature_id"])


def _scorers(
    method: str, features: FloatArray, cells: ScoredCells, predictions: dict[str, Predictions], seed: int
) -> Scorers:
    """Return a function for each metric that makes sense for the method; predictions are kept as they are made."""

    def predict(metric: str, classifier: Classifier) -> float:
        predictions[metric] = predict_held_out(features, cells.labels, cells.batches, classifier, seed=seed)
        return predictions[metric].macro_f1

    classify: Scorers = {
        metric: partial(predict, metric, classifier) for metric, classifier in zip(PREDICTION, CLASSIFIERS, strict=True)
    }
    if method == LOGISTIC:
        return {PREDICTION[-1]: classify[PREDICTION[-1]]}
    return integration_scorers(features, cells.labels, cells.batches) | classify


def _transfer_scorers(
    method: str, pair: Pair, known: ScoredCells, cells: ScoredCells, predictions: dict[str, Predictions]
) -> Scorers:
    def predict(metric: str, classifier: Classifier) -> float:
        predictions[metric] = predict_query(pair[0], known.labels, pair[1], cells.labels, classifier)
        return predictions[metric].macro_f1

    transfer: Scorers = {
        metric: partial(predict, metric, classifier) for metric, classifier in zip(TRANSFER, CLASSIFIERS, strict=True)
    }
    return {TRANSFER[-1]: transfer[TRANSFER[-1]]} if method == LOGISTIC else transfer


def _score(scores: MethodScores, scorers: Scorers, asked: Sequence[str], *, strict: bool) -> None:
    """Fill in values and reasons of the metrics asked for, and of the averages they make up."""
    for metric in asked:
        if metric not in scorers:
            scores.reasons[metric] = NOT_APPLICABLE
            continue
        try:
            scores.values[metric] = scorers[metric]()
        except NotComputable as error:
            if strict:
                raise
            scores.reasons[metric] = error.cause
    scores.values = with_averages(scores.values)
    for average, parts in AVERAGES.items():
        if missing := [part for part in parts if part in scores.reasons]:
            inapt = all(scores.reasons[part] == NOT_APPLICABLE for part in missing)
            scores.reasons[average] = NOT_APPLICABLE if inapt else f"needs {' and '.join(missing)}"
