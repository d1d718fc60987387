"""A class head on labelled cells: it learns, it is saved like any other model, and it rejects unusable cells."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoProcessor

from scgpt_hf import (
    AnnotateSettings,
    ScGPTConfig,
    ScGPTForPreTraining,
    ScGPTForSequenceClassification,
    ScGPTProcessor,
    finetune_classifier,
    predict_cell_types,
)
from scgpt_hf.pretrained import load_pretrained
from scgpt_hf.training.finetuning.classifier import agreement, weighted_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
QUIET = {"use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def cells(small_cells: list[AnnData]) -> AnnData:
    """Return 300 cells of four types from seven donors."""
    joined = anndata.concat(small_cells, join="inner", merge="same")
    joined.obs["cell_type"] = joined.obs["cell_type"].astype("category")
    return joined


@pytest.fixture(scope="module")
def base(cells: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with random weights, in place of a pretrained one."""
    folder = tmp_path_factory.mktemp("base") / "best_model"
    processor = ScGPTProcessor.from_genes(list(cells.var_names))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, dropout=0.0, **sizes)
    ScGPTForPreTraining(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["head", "lora", "full"])
def run(request: Any, cells: AnnData, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    if request.param == "lora":
        pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("run") / "types"
    settings = AnnotateSettings(
        model=str(base),
        out=str(out),
        labels_key="cell_type",
        train=request.param,
        learning_rate=3e-3,
        epochs=6,
        **QUIET,
    )
    return request.param, out, finetune_classifier(cells, settings)


def test_it_predicts_better_than_the_majority_baseline(run: tuple[str, Path, dict]) -> None:
    train, _, summary = run
    assert summary["train_donors"] + summary["validation_donors"] == 7
    better = summary["validation"]["macro_f1"] - summary["majority_baseline"]["macro_f1"]
    assert better > {"head": 0.0, "lora": 0.2, "full": 0.5}[train], summary["validation"]


def test_a_run_writes_all_files_and_no_pickles(run: tuple[str, Path, dict], base: Path) -> None:
    train, out, summary = run
    found = {path.name for path in out.iterdir()}
    assert found == {"best_model", "settings.yaml", "split.json", "metrics.jsonl", "summary.json"}
    assert json.loads((out / "summary.json").read_text()).items() >= summary.items()
    assert not [path for path in out.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    assert sum(sum(row) for row in summary["confusion"]["counts"]) == summary["validation_cells"]
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    best = max(line["eval_macro_f1"] for line in lines if "eval_macro_f1" in line)
    assert summary["validation"]["macro_f1"] == pytest.approx(best)
    saved, before = (load_file(folder / "model.safetensors") for folder in (out / "best_model", base))
    same = [torch.equal(saved[name], before[name]) for name in before if name.startswith("scgpt.layers")]
    assert all(same) == (train == "head")
    assert not [name for name in saved if "lora" in name]


def test_the_saved_model_has_the_scores_of_the_summary(run: tuple[str, Path, dict], cells: AnnData) -> None:
    _, out, summary = run
    model = AutoModelForSequenceClassification.from_pretrained(out / "best_model")
    assert type(model) is ScGPTForSequenceClassification
    assert model.config.id2label == dict(enumerate(["B cell", "NK cell", "T cell", "monocyte"]))
    ranges = json.loads((out / "split.json").read_text())["parts"]["validation"]["cell_ranges"]
    held_out = cells[np.concatenate([np.arange(*one) for one in ranges])].copy()
    predict_cell_types(held_out, model, AutoProcessor.from_pretrained(out / "best_model"), threshold=0, progress=False)
    correct = held_out.obs["predicted_cell_type"].astype(str) == held_out.obs["cell_type"].astype(str)
    assert correct.mean() == pytest.approx(summary["validation"]["accuracy"])
    confidence = held_out.obs["predicted_cell_type_confidence"]
    nll = summary["validation"]["loss"]  # of the calibrated model, over all held-out cells
    assert -np.log(confidence[correct]).mean() <= nll + 1e-6


def test_the_same_seed_gives_the_same_weights(cells: AnnData, base: Path, tmp_path: Path) -> None:
    weights = []
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        settings = AnnotateSettings(
            model=str(base),
            out=str(tmp_path / name),
            labels_key="cell_type",
            epochs=1,
            seed=seed,
            label_fraction=0.3,
            **QUIET,
        )
        summary = finetune_classifier(cells, settings)
        assert summary["left_out"]["training cells dropped by label_fraction"] > 0.6 * summary["train_cells"]
        weights.append(load_file(tmp_path / name / "best_model" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["class_head.out.weight"], weights[2]["class_head.out.weight"])


def test_it_loads_with_transformers_alone(run: tuple[str, Path, dict]) -> None:
    train, out, _ = run
    if train != "lora":
        pytest.skip("one way of training is enough")
    code = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "scgpt_hf":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({str(out / "best_model")!r}, trust_remote_code=True)
print(sorted(model.config.label2id))
"""
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(out.parent / "hf")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "['B cell', 'NK cell', 'T cell', 'monocyte']" in done.stdout


def logged(cells: AnnData) -> AnnData:
    changed = cells.copy()
    changed.X = changed.X.log1p()
    return changed


def renamed(cells: AnnData, names: list[str]) -> AnnData:
    changed = cells.copy()
    changed.var_names = names
    changed.var["feature_name"] = names
    return changed


def relabelled(cells: AnnData, types: list[str]) -> AnnData:
    changed = cells.copy()
    changed.obs["cell_type"] = types
    return changed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (logged, "raw counts"),
        (lambda cells: renamed(cells, [f"ENSMUSG{n:011d}" for n in range(cells.n_vars)]), "mouse genes"),
        (lambda cells: renamed(cells, [f"Gm{n}" for n in range(cells.n_vars)]), "mouse genes"),
        (lambda cells: renamed(cells, [f"peak{n}" for n in range(cells.n_vars)]), "only 0 of the"),
        (lambda cells: cells[:0].copy(), "no cells"),
        (lambda cells: relabelled(cells, ["T cell"] * cells.n_obs), r"only 'T cell' \(300 cells\)"),
        (lambda cells: relabelled(cells, ["unknown"] * cells.n_obs), "has none"),
        (lambda cells: cells[:, :0].copy(), "only 0 of the 0"),
    ],
)
def test_bad_cells_raise_and_leave_no_folder(
    change: Any, message: str, cells: AnnData, base: Path, tmp_path: Path
) -> None:
    settings = AnnotateSettings(model=str(base), out=str(tmp_path / "run"), labels_key="cell_type", **QUIET)
    with pytest.raises(ValueError, match=message):
        finetune_classifier(change(cells), settings)
    assert not (tmp_path / "run").exists()


def test_bad_settings_raise(cells: AnnData, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = {"model": str(base), "out": str(tmp_path / "run"), "labels_key": "cell_type", **QUIET}
    for wrong in ({"validation_fraction": 1.0}, {"label_fraction": 0.0}, {"min_cells": 1}):
        with pytest.raises(ValueError, match=f"expected {next(iter(wrong))}"):
            AnnotateSettings(**{**given, **wrong})
    with pytest.raises(ValueError, match="'no_such'; name another one with --labels_key"):
        finetune_classifier(cells, AnnotateSettings(**{**given, "labels_key": "no_such"}))
    with pytest.raises(ValueError, match="'patient'; name another one with --donor_key"):
        finetune_classifier(cells, AnnotateSettings(**given, donor_key="patient"))
    with pytest.raises(ValueError, match="found 1 assay"):
        finetune_classifier(cells, AnnotateSettings(**given, donor_key="assay"))
    with pytest.raises(ValueError, match="is the folder of a run"):
        finetune_classifier(cells, AnnotateSettings(**{**given, "model": str(base.parent)}))
    with pytest.raises(FileExistsError, match="name a new folder"):
        finetune_classifier(cells, AnnotateSettings(**{**given, "out": str(base)}))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        finetune_classifier(cells, AnnotateSettings(**given, train="lora"))


def test_a_checkpoint_without_encoder_weights_or_of_another_model_raises(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot be changed .*n_domains >= 1"):
        load_pretrained(base, ScGPTForPreTraining, input_norm="domain")
    with pytest.raises(ValueError, match=r"lacks .* weights of the encoder"):
        load_pretrained(base, ScGPTForPreTraining, num_hidden_layers=2)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    AutoProcessor.from_pretrained(base).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="holds a 'bert' model"):
        load_pretrained(tmp_path, ScGPTForPreTraining)


def test_the_losses_of_parts_add_up_to_the_loss_of_the_batch() -> None:
    generator = torch.Generator().manual_seed(0)
    logits, classes = torch.randn(12, 3, generator=generator), torch.tensor([0, 1, 2] * 4)
    weights = torch.tensor([0.5, 1.0, 2.0])

    def loss(part: slice, items: int | None) -> torch.Tensor:
        outputs = type("Outputs", (), {"logits": logits[part]})
        return weighted_cross_entropy(outputs, classes[part], items, class_weights=weights)

    total = loss(slice(None), None)
    torch.testing.assert_close(loss(slice(0, 5), 12) + loss(slice(5, 12), 12), total)
    slow = sum(-weights[c] * torch.log_softmax(row, 0)[c] for row, c in zip(logits, classes, strict=True)) / 12
    torch.testing.assert_close(total, slow)


def test_agreement_of_a_worked_example() -> None:
    found = agreement(np.array([0, 0, 1, 2]), np.array([0, 1, 1, 1]))
    assert found["accuracy"] == 0.5
    assert found["macro_f1"] == pytest.approx((2 / 3 + 0.5 + 0) / 3)
