"""Tests of the facts that cards, reports and the end of a run's log share."""

import json
from pathlib import Path
from typing import Any

import pytest

from scgpt_hf.publishing.record import UNKNOWN, RunRecord
from scgpt_hf.publishing.run_summary import (
    best_validation,
    error_rows,
    finetuning_data,
    finetuning_recipe,
    label_rows,
    pretraining_recipe,
    read_summary,
    score_rows,
)

BEST = {"eval_gep_mse": 90.0, "eval_gepc_mse": 95.0}
BASELINES = {"constant_mse": 200.0, "gene_mean_mse": 120.0, "tie_floor_mse": 40.0}
EMPTY = RunRecord({}, "settings.yaml")


def record(**content: Any) -> RunRecord:
    return RunRecord(content, "summary.json")


def test_error_rows_hold_model_and_baselines_from_either_place() -> None:
    expected = [200.0, 120.0, 90.0, 95.0, 40.0]
    assert [row.value for row in error_rows(record(best=BEST, baselines=BASELINES))] == expected
    in_best = BEST | {f"eval_{name}": value for name, value in BASELINES.items()}
    assert [row.value for row in error_rows(record(best=in_best))] == expected


def test_error_rows_of_an_empty_summary_have_names_and_meanings_but_no_values() -> None:
    rows = error_rows(record())
    assert len({row.name for row in rows}) == len({row.meaning for row in rows}) == 4
    assert all(row.value is None for row in rows)


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0, "no warm-up"), (0.05, "warm-up over 5% of the steps"), (1200, "warm-up over 1,200 steps"), (None, UNKNOWN)],
)
def test_warm_up_is_stated_as_none_share_or_steps(warmup: float | None, expected: str) -> None:
    assert expected in finetuning_recipe(record(recipe={"warmup": warmup}), EMPTY)["Learning rate"]


@pytest.mark.parametrize(("seconds", "expected"), [(61.2, "61 s,"), (7200.0, "2.0 h,"), (None, UNKNOWN)])
def test_time_is_stated_in_seconds_or_hours(seconds: float | None, expected: str) -> None:
    recipe = pretraining_recipe(record(train_seconds=seconds, processes=1), EMPTY, EMPTY)
    assert recipe["Time"].startswith(expected)


def test_objectives_without_weight_are_left_out() -> None:
    config = RunRecord({"loss_weights": {"gep": 1.0, "dar": 0}}, "config.json")
    assert (
        pretraining_recipe(record(), EMPTY, config)["Objectives (weights)"] == "gene expression prediction, GEP (1.0)"
    )


def test_label_rows_hold_recall_and_precision() -> None:
    labels = {"B": {"train": 5, "validation": 4}, "T": {"train": 9, "validation": 6}, "rare": {"train": 2}}
    counts = [[1, 3, 0], [0, 6, 0], [0, 0, 0]]
    rows = label_rows(record(labels=labels, confusion={"counts": counts}))
    assert rows == [("B", 5, 4, "25%", "100%"), ("T", 9, 6, "100%", "67%"), ("rare", 2, 0, "–", "–")]


def test_cells_held_out_one_by_one_are_stated_as_such() -> None:
    rows = finetuning_data(record(task="annotate", held_out="cells", left_out={"rare label": 2, "unlabelled": 0}))
    assert rows["Split by (each value is in one part only)"].startswith("nothing")
    assert rows["Left out"] == "rare label: 2"


def test_summary_of_a_finished_run_is_not_replaced_by_split_or_metrics(tmp_path: Path) -> None:
    split = {"parts": {"train": {"n_cells": 1, "donors": ["a"]}}, "source": {"organism": "mus_musculus"}}
    (tmp_path / "split.json").write_text(json.dumps(split))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "epoch": 1.0, "eval_loss": 0.1}\n')
    (tmp_path / "summary.json").write_text(json.dumps({"train_cells": 2, "best": {"step": 9}}))
    content = read_summary(tmp_path).content
    assert (content["train_cells"], content["train_donors"]) == (2, 1)
    assert content["best"] == {"step": 9}
    assert content["data"] == {"organism": "mus_musculus"}


def test_the_best_validation_is_that_of_the_metric_of_the_run(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "epoch": 1, "eval_loss": 3.0, "eval_nmi": 0.6},
        {"step": 1, "epoch": 1, "loss": 1.0},
        {"step": 2, "epoch": 2, "eval_loss": 2.0, "eval_nmi": 0.5},
        {"step": 3, "epoch": 3, "eval_loss": 2.5},
    ]
    assert best_validation(lines)["step"] == best_validation(lines, "eval_loss")["step"] == 2
    assert best_validation(lines, "nmi")["step"] == 1
    assert best_validation([]) == {}
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "settings.yaml").write_text("training: {metric_for_best_model: eval_nmi}")
    assert read_summary(tmp_path).get("best.step", int) == 1


def test_scores_of_the_embedding_stand_beside_those_of_the_baselines() -> None:
    best = {"eval_knn_macro_f1": 0.9, "eval_nmi": 0.8, "eval_pca_knn_macro_f1": 0.7}
    scored = {"count-decoder MLP": {"knn_macro_f1": 0.6, "ilisi": 0.1}}
    rows = score_rows(record(best=best, baseline_scores=scored))
    assert [tuple(row) for row in rows] == [
        ("this model", [0.9, 0.8, None, None]),
        ("PCA, training cells", [0.7, None, None, None]),
        ("count-decoder MLP", [0.6, None, None, 0.1]),
    ]
    assert score_rows(record(best=BEST)) == []
