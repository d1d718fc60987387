"""Score a perturbation model on held-out conditions, beside baselines on the same split.

    run folder: split.json, best_model
      → the same cells: training cells and controls for all predictors, test cells and other controls for the truth
      → deltas of model and baselines → metrics of each condition → means, apart for targets that replicate or not

A condition *replicates* if the delta of one half of its cells correlates with that of the other half, with separate
controls, by at least 0.4 (mean of 5 splits). Of the others nothing could be predicted.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from scgpt_hf.cells.block import Float64Array, Int64Array
from scgpt_hf.cells.selection.splits import load_split
from scgpt_hf.cells.source import Address
from scgpt_hf.perturbation.cells import Screen, ScreenColumns, read_screen
from scgpt_hf.perturbation.conditions import parse_condition, require_conditions
from scgpt_hf.perturbation.effects import predict_effect, spread_over_batches
from scgpt_hf.perturbation.evaluation.baselines import BASELINES, Training
from scgpt_hf.perturbation.evaluation.metrics import METRICS, discriminate, mean_scores, pearson, score_delta, top_genes
from scgpt_hf.perturbation.gene_names import match_screen_genes
from scgpt_hf.perturbation.pseudobulk import delta_of, halve, mean_rows, welch_t
from scgpt_hf.perturbation.splits import ConditionSplit
from scgpt_hf.pretrained import load_model
from scgpt_hf.progress_bar import progress_bar
from scgpt_hf.publishing.record import RunRecord
from scgpt_hf.training.run_folder import BEST_MODEL, SPLIT, SUMMARY

MODEL = "model"
TRUTH = "truth"  # measured effect of a condition, among the effects that `Evaluation.deltas` has by method
CEILING = "split-half ceiling"
REPLICATES = 0.4
"""Lowest split-half correlation of a condition with an effect; as in the tables of the shared data sets."""
N_HALVES = 5

Item = tuple[str, str]  # condition and context
Predictor = Callable[[Item], Float64Array | None]


@dataclass(frozen=True, eq=False)
class Evaluation:
    """The scores of all methods on the held-out conditions.

    Attributes:
        methods: names of the methods, the model first, the ceiling last.
        scores: a row for each method and (condition, context): `method`, `condition`, `context`, `category`,
            `replicates`, `cells`, and each metric (NaN where it is not defined).
        deltas: (condition, context) → true delta, and that of each method that has one. Shape (genes,) each.
        split_half: (condition, context) → split-half correlation.
        genes: name of each gene.
        facts: what the evaluation was made of, as JSON.
    """

    methods: list[str]
    scores: list[dict[str, Any]]
    deltas: dict[Item, dict[str, Float64Array]]
    split_half: dict[Item, float]
    genes: list[str]
    facts: dict[str, Any] = field(default_factory=dict)

    def table(self, category: str | None = None, replicates: bool | None = None) -> dict[str, dict[str, Any]]:
        """Return the mean of each metric by method, with the number of conditions that it predicts as `items`.

        Args:
            category: only conditions of this category.
            replicates: only conditions that replicate, or only those that do not.
        """
        rows = [
            row
            for row in self.scores
            if category in (None, row["category"]) and replicates in (None, row["replicates"])
        ]
        tables = {}
        for method in self.methods:
            of_method = [row for row in rows if row["method"] == method]
            if of_method:
                tables[method] = {"items": len(of_method), **mean_scores(of_method)}
        return tables


def evaluate_perturbation(
    data: Address, run: str | Path, *, n_cells: int = 64, seed: int = 0, progress: bool = True
) -> Evaluation:
    """Score the model of a run on the conditions that its split holds out, and baselines on the same split.

    Args:
        data: the screen that the run was trained on.
        run: folder of a run of `finetune_perturbation`.
        n_cells: control cells for each prediction of the model.
        seed: seed of the halves of the ceiling, and of the choice of control cells.
        progress: show a progress bar.

    Raises:
        OSError: there is no such run.
        ValueError: the run holds nothing out, or the data are not those of the run.

    Example:
        >>> evaluation = evaluate_perturbation("screen.h5ad", "runs/crispr")  # doctest: +SKIP
        >>> evaluation.table(replicates=True)["model"]["pearson_delta"]  # doctest: +SKIP
    """
    run = Path(run)
    summary = RunRecord.read(run / SUMMARY).content
    saved = load_split(run / SPLIT)
    split = ConditionSplit.from_json(saved.source["conditions"])
    if not split.test:
        raise ValueError(f"{run} holds no condition out (split {split.kind!r}); train with --split simulation")
    columns = ScreenColumns(**summary["columns"])
    screen = read_screen(
        data,
        columns,
        layer=saved.source.get("layer"),
        round_counts=saved.source.get("round_counts", False),
        target_sum=summary["target_sum"],
    )
    if screen.source.describe()["gene_hash"] != saved.source["gene_hash"]:
        raise ValueError(f"the genes of the data are not those that {run} was trained on; pass the same file")
    require_conditions(
        [parse_condition(name) for name in split.tested], {parse_condition(n) for n, _ in screen.items}, "the data"
    )
    rows = {part: _rows(screen, ids) for part, ids in saved.parts.items()}
    model, processor = load_model(run / BEST_MODEL, model_class=_model_class())
    genes = match_screen_genes(screen.genes, processor)
    seen, unseen = (rows[part][screen.conditions[rows[part]] == "ctrl"] for part in ("train", "test"))

    def predict(item: Item) -> Float64Array:
        of_context = seen[screen.contexts[seen] == item[1]]
        chosen = spread_over_batches(of_context, screen.batches, n_cells, seed)
        targets = genes.target_ids(parse_condition(item[0]))
        return predict_effect(model, processor, screen.values, genes, chosen, targets)

    facts = {
        "run": run.resolve().name,
        "data": screen.source.describe(),
        "split": split.to_json(),
        "control_cells": {"predictors": len(seen), "truth": len(unseen)},
        "n_cells": n_cells,
        "seed": seed,
        "versions": {name: version(name) for name in ("scgpt_hf", "torch", "numpy")},
    }
    return score_predictors(screen, split, {MODEL: predict}, (seen, unseen), seed=seed, progress=progress, facts=facts)


def score_predictors(
    screen: Screen,
    split: ConditionSplit,
    models: Mapping[str, Predictor],
    controls: tuple[Int64Array, Int64Array],
    *,
    seed: int = 0,
    progress: bool = True,
    facts: dict[str, Any] | None = None,
) -> Evaluation:
    """Score predictors on the held-out conditions of a split, and the baselines beside them.

    Args:
        screen: the screen.
        split: its conditions.
        models: name → function from (condition, context) to a delta, or None where it does not apply.
        controls: the control cells that predictors may use, and those for the truth.
        seed: seed of the halves of the ceiling.
        progress: show a progress bar.
        facts: what to record.
    """
    seen, unseen = controls
    tested = [item for item in screen.items if item[0] in set(split.tested)]
    category_of = {name: category for category, names in split.test.items() for name in names}
    true = {item: delta_of(screen.values, screen.batches, screen.rows_of(item), unseen) for item in tested}
    training = {context: _training_of(screen, split, context, seen) for context in sorted({one for _, one in tested})}
    halves = {item: _halves(screen, item, seen, unseen, seed) for item in tested}
    split_half = {item: float(np.mean([pearson(*pair) for pair in pairs])) for item, pairs in halves.items()}
    deltas: dict[Item, dict[str, Float64Array]] = {}
    scores: list[dict[str, Any]] = []
    for item in progress_bar(tested, description="scoring", unit="conditions", show=progress):
        rows = screen.rows_of(item)
        of_context = unseen[screen.contexts[unseen] == item[1]]
        top = top_genes(welch_t(screen.values, rows, of_context))
        found: dict[str, Float64Array | None] = {name: predict(item) for name, predict in models.items()}
        condition = parse_condition(item[0])
        found |= {name: baseline(training[item[1]], condition) for name, baseline in BASELINES.items()}
        deltas[item] = {TRUTH: true[item], **{name: one for name, one in found.items() if one is not None}}
        facts_of_item = {
            **{"condition": item[0], "context": item[1], "category": category_of[item[0]]},
            **{"replicates": split_half[item] >= REPLICATES, "cells": len(rows)},
        }
        others = {name: delta for (name, context), delta in true.items() if context == item[1]}
        for name, delta in found.items():
            if delta is not None:
                values = score_delta(delta, true[item], top)
                values["discrimination"] = discriminate(delta, others, item[0])
                scores.append({"method": name, **facts_of_item, **values})
        ceiling = [score_delta(*pair, top) for pair in halves[item]]
        scores.append({"method": CEILING, **facts_of_item, **_means(ceiling)})
    names = screen.genes["feature_name"].astype(str).tolist()
    return Evaluation([*models, *BASELINES, CEILING], scores, deltas, split_half, names, facts or {})


def _training_of(screen: Screen, split: ConditionSplit, context: str, seen: Int64Array) -> Training:
    """Return the knowledge of baselines on a context: training and validation conditions, and the control cells."""
    known = {*split.train, *split.validation}
    items = [item for item in screen.items if item[0] in known and item[1] == context]
    if not items:  # this context has no training condition, so those of all contexts stand for it
        items = [item for item in screen.items if item[0] in known]
    deltas = {
        parse_condition(item[0]): delta_of(screen.values, screen.batches, screen.rows_of(item), seen) for item in items
    }
    of_context = seen[screen.contexts[seen] == context]
    base = mean_rows(screen.values, of_context)
    profiles = np.stack([base, *(base + delta for delta in deltas.values())])
    names = screen.genes["feature_name"].astype(str)
    return Training(deltas, profiles, {name: column for column, name in enumerate(names)})


def _halves(
    screen: Screen, item: Item, seen: Int64Array, unseen: Int64Array, seed: int
) -> list[tuple[Float64Array, Float64Array]]:
    """Return the deltas of two halves of a condition, each against its own controls, for several random halves."""
    pairs = []
    for number in range(N_HALVES):
        one, other = halve(screen.rows_of(item), screen.batches, seed + number)
        pairs.append(
            (delta_of(screen.values, screen.batches, one, seen), delta_of(screen.values, screen.batches, other, unseen))
        )
    return pairs


def _means(scores: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric over random halves; NaN where it is not defined, as for discrimination."""
    means = mean_scores(scores)
    return {name: float("nan") if means[name] is None else float(means[name] or 0.0) for name in METRICS}


def _rows(screen: Screen, cell_ids: Int64Array) -> Int64Array:
    """Return the rows of some cells by their ids in the source."""
    rows: Int64Array = np.flatnonzero(np.isin(screen.cell_ids, cell_ids)).astype(np.int64)
    if len(rows) < len(cell_ids):
        raise ValueError(
            f"{len(cell_ids) - len(rows):,} cells of the run are not in the data; pass the file that it was trained on"
        )
    return rows


def _model_class() -> Any:
    from transformers import AutoModelForTokenClassification

    return AutoModelForTokenClassification
