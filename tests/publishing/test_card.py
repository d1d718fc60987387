"""Tests of the model card of a pretraining run."""

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from scgpt_hf.publishing.card import model_card, name_checkpoint
from scgpt_hf.publishing.record import UNKNOWN

BEST = {
    "step": 900,
    "eval_loss": 200.0,
    "eval_gep_mse": 95.5,
    "eval_gepc_mse": 101.25,
    "eval_variance_explained": 0.541,
}
SUMMARY = {
    "model_parameters": 51_300_000,
    "train_cells": 291_000,
    "validation_cells": 9_000,
    "train_donors": 60,
    "validation_donors": 2,
    "genes": 1200,
    "steps": 9094,
    "epochs": 1.0,
    "global_batch_size": 32,
    "train_seconds": 7200.0,
    "device": "NVIDIA H100",
    "processes": 2,
    "precision": "bf16",
    "cells_per_second": 4100.5,
    "versions": {"scgpt_hf": "0.1.0", "torch": "2.13"},
    "recipe": {
        "optimizer": "adamw_torch_fused",
        "weight_decay": 0.0,
        "clipped_at": 1.0,
        "warmup": 0.05,
        "schedule": "linear",
        "seed": 42,
    },
    "baselines": {"constant_mse": 208.0, "gene_mean_mse": 120.0, "tie_floor_mse": 40.0},
    "best": BEST,
    "data": {
        "kind": "census",
        "uri": "census://2025-11-08/homo_sapiens",
        "census_version": "2025-11-08",
        "organism": "homo_sapiens",
        "obs_filter": "tissue_general == 'blood' || x == '|'",
        "gene_hash": "abc123",
    },
    "composition": {
        "tissue_general": {"blood": 300_000},
        "assay": {"10x 3' v2": 100_000, "10x 3' v3": 200_000},
        "disease": {"normal": 300_000},
        "dataset_id": {f"study {number}": 10_000 - number for number in range(33)},
    },
}
SETTINGS = {
    "data": {
        "donor_key": "donor_id",
        "gene_selection": "hvg",
        "input_style": "binned",
        "n_bins": 51,
        "max_tokens": 1201,
        "mask_ratios": [0.25, 0.5, 0.75],
        "cls_value": -2.0,
    },
    "model": {
        "num_hidden_layers": 12,
        "hidden_size": 512,
        "num_attention_heads": 8,
        "dropout": 0.2,
        "loss_weights": None,
    },
    "training": {"learning_rate": 1e-4, "hub_token": "hf_secret"},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return the folder of a run that recorded everything."""
    folder = tmp_path / "blood"
    (folder / "best_model").mkdir(parents=True)
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "settings.yaml").write_text(yaml.safe_dump(SETTINGS))
    (folder / "best_model" / "processor_config.json").write_text('{"cls_value": 0.0}')
    (folder / "best_model" / "config.json").write_text('{"loss_weights": {"gep": 1.0, "gepc": 0.5}}')
    (folder / "loss.png").write_bytes(b"")
    return folder


def change(run: Path, **changes: Any) -> None:
    """Change values in summary.json."""
    (run / "summary.json").write_text(json.dumps(SUMMARY | changes))


def test_card_states_data_training_and_results_with_baselines(run: Path) -> None:
    """This test owns the text of the card; the others check its structure."""
    text = model_card(run).text
    assert UNKNOWN not in text
    assert "in progress" not in text
    assert "upervis" not in text
    for row in (
        "| Source | CELLxGENE Census |",
        "| Organism | Homo sapiens |",
        "| Census version | 2025-11-08 |",
        "| Filter | `tissue_general == 'blood' \\|\\| x == '\\|'` |",
        "| Training cells | 291,000, of 60 donors |",
        "| Validation cells | 9,000, of 2 donors |",
        "| Tissues | blood (300,000) |",
        "| Assays | 10x 3' v3 (200,000), 10x 3' v2 (100,000) |",
        "| Diseases | normal (300,000) |",
        "| Split by (each value is in one part only) | `donor_id` |",
        "| Data sets | study 0 (10,000), study 1 (9,999), ",
        "study 29 (9,971), and 3 more |",
        "| Gene hash of the source | abc123 |",
        "| License of the data | CC BY 4.0, as for all of the Census |",
        "| License of this repository | weights: CC BY 4.0, like the training data; code: Apache-2.0 |",
        "| Model | 12 layers, hidden size 512, 8 attention heads, 51,300,000 parameters |",
        "| Objectives (weights) | gene expression prediction, GEP (1.0); GEP from the cell embedding, GEPC (0.5) |",
        "| Input values | binned, 51 bins per cell; at most 1,201 tokens per cell |",
        "| Masked share of a cell's genes | 0.25, 0.5, 0.75 |",
        "| Steps | 9,094, each of 32 cells; 1 epochs |",
        "| Dropout | 0.2 |",
        "| Learning rate | at most 0.0001; warm-up over 5% of the steps; schedule: linear |",
        "| Optimizer | adamw_torch_fused, weight decay 0, gradient norm clipped at 1 |",
        "| Seed | 42 |",
        "| Hardware | 2 x NVIDIA H100 |",
        "| Time | 2.0 h, including validation and checkpoints |",
        "| Speed | 4,100 cells/s, without validation and checkpoints |",
        "| Device-hours (to estimate energy) | 4 |",
        "| model, from the visible genes (GEP) | 95.50 | gene expression prediction: masked genes, ",
        "| model, from the cell embedding (GEPC) | 101.25 |",
        "| each gene's mean over training cells | 120.00 |",
        "| one constant | 208.00 |",
        "| lowest possible error (tie floor) | 40.00 |",
        "constant): 54.1%.",
        "gives the `<cls>` token the expression value 0;",
        "![loss.png](loss.png)",
        "transformers 5.6 or newer",
        "10.1038/s41592-024-02201-0",
        "10.1093/nar/gkae1142",
        "scgpt_hf, version 0.1.0",
    ):
        assert row in text
    assert "umap.png" not in text


def test_card_shows_the_scores_of_cell_types_beside_baselines_if_they_were_watched(run: Path) -> None:
    assert "Cell types" not in model_card(run).text
    scores = {"eval_knn_macro_f1": 0.9, "eval_nmi": 0.8, "eval_asw_label": 0.6, "eval_pca_knn_macro_f1": 0.85}
    change(run, best=BEST | scores, baseline_scores={"untrained model": {"knn_macro_f1": 0.4}})
    card = model_card(run)
    for row in (
        "| embedding | kNN macro-F1 | NMI | ASW label | iLISI |\n| --- | --- | --- | --- | --- |",
        "| this model | 0.900 | 0.800 | 0.600 | – |",
        "| PCA, training cells | 0.850 | – | – | – |",
        "| untrained model | 0.400 | – | – | – |",
    ):
        assert row in card.text
    assert "kNN macro-F1 of the cell types" in {result.metric_name for result in card.data.eval_results}


def test_metadata_holds_license_tags_and_results(run: Path) -> None:
    card = ModelCard(str(model_card(run, "org/blood-300k")))
    data = card.data.to_dict()
    assert (data["library_name"], data["license"]) == ("transformers", "cc-by-4.0")
    assert "datasets" not in data  # the Census is not a data set of the Hub
    assert "single-cell" in data["tags"]
    assert card.data.model_name == "blood-300k"
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert list(results.values()) == [95.5, 101.25, 0.541]
    assert {result.dataset_revision for result in card.data.eval_results} == {"2025-11-08"}


def test_code_of_the_card_loads_the_checkpoint_it_belongs_to(run: Path) -> None:
    local, published = model_card(run), model_card(run, "org/blood")
    assert str(local).count('from_pretrained("best_model"') == str(published).count('from_pretrained("org/blood"') == 4
    assert name_checkpoint(str(published), "org/blood") == str(published)
    assert published.text.count("```python") == 2
    for code in published.text.split("```python")[1:]:
        lines = code.split("```")[0].strip().splitlines()
        compile("\n".join(lines), "card", "exec")
        assert len(lines) == 5


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"objective": "generative"}, ["## Generate cells", "generate_cells(model", "`queries`"]),
        (
            {"modalities": ["RNA", "protein", "<pad>", "<cls>"]},
            ["## Modalities", "the modalities RNA, protein.", "predict_expression(rna, model"],
        ),
    ],
    ids=["generative", "modalities"],
)
def test_card_shows_what_only_such_a_model_can_do(run: Path, config: dict[str, Any], words: list[str]) -> None:
    plain = model_card(run, "org/blood").text
    (run / "best_model" / "config.json").write_text(json.dumps({"loss_weights": {"gep": 1.0}, **config}))
    card = model_card(run, "org/blood").text
    for word in words:
        assert word in card
        assert word not in plain
    code = card.split(words[0])[1].split("```python")[1].split("```")[0]
    compile(code, "card", "exec")
    assert code.count('from_pretrained("org/blood")') == 2


def test_cells_from_outside_the_census_have_the_license_of_their_sources(run: Path, tmp_path: Path) -> None:
    paths = [str(tmp_path / "one.h5ad"), str(tmp_path / "two.h5ad")]
    change(run, data={"kind": "h5ad", "paths": paths, "census_version": None})
    card = model_card(run)
    assert "| Source | one.h5ad, two.h5ad |" in card.text
    assert "| License of the data | see the sources |" in card.text
    assert (card.data.license, card.data.license_name) == ("other", "see-the-sources")
    assert "CELLxGENE" not in card.text


def test_card_of_the_demo_says_that_its_donors_are_wells(run: Path) -> None:
    (run / "settings.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": SETTINGS["data"] | {"data": ["demo"]}}))
    change(run, data={"kind": "census", "uri": "demo_census", "census_version": None})
    assert "| Source | demo: 700 blood cells of one donor that come with scanpy; its eight" in model_card(run).text


def test_card_states_what_was_trained_before_the_first_step(run: Path) -> None:
    assert "Before these steps" not in model_card(run).text
    training = SETTINGS["training"] | {"shortcut_steps": 3000}
    (run / "settings.yaml").write_text(yaml.safe_dump(SETTINGS | {"training": training}))
    row = "| Before these steps | shortcut and count decoder alone, 3,000 steps; not included in the time |"
    assert row in model_card(run).text


def test_cache_from_the_hub_is_listed_as_a_dataset(run: Path) -> None:
    data = {"data": ["hf://datasets/org/blood@v1"]}
    (run / "settings.yaml").write_text(yaml.safe_dump(SETTINGS | {"data": SETTINGS["data"] | data}))
    change(run, data={"kind": "cache", "uri": "/home/me/cache", "census_version": None, "organism": "mus_musculus"})
    card = model_card(run)
    assert "| Source | hf://datasets/org/blood@v1 |" in card.text
    assert "| Organism | Mus musculus |" in card.text
    assert card.data.datasets == ["org/blood"]


def test_card_holds_no_path_host_name_or_token(run: Path, tmp_path: Path) -> None:
    settings = {
        "data": {"data": [str(tmp_path)], "donor_key": str(tmp_path / "x")},
        "training": {"hub_token": "hf_secret"},
    }
    (run / "settings.yaml").write_text(yaml.safe_dump(settings))
    change(run, data={"kind": "census", "uri": f"file://{tmp_path}/soma", "census_version": None})
    text = str(model_card(run))
    for secret in (str(tmp_path), str(Path.home()) + "/", platform.node(), "hf_secret", "file://"):
        assert secret not in text


def test_missing_values_read_not_recorded(tmp_path: Path) -> None:
    text = model_card(tmp_path).text
    assert f"| Training cells | {UNKNOWN}, of {UNKNOWN} donors |" in text
    assert f"| one constant | {UNKNOWN} |" in text
    assert f"`<cls>` token the expression value {UNKNOWN};" in text


def test_card_of_a_run_in_progress_uses_split_and_metrics_and_has_no_gaps(run: Path) -> None:
    (run / "summary.json").unlink()
    parts = {"train": {"donors": ["a", "b"], "n_cells": 4000}, "validation": {"donors": ["c"], "n_cells": 50}}
    source = {**SUMMARY["data"], "genes": ["ENSG1", "ENSG2"], "composition": SUMMARY["composition"]}
    (run / "split.json").write_text(json.dumps({"source": source, "parts": parts}))
    lines = [
        {"step": 1, "epoch": 0.1, "loss": 9.0},
        {"step": 2, "epoch": 0.2, "eval_loss": 3.0, "eval_gep_mse": 30.0},
        {"step": 3, "epoch": 0.3, "eval_loss": 4.0},
    ]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = model_card(run).text
    assert "**Training is in progress.**" in text
    assert UNKNOWN not in text
    assert "| Training cells | 4,000, of 2 donors |" in text
    assert "| Genes | 2, " in text
    assert "| Tissues | blood (300,000) |" in text
    assert "| Dropout | 0.2 |" in text
    assert "| Hardware |" not in text
    assert "- this software: scgpt_hf\n" in text
    assert "at step 2:" in text
    assert "(GEP) | 30.00 |" in text
    assert "| Census version | 2025-11-08 |" in text


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"train_seconds": "long"}, "train_seconds"),
        ({"best": {"eval_gep_mse": "x"}}, "best.eval_gep_mse"),
        ({"data": [1]}, "data"),
        ({"composition": {"assay": {"10x": "many"}}}, "composition.assay"),
    ],
)
def test_malformed_value_raises_with_file_and_key(run: Path, changes: dict[str, Any], expected: str) -> None:
    change(run, **changes)
    with pytest.raises(ValueError, match=rf"summary\.json: .*'{expected}'"):
        model_card(run)


@pytest.mark.parametrize("line", ["{", "[1]", '{"step": 2, "epoch": 1.0, "eval_loss": "low"}'])
def test_malformed_line_of_the_metrics_raises(run: Path, line: str) -> None:
    change(run, best=None)
    (run / "metrics.jsonl").write_text('{"step": 1, "epoch": 0.5, "eval_loss": 1.0}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"(line 2 of .*metrics\.jsonl|metrics\.jsonl, step 2)"):
        model_card(run)


def test_a_last_line_of_the_metrics_that_a_crash_cut_off_is_left_out(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    metrics.write_text('{"step": 1, "epoch": 0.5, "eval_loss": 1.0}\n')
    complete = str(model_card(run))
    metrics.write_text(metrics.read_text() + '{"step": 99, "eval_l')
    assert str(model_card(run)) == complete
