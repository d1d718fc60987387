"""Tests of the model card of a perturbation model."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from scgpt_hf.publishing.perturbation_card import perturbation_card

SUMMARY: dict[str, Any] = {
    "task": "perturb",
    "model": None,
    "train_cells": 900,
    "validation_cells": 100,
    "test_cells": 200,
    "genes": 299,
    "conditions": {
        "train": ["JAK2+ctrl", "STAT2+ctrl"],
        "validation": ["IRF1+ctrl"],
        "test": {"unseen_single": ["STAT1+ctrl"]},
    },
    "best": {"eval_loss": 0.61, "eval_pearson_delta": 0.72},
    "data": {"kind": "h5ad", "paths": ["screen.h5ad"], "census_version": None, "organism": None, "gene_hash": "abc"},
    "versions": {"scgpt_hf": "0.1.0"},
    "steps": 12,
    "epochs": 3.0,
    "seconds": 5.0,
    "device": "x86_64 CPU, 1 thread",
    "processes": 1,
    "precision": "fp32",
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "crispr"
    folder.mkdir()
    (folder / "settings.yaml").write_text(yaml.safe_dump({"learning_rate": 0.01, "batch_size": 16}))
    return folder


def card(run: Path, **changes: Any) -> str:
    (run / "summary.json").write_text(json.dumps(SUMMARY | changes))
    return str(perturbation_card(run, "org/crispr"))


def test_the_card_states_conditions_results_and_how_to_load(run: Path) -> None:
    text = card(run)
    for part in (
        "# crispr",
        'Perturbation.from_pretrained("org/crispr")',
        "Training: JAK2+ctrl, STAT2+ctrl",
        "Held out, unseen_single: STAT1+ctrl",
        "squared error of the effects 0.61 (no change: 1), correlation 0.72",
        "perturbation",
    ):
        assert part in text, part


def test_the_card_of_a_run_without_validation_says_so(run: Path) -> None:
    assert "none was used for validation" in card(run, best=None)


def test_the_card_names_a_base_model_of_the_hub_but_no_folder(run: Path) -> None:
    assert "base_model: org/blood" in card(run, model="org/blood")
    assert "base_model" not in card(run, model=str(run))
    assert "base_model" not in card(run)
