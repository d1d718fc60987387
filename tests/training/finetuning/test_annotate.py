"""A classifier of labelled cells: it learns, it is saved like any other model, and unusable cells raise errors."""

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
from scipy.sparse import csr_matrix
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import AutoModelForSequenceClassification, AutoProcessor

from scgpt_hf import (
    AnnotateSettings,
    ScGPTConfig,
    ScGPTForPreTraining,
    ScGPTForSequenceClassification,
    ScGPTProcessor,
    embed_anndata,
    finetune_classifier,
    predict_cell_types,
)
from scgpt_hf.analysis.evaluation.baseline_embeddings import LOGISTIC, transfer_features
from scgpt_hf.demo import demo_cells
from scgpt_hf.pretrained import load_pretrained
from scgpt_hf.scoring.probing import predict_query
from scgpt_hf.training.finetuning.classifier import agreement, macro_f1_gain, weighted_cross_entropy

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
QUIET = {"use_cpu": True, "disable_tqdm": True}


def settings_of(model: Path, out: Path, **changed: Any) -> AnnotateSettings:
    return AnnotateSettings(model=str(model), out=str(out), labels_key="cell_type", **QUIET, **changed)


@pytest.fixture(scope="module")
def cells(small_cells: list[AnnData]) -> AnnData:
    """Return 300 cells of four types from seven donors."""
    joined = anndata.concat(small_cells, join="inner", merge="same")
    joined.obs["cell_type"] = joined.obs["cell_type"].astype("category")
    return joined


@pytest.fixture(scope="module")
def base(cells: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with random weights, in place of a pretrained one."""
    return save_untrained(list(cells.var_names), tmp_path_factory.mktemp("base") / "best_model")


def save_untrained(genes: list[str], folder: Path) -> Path:
    processor = ScGPTProcessor.from_genes(genes)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, dropout=0.0, **sizes)
    ScGPTForPreTraining(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["probe", "lora", "full"])
def run(request: Any, cells: AnnData, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path, dict]:
    if request.param == "lora":
        pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("run") / "types"
    settings = settings_of(base, out, train=request.param, learning_rate=3e-3, epochs=6)
    return request.param, out, finetune_classifier(cells, settings)


def test_it_predicts_better_than_the_majority_baseline(run: tuple[str, Path, dict]) -> None:
    train, _, summary = run
    assert summary["train_donors"] + summary["validation_donors"] == 7
    assert summary["kept"] == train  # in this model with random weights there is much to gain
    assert summary["majority_baseline"]["macro_f1"] < 0.2
    assert summary["probe"]["macro_f1"] > 0.7
    gain = summary["validation"]["macro_f1"] - summary["probe"]["macro_f1"]
    assert gain == (0 if train == "probe" else pytest.approx(summary["fine_tuned"]["gain"]))
    assert gain > {"probe": -1, "lora": 0.02, "full": 0.1}[train]


def test_a_run_writes_all_files_and_no_pickles(run: tuple[str, Path, dict], base: Path) -> None:
    train, out, summary = run
    found = {path.name for path in out.iterdir()}
    metrics = [] if train == "probe" else ["metrics.jsonl"]
    assert found == {"best_model", "settings.yaml", "split.json", "summary.json", *metrics}
    assert json.loads((out / "summary.json").read_text()).items() >= summary.items()
    assert not [path for path in out.rglob("*") if path.suffix in {".bin", ".pt", ".pkl"}]
    assert sum(sum(row) for row in summary["confusion"]["counts"]) == summary["validation_cells"]
    for path in map(out.joinpath, metrics):
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        best = max(line["eval_macro_f1"] for line in lines if "eval_macro_f1" in line)
        assert summary["validation"]["macro_f1"] == pytest.approx(best)
    saved, before = (load_file(folder / "model.safetensors") for folder in (out / "best_model", base))
    same = [torch.equal(saved[name], before[name]) for name in before if name.startswith("scgpt.layers")]
    assert all(same) == (train == "probe")
    assert not [name for name in saved if "lora" in name]


def held_out_cells(out: Path, cells: AnnData, part: str = "validation") -> AnnData:
    ranges = json.loads((out / "split.json").read_text())["parts"][part]["cell_ranges"]
    return cells[np.concatenate([np.arange(*one) for one in ranges])].copy()


def test_the_saved_model_has_the_scores_of_the_summary(
    run: tuple[str, Path, dict], cells: AnnData, base: Path, tmp_path: Path
) -> None:
    train, out, summary = run
    if train == "probe":  # without refit, because the cells that were scored would be among those it is fitted to
        out = tmp_path / "types"
        summary = finetune_classifier(cells, settings_of(base, out, refit=False))
    model = AutoModelForSequenceClassification.from_pretrained(out / "best_model")
    assert type(model) is ScGPTForSequenceClassification
    assert model.config.id2label == dict(enumerate(["B cell", "NK cell", "T cell", "monocyte"]))
    held_out = held_out_cells(out, cells)
    predict_cell_types(held_out, model, AutoProcessor.from_pretrained(out / "best_model"), threshold=0, progress=False)
    correct = held_out.obs["predicted_cell_type"].astype(str) == held_out.obs["cell_type"].astype(str)
    assert correct.mean() == pytest.approx(summary["validation"]["accuracy"])
    confidence = held_out.obs["predicted_cell_type_confidence"]
    nll = summary["validation"]["loss"]  # of the calibrated model, over all held-out cells
    assert -np.log(confidence[correct]).mean() <= nll + 1e-6


@pytest.mark.parametrize("refit", [True, False])
def test_the_logits_of_the_probe_are_those_of_scikit_learn(
    refit: bool, cells: AnnData, base: Path, tmp_path: Path
) -> None:
    summary = finetune_classifier(cells, settings_of(base, tmp_path / "types", refit=refit))
    fitted = cells.copy() if refit else held_out_cells(tmp_path / "types", cells, "train")
    used = summary["refit"] if refit else {**summary["probe"], "temperature": summary["temperature"]}
    assert fitted.n_obs == (summary["refit"]["cells"] if refit else summary["train_cells"])
    embed_anndata(fitted, base, normalize=False, progress=False)
    embedding = fitted.obsm["X_scgpt"].astype(np.float64)
    regression = LogisticRegression(C=used["C"], class_weight="balanced", max_iter=1000)
    expected = make_pipeline(StandardScaler(), regression).fit(embedding, fitted.obs["cell_type"].astype(str))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "types" / "best_model").eval()
    processor = AutoProcessor.from_pretrained(tmp_path / "types" / "best_model")
    processor.ties = "midpoint"  # as `embed_anndata` bins
    with torch.inference_mode():
        logits = model(**processor(fitted)).logits.numpy()
    assert list(model.config.label2id) == expected.classes_.tolist()
    np.testing.assert_allclose(logits, expected.decision_function(embedding) / used["temperature"], atol=1e-4)


def test_the_baseline_on_genes_is_that_of_the_evaluation(
    cells: AnnData, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summary = finetune_classifier(cells, settings_of(base, tmp_path / "types"))
    train, held_out = (held_out_cells(tmp_path / "types", cells, part) for part in ("train", "validation"))
    donors = train.obs["donor_id"].to_numpy(str)
    features = transfer_features(csr_matrix(train.X), donors, csr_matrix(held_out.X), [LOGISTIC], 0)[LOGISTIC]
    types = [part.obs["cell_type"].to_numpy(str) for part in (train, held_out)]
    expected = predict_query(features[0], types[0], features[1], types[1], "linear probe")
    found = summary["gene_baseline"]
    assert found["genes"] == features[0].shape[1]
    assert (found["macro_f1"], found["accuracy"]) == pytest.approx((expected.macro_f1, expected.accuracy))
    assert found["macro_f1"] > 0.9
    monkeypatch.setattr("scgpt_hf.training.finetuning.gene_baseline.MAX_CELLS", 10)
    assert finetune_classifier(cells, settings_of(base, tmp_path / "many"))["gene_baseline"] is None


def test_the_probe_is_kept_where_training_does_not_help(cells: AnnData, base: Path, tmp_path: Path) -> None:
    # At this learning rate training destroys the encoder.
    tuned = settings_of(base, tmp_path / "tuned", train="full", learning_rate=10.0, epochs=1)
    summary = finetune_classifier(cells, tuned)
    assert summary["kept"] == "probe"
    assert summary["fine_tuned"]["gain"] < 0
    probe = finetune_classifier(cells, settings_of(base, tmp_path / "probe"))
    assert summary["validation"] == probe["validation"]
    assert summary["probe"]["macro_f1"] == summary["validation"]["macro_f1"]
    saved = [load_file(tmp_path / name / "best_model" / "model.safetensors") for name in ("tuned", "probe")]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(saved[0][name], saved[1][name]) for name in saved[0])


@pytest.mark.parametrize("train", ["probe", pytest.param("full", marks=pytest.mark.slow)])
def test_the_same_seed_gives_the_same_weights(train: str, cells: AnnData, base: Path, tmp_path: Path) -> None:
    weights = []
    changed = {"train": train, "epochs": 1, "learning_rate": 3e-3, "label_fraction": 0.3}
    for name, seed in (("one", 1), ("again", 1), ("other", 2)):
        summary = finetune_classifier(cells, settings_of(base, tmp_path / name, seed=seed, **changed))
        assert summary["left_out"]["training cells dropped by label_fraction"] > 0.6 * summary["train_cells"]
        weights.append(load_file(tmp_path / name / "best_model" / "model.safetensors"))
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert not torch.equal(weights[0]["class_head.out.weight"], weights[2]["class_head.out.weight"])


@pytest.fixture(scope="module")
def real_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a model with random weights, for the genes of the demo."""
    return save_untrained(list(demo_cells().var_names), tmp_path_factory.mktemp("real") / "best_model")


def real_cells(types: dict[str, int], donors: list[str]) -> AnnData:
    """Return real cells: for each type its number of cells. The donors take turns."""
    cells = demo_cells()
    found = cells[np.concatenate([np.flatnonzero(cells.obs["cell_type"] == name)[:n] for name, n in types.items()])]
    assert found.n_obs == sum(types.values())
    return with_obs(found, donor_id=[donors[n % len(donors)] for n in range(found.n_obs)])


def with_obs(cells: AnnData, **columns: list[str]) -> AnnData:
    changed = cells.copy()
    changed.obs = changed.obs.assign(**columns)
    return changed


@pytest.mark.parametrize("train", ["probe", "full"])
@pytest.mark.parametrize("donors", [["only"], ["one", "two", "three"]])
def test_two_cells_of_a_type_are_enough(train: str, donors: list[str], real_base: Path, tmp_path: Path) -> None:
    cells = real_cells({"CD19+ B": 2, "CD14+ Monocyte": 2, "Dendritic": 2}, donors)
    summary = finetune_classifier(cells, settings_of(real_base, tmp_path / "run", train=train, epochs=2))
    assert summary["train_cells"] + summary["validation_cells"] + sum(summary["left_out"].values()) == 6
    assert summary["validation"]["macro_f1"] >= summary["probe"]["macro_f1"]
    assert summary["kept"] != "probe" or summary["refit"]["cells"] == 6 - sum(summary["left_out"].values())
    predict_cell_types(cells, tmp_path / "run" / "best_model", threshold=0, progress=False)
    correct = cells.obs["predicted_cell_type"].astype(str) == cells.obs["cell_type"].astype(str)
    assert correct.mean() >= 0.5  # by chance a third
    assert np.isfinite(cells.obs["predicted_cell_type_confidence"]).all()


def test_types_that_cannot_be_learned_are_counted(real_base: Path, tmp_path: Path) -> None:
    single = real_cells({"CD19+ B": 20, "CD14+ Monocyte": 20, "CD34+": 1}, ["one", "two", "three"])
    summary = finetune_classifier(single, settings_of(real_base, tmp_path / "single"))
    assert summary["rare_labels"] == {"CD34+": 1}
    assert list(summary["labels"]) == ["CD14+ Monocyte", "CD19+ B"]
    # Each donor has a type that the other one lacks. One of them is held out, and its type cannot be learned.
    cells = real_cells({"CD19+ B": 20, "CD14+ Monocyte": 20, "CD34+": 5, "CD56+ NK": 5}, ["one", "two"])
    of_one = cells.obs["cell_type"] == "CD34+"
    of_two = cells.obs["cell_type"] == "CD56+ NK"
    donors = cells.obs["donor_id"].mask(of_one, "one").mask(of_two, "two").tolist()
    settings = settings_of(real_base, tmp_path / "missing", validation_fraction=0.5)
    summary = finetune_classifier(with_obs(cells, donor_id=donors), settings)
    assert len(summary["labels"]) == 3
    assert summary["left_out"]["label of held-out donors only"] == 5
    assert summary["validation"]["macro_f1"] > summary["majority_baseline"]["macro_f1"]


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


def test_the_gain_of_a_prediction_has_the_error_of_the_sample() -> None:
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, 1000)
    worse, better = (np.where(rng.random(1000) < share, classes, (classes + 1) % 3) for share in (0.6, 0.8))
    gain, error = macro_f1_gain(classes, worse, better, 0)
    assert gain == pytest.approx(agreement(classes, better)["macro_f1"] - agreement(classes, worse)["macro_f1"])
    # Correct with probability p or q, independently: the variance of the difference is p (1 - p) + q (1 - q).
    assert error == pytest.approx(np.sqrt((0.6 * 0.4 + 0.8 * 0.2) / 1000), rel=0.15)
    assert macro_f1_gain(classes, better, better, 0) == (0, 0)
