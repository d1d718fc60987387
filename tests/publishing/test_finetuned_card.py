"""Tests of the model card of a fine-tuned model."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from scgpt_hf.publishing.finetuned_card import finetuned_card

DATA = {"kind": "h5ad", "paths": ["blood.h5ad"], "census_version": None, "organism": None, "gene_hash": "abc123"}
COMMON = {
    "model": "org/blood",
    "train_cells": 30,
    "validation_cells": 10,
    "epochs": 2.0,
    "steps": 8,
    "seconds": 61.2,
    "data": DATA,
    "versions": {"scgpt_hf": "0.1.0"},
    "composition": {"tissue_general": {"blood": 40}, "assay": {"10x 3' v2": 25, "10x 5' v1": 15}, "disease": {}},
    "recipe": {
        "optimizer": "adamw",
        "weight_decay": 0.01,
        "clipped_at": 1.0,
        "warmup": 12,
        "schedule": "linear",
        "seed": 0,
    },
    "device": "x86_64 CPU, 2 threads",
    "processes": 1,
    "genes": 1200,
    "precision": "fp32",
}
CLASSIFIER = COMMON | {
    "task": "annotate",
    "labels_key": "cell_type",
    "train": "full",
    "kept": "full",
    "probe": {"macro_f1": 0.625, "accuracy": 0.65, "cells": 30, "contradicted": {}, "C": 0.1},
    "gene_baseline": {"macro_f1": 0.5, "accuracy": 0.55},
    "held_out": "donor_id",
    "train_donors": 3,
    "validation_donors": 1,
    "trained_parameters": 1234,
    "labels": {"B | plasma": {"train": 10, "validation": 4}, "T": {"train": 20, "validation": 6}},
    "left_out": {"unlabelled": 0, "rare label": 2},
    "validation": {"macro_f1": 0.75, "accuracy": 0.7},
    "majority_baseline": {"label": "T", "macro_f1": 0.375, "accuracy": 0.6},
    "calibration_error": {"after": 0.05},
    "confusion": {"labels": ["B | plasma", "T"], "counts": [[1, 3], [0, 6]]},
}
INTEGRATION = COMMON | {
    "task": "integrate",
    "batch_key": "assay",
    "domains": {"10x 3' v2": {"train": 20, "validation": 5}, "10x 5' v1": {"train": 10, "validation": 5}},
    "best": {"eval_gep_mse": 90.0, "eval_gepc_mse": 95.0, "eval_gene_mean_mse": 120.0, "eval_constant_mse": 200.0},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run that trained a classifier."""
    (tmp_path / "settings.yaml").write_text("model: org/blood\nbatch_size: 32\nlearning_rate: 0.001\ndar_weight: 1.0\n")
    return change(tmp_path, CLASSIFIER)


def change(run: Path, summary: dict[str, Any], **changes: Any) -> Path:
    """Write summary.json with changes, and return the run."""
    (run / "summary.json").write_text(json.dumps(summary | changes))
    return run


def test_card_of_a_classifier_states_scores_per_label_and_of_the_baseline(run: Path) -> None:
    """This test owns the text of the card of a classifier."""
    text = finetuned_card(run).text
    for row in (
        "| Source | blood.h5ad |",
        "| Training cells | 30, of 3 donors |",
        "| Held-out cells | 10, of 1 donor |",
        "| Split by (each value is in one part only) | `donor_id` |",
        "| Left out | rare label: 2 |",
        "| License of the data | see the sources |",
        "| Pretrained model | `org/blood` |",
        "| Classifier | fine-tuned, all weights; 1,234 trained parameters |",
        "| Steps | 8, each of 32 cells; 2 epochs |",
        "| Genes | 1,200, those of the pretrained model |",
        "| Tissues | blood (40) |",
        "| Assays | 10x 3' v2 (25), 10x 5' v1 (15) |",
        "| Diseases | not recorded |",
        "| Learning rate | at most 0.001; warm-up over 12 steps; schedule: linear |",
        "| Optimizer | adamw, weight decay 0.01, gradient norm clipped at 1 |",
        "| Hardware | 1 x x86_64 CPU, 2 threads |",
        "| Precision | fp32 |",
        "| Time | 61 s, including validation |",
        "| Device-hours (to estimate energy) | 0.017 |",
        "| this model: fine-tuned, all weights | 0.750 | 0.700 |",
        "| logistic regression on the frozen cell embedding | 0.625 | 0.650 |",
        "| logistic regression on variable genes | 0.500 | 0.550 |",
        "also used to choose the epoch",
        "| always T | 0.375 | 0.600 |",
        "| B \\| plasma | 10 | 4 | 25% | 100% |",
        "| T | 20 | 6 | 100% | 67% |",
        "Expected calibration error (mean gap between confidence and accuracy): 0.050.",
    ):
        assert row in text


def test_card_of_a_kept_probe_states_how_it_was_fitted(run: Path) -> None:
    refit = {"cells": 38, "contradicted": {"B | plasma": 1, "T": 1}, "C": 0.01}
    changes = {"kept": "probe", "fine_tuned": {"macro_f1": 0.7, "accuracy": 0.6}, "refit": refit}
    text = finetuned_card(change(run, CLASSIFIER, **changes)).text
    for row in (
        "| Classifier | logistic regression on the frozen cell embedding |",
        "| Regularization | C = 0.01 |",
        "| Fitted to | 38 training and held-out cells |",
        "| Left out, as most similar to cells of other labels | B \\| plasma: 1, T: 1 |",
        "| Not kept | fine-tuned, all weights: macro-F1 did not rise by more than its standard error |",
        "| this model: logistic regression on the frozen cell embedding | 0.750 | 0.700 |",
        "| not kept: fine-tuned, all weights | 0.700 | 0.600 |",
        "was fitted and calibrated without the held-out cells",
    ):
        assert row in text
    assert "Learning rate" not in text
    alone = finetuned_card(change(run, CLASSIFIER, train="probe", kept="probe")).text
    assert "| Fitted to | 30 training cells |" in alone
    assert "| Regularization | C = 0.1 |" in alone
    assert "Not kept" not in alone
    assert "Left out, as" not in alone


def test_card_of_an_integration_states_batches_and_errors(run: Path) -> None:
    """This test owns the text of the card of an integration."""
    text = finetuned_card(change(run, INTEGRATION)).text
    for row in (
        "| Batches, with their cells | 10x 3' v2 (25), 10x 5' v1 (15) |",
        "| Objectives (weights) | domain adaptation, DAR (1.0) |",
        "| model, from the visible genes (GEP) | 90.00 |",
        "| each gene's mean over training cells | 120.00 |",
        'obs["assay"]',
    ):
        assert row in text


@pytest.mark.parametrize("summary", [CLASSIFIER, INTEGRATION])
def test_intended_use_comes_before_limits_and_citations(run: Path, summary: dict[str, Any]) -> None:
    text = finetuned_card(change(run, summary)).text
    assert 0 < text.index("## Intended use") < text.index("## Limits") < text.index("## How to cite")


@pytest.mark.parametrize(("summary", "values"), [(CLASSIFIER, [0.75, 0.7]), (INTEGRATION, [90.0, 95.0])])
def test_metadata_and_code_name_the_base_model_and_the_repository(
    run: Path, summary: dict[str, Any], values: list[float]
) -> None:
    card = ModelCard(str(finetuned_card(change(run, summary), "org/tuned")))
    assert (card.data.base_model, card.data.license, card.data.model_name) == ("org/blood", "other", "tuned")
    assert [result.metric_value for result in card.data.eval_results] == values
    assert card.text.count('from_pretrained("org/tuned"') in {2, 4}
    for code in card.text.split("```python")[1:]:
        lines = code.split("```")[0].strip().splitlines()
        compile("\n".join(lines), "card", "exec")
        assert len(lines) == 5


def test_cells_of_the_census_have_its_license_and_citation(run: Path) -> None:
    data = {"census_version": "2025-11-08", "organism": "homo_sapiens"}
    card = finetuned_card(change(run, CLASSIFIER, data=data, model="best_model", held_out="cells"))
    assert (card.data.license, card.data.base_model) == ("cc-by-4.0", None)
    for words in ("| Source | CELLxGENE Census |", "nothing: cells of one donor", "10.1093/nar/gkae1142"):
        assert words in card.text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"task": "dream"}, "task"),
        ({"confusion": {"counts": [[1]]}}, "confusion.counts"),
        ({"validation": {"macro_f1": "good"}}, "validation.macro_f1"),
    ],
)
def test_malformed_summary_raises_with_file_and_key(run: Path, changes: dict[str, Any], expected: str) -> None:
    with pytest.raises(ValueError, match=rf"summary\.json: .*'{expected}'"):
        finetuned_card(change(run, CLASSIFIER, **changes))
