"""A run from start to end: training learns known effects, and prediction and evaluation use it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from anndata import AnnData, read_h5ad
from transformers import AutoModelForTokenClassification

import scgpt_hf
from scgpt_hf.cells.selection.splits import load_split
from scgpt_hf.cli.perturbation import perturb
from scgpt_hf.perturbation.cells import ScreenColumns, read_screen
from scgpt_hf.perturbation.conditions import CONTROL
from scgpt_hf.perturbation.evaluation.evaluate import CEILING, MODEL, evaluate_perturbation
from scgpt_hf.perturbation.evaluation.results import write_results
from scgpt_hf.perturbation.finetune import finetune_perturbation, make_model
from scgpt_hf.perturbation.gene_names import add_genes, match_screen_genes
from scgpt_hf.perturbation.predict import predict_perturbation
from scgpt_hf.perturbation.settings import PerturbationSettings
from scgpt_hf.perturbation.splits import split_conditions
from scgpt_hf.perturbation.stream import ExampleStream, TrainingCells
from tests.support.screens import GENES, build_screen, effect_of

FAST = {
    "use_cpu": True,
    "disable_tqdm": True,
    "epochs": 25,
    "hidden_size": 16,
    "intermediate_size": 32,
    "max_tokens": 30,
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run that holds out a double of seen genes, and the file of its screen."""
    folder = tmp_path_factory.mktemp("perturbation")
    build_screen().write_h5ad(folder / "screen.h5ad")
    settings = PerturbationSettings(
        out=str(folder / "run"), batch_key="replicate", split="leave_out", held_out=["GENE2+GENE3"], **FAST
    )
    finetune_perturbation(folder / "screen.h5ad", settings)
    return folder / "run", folder / "screen.h5ad"


def test_a_run_learns_effects_and_their_sum(finished: tuple[Path, Path]) -> None:
    run, path = finished
    found = predict_perturbation(read_h5ad(path), ["GENE3+GENE2", "GENE0+ctrl"], run / "best_model", progress=False)
    for name in ("GENE0+ctrl", "GENE2+GENE3"):
        assert np.corrcoef(found.varm["delta"][name], effect_of(name))[0, 1] > 0.8, name


def test_the_split_keeps_held_out_cells_and_controls_apart(finished: tuple[Path, Path]) -> None:
    run, path = finished
    split, conditions = load_split(run / "split.json"), read_h5ad(path).obs["condition"].astype(str).to_numpy()
    of_part = {part: set(conditions[ids]) for part, ids in split.parts.items()}
    assert of_part["test"] == {"GENE2+GENE3", "ctrl"}
    assert "GENE2+GENE3" not in of_part["train"] | of_part["validation"]
    assert not of_part["train"] & of_part["validation"]
    controls = [set(ids[conditions[ids] == "ctrl"]) for ids in (split.parts["train"], split.parts["test"])]
    assert not controls[0] & controls[1]
    assert split.source["conditions"]["test"] == {"combo_seen2": ["GENE2+GENE3"]}
    assert {"settings.yaml", "metrics.jsonl", "summary.json", "best_model"} <= {one.name for one in run.iterdir()}
    assert not list(run.glob("checkpoint*"))


def test_evaluation_scores_model_and_baselines_on_one_split(finished: tuple[Path, Path], tmp_path: Path) -> None:
    run, path = finished
    evaluation = evaluate_perturbation(path, run, progress=False)
    table = evaluation.table("combo_seen2")
    assert table[MODEL]["pearson_delta"] > 0.6
    assert table["no change"]["pearson_delta"] is None
    assert table["additive"]["items"] == table[CEILING]["items"] == 1
    assert table["additive"]["pearson_delta"] > 0.6
    assert evaluation.table(replicates=False) == {}
    out = write_results(evaluation, tmp_path / "scores")
    content = json.loads((out / "perturbation_scores.json").read_text())
    assert content["split"]["train"] == load_split(run / "split.json").source["conditions"]["train"]
    text = scgpt_hf.write_report(out).read_text()
    assert "GENE2+GENE3" in text
    assert text.count("<figure") == 4
    assert "what genetic perturbations do" in scgpt_hf.write_report(run).read_text()
    with pytest.raises(FileExistsError):
        write_results(evaluation, out)


def test_predictions_are_cells_with_their_controls(finished: tuple[Path, Path]) -> None:
    run, path = finished
    adata = read_h5ad(path)
    arguments: dict[str, Any] = {"n_cells": 6, "progress": False}
    found = predict_perturbation(adata, ["OUTSIDE", "GENE0+GENE1"], run / "best_model", **arguments)
    assert found.shape == (12, len(GENES))
    assert found.obs["condition"].tolist() == ["OUTSIDE+ctrl"] * 6 + ["GENE0+GENE1"] * 6
    assert (adata.obs.loc[found.obs["control_cell"], "condition"] == "ctrl").all()
    assert found.obs.groupby("condition", observed=True)["batch"].nunique().eq(2).all()
    np.testing.assert_allclose(found.layers["delta"], found.X - found.layers["control"], atol=1e-6)
    np.testing.assert_allclose(found.varm["mean"]["OUTSIDE+ctrl"], found.X[:6].mean(0), rtol=1e-5)
    same = predict_perturbation(adata, ["GENE1+GENE0", "OUTSIDE"], run / "best_model", batch_size=4, **arguments)
    np.testing.assert_allclose(same.varm["delta"]["OUTSIDE+ctrl"], found.varm["delta"]["OUTSIDE+ctrl"], atol=1e-5)


def test_controls_may_be_all_cells_or_a_mask(finished: tuple[Path, Path]) -> None:
    run, path = finished
    adata = read_h5ad(path)
    mask = (adata.obs["condition"] == "ctrl").to_numpy()
    arguments: dict[str, Any] = {"n_cells": 4, "progress": False}
    named = predict_perturbation(adata, "GENE0", run / "best_model", **arguments)
    masked = predict_perturbation(adata, "GENE0", run / "best_model", control=mask, **arguments)
    alone = predict_perturbation(adata[mask].copy(), "GENE0", run / "best_model", control=None, **arguments)
    for other in (masked, alone):
        np.testing.assert_allclose(other.X, named.X, atol=1e-6)


@pytest.mark.parametrize(
    ("conditions", "changes", "message"),
    [
        (["GENE99+ctrl"], {}, r"does not know 1 of the perturbed genes: \['GENE99'\]; the nearest.*GENE9"),
        (["GENE0+GENE0"], {}, "targets GENE0 twice"),
        (["ctrl"], {}, "one or more conditions"),
        (["GENE0"], {"control": "NT"}, "no cell is a control.*'NT'"),
        (["GENE0"], {"control": [True]}, "one boolean for each cell"),
        (["GENE0"], {"condition_key": "guide"}, "no column 'guide'"),
    ],
)
def test_predictions_that_cannot_be_made_raise(
    finished: tuple[Path, Path], conditions: list[str], changes: dict[str, Any], message: str
) -> None:
    run, path = finished
    with pytest.raises(ValueError, match=message):
        predict_perturbation(read_h5ad(path), conditions, run / "best_model", progress=False, **changes)


def test_an_evaluation_of_other_cells_raises(finished: tuple[Path, Path]) -> None:
    run, path = finished
    adata = read_h5ad(path)
    with pytest.raises(ValueError, match="not in the data"):
        evaluate_perturbation(adata[:-20].copy(), run, progress=False)
    with pytest.raises(ValueError, match="genes of the data"):
        evaluate_perturbation(adata[:, :-2].copy(), run, progress=False)


def test_two_runs_are_equal_and_a_second_one_is_refused(make_screen: Callable[..., AnnData], tmp_path: Path) -> None:
    weights = []
    for name in ("one", "two"):
        settings = PerturbationSettings(out=str(tmp_path / name), **{**FAST, "epochs": 1})
        finetune_perturbation(make_screen(), settings)
        weights.append(AutoModelForTokenClassification.from_pretrained(tmp_path / name / "best_model").state_dict())
    assert all((weights[0][name] == weights[1][name]).all() for name in weights[0])
    with pytest.raises(FileExistsError):
        finetune_perturbation(make_screen(), PerturbationSettings(out=str(tmp_path / "one"), **FAST))


@pytest.mark.parametrize(
    "kind",
    [
        {"objective": "generative", "query_out_proj": False, "loss_weights": {"gep": 1.0, "gepc": 1.0, "gen": 1.0}},
        {"loss_weights": {"gep": 0.5, "counts": 1.0}, "cls_shortcut": True, "n_domains": 2},
        {"domain_embedding": True, "n_domains": 2, "explicit_zero_prob": True},
    ],
    ids=["generative", "counts", "domains"],
)
def test_training_starts_from_every_kind_of_pretrained_model(
    make_screen: Callable[..., AnnData], tmp_path: Path, kind: dict[str, Any]
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    processor = scgpt_hf.ScGPTProcessor.from_genes([*GENES, "OUTSIDE"])
    config = scgpt_hf.ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes, **kind)
    for part in (scgpt_hf.ScGPTForPreTraining(config), processor):
        part.save_pretrained(tmp_path / "pretrained")
    settings = PerturbationSettings(
        model=str(tmp_path / "pretrained"), out=str(tmp_path / "run"), **{**FAST, "epochs": 1}
    )
    finetune_perturbation(make_screen(), settings)
    found = scgpt_hf.predict_perturbation(
        make_screen(), ["GENE1+GENE2"], tmp_path / "run" / "best_model", n_cells=4, progress=False
    )
    assert np.isfinite(found.X).all()


def test_training_starts_from_a_pretrained_model(make_screen: Callable[..., AnnData], tmp_path: Path) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    processor = scgpt_hf.ScGPTProcessor.from_genes([*GENES, "OUTSIDE"])
    config = scgpt_hf.ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes)
    for part in (scgpt_hf.ScGPTForPreTraining(config), processor):
        part.save_pretrained(tmp_path / "pretrained")
    settings = PerturbationSettings(
        model=str(tmp_path / "pretrained"), out=str(tmp_path / "run"), **{**FAST, "epochs": 1}
    )
    summary = finetune_perturbation(make_screen(), settings)
    assert set(summary["new"]) == {"expression_head", "flag_encoder", "perturbation_encoder"}
    assert settings.learning_rate == 1e-3
    small = scgpt_hf.ScGPTProcessor.from_genes(GENES)
    config.vocab_size, config.pad_token_id = small.vocab_size, small.pad_id
    for part in (scgpt_hf.ScGPTForPreTraining(config), small):
        part.save_pretrained(tmp_path / "small")
    settings = PerturbationSettings(model=str(tmp_path / "small"), out=str(tmp_path / "other"), **FAST)
    with pytest.raises(ValueError, match=r"'OUTSIDE'.*--add_genes adds"):
        finetune_perturbation(make_screen(), settings)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("cls_shortcut", [False, True])
def test_a_pretrained_model_learns_genes_that_it_lacks(
    make_screen: Callable[..., AnnData], tmp_path: Path, cls_shortcut: bool
) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    processor = scgpt_hf.ScGPTProcessor.from_genes([*GENES[:20], "ELSEWHERE"], symbols=[*GENES[:20], "GENE23"])
    config = scgpt_hf.ScGPTConfig(
        vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, cls_shortcut=cls_shortcut, **sizes
    )
    for part in (scgpt_hf.ScGPTForPreTraining(config), processor):
        part.save_pretrained(tmp_path / "pretrained")
    folder = {"model": str(tmp_path / "pretrained"), "out": str(tmp_path / "run")}
    settings = PerturbationSettings(**folder, add_genes=True, **{**FAST, "epochs": 2})
    summary = finetune_perturbation(make_screen(), settings)
    assert summary["genes"] == 25  # GENE23 is known as ELSEWHERE
    assert summary["coverage"]["unknown"] == 0
    found = predict_perturbation(
        make_screen(), ["OUTSIDE", "GENE1+GENE22"], tmp_path / "run" / "best_model", n_cells=4, progress=False
    )
    assert found.shape == (8, 24)
    assert found.varm["delta"]["OUTSIDE+ctrl"].abs().max() > 0
    with pytest.raises(ValueError, match="does not know 1 of the perturbed genes"):
        predict_perturbation(make_screen(), ["GENE99"], tmp_path / "run" / "best_model", progress=False)


def test_added_genes_leave_the_others_as_they_are() -> None:
    processor = scgpt_hf.ScGPTProcessor.from_genes(["A", "B"], symbols=["a", "b"], input_style="log1p", max_tokens=9)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = scgpt_hf.ScGPTConfig(
        vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, cls_shortcut=True, **sizes
    )
    model = scgpt_hf.ScGPTForPerturbation(config).eval()
    counts, flags = [[3, 2]], {"perturbation_flags": torch.zeros(1, 3, dtype=torch.int64)}
    before = model(**processor(counts, genes=["A", "B"]), **flags).expression
    known = model.scgpt.gene_encoder.embedding.weight.detach()[:2].clone()
    extended = add_genes(model, processor, ["C", "D"], ["c", "d"])
    assert extended.genes == ["A", "B", "C", "D"]
    assert extended.resolve_symbols(["d", "b"]) == ["D", "B"]
    assert (extended.input_style, extended.max_tokens, extended.pad_id) == ("log1p", 9, processor.pad_id)
    assert model.config.vocab_size == extended.vocab_size == 7
    torch.testing.assert_close(model(**extended(counts, genes=["A", "B"]), **flags).expression, before)
    torch.testing.assert_close(model.scgpt.gene_encoder.embedding.weight[5], known.mean(dim=0))
    with pytest.raises(ValueError, match=r"in the vocabulary or occur twice: \['A', 'E'\]"):
        add_genes(model, extended, ["A", "E", "E"], ["a", "e", "e"])


def test_examples_of_a_step_depend_on_the_step_alone(make_screen: Callable[..., AnnData]) -> None:
    screen = read_screen(make_screen(), ScreenColumns(batch_key="replicate"))
    settings = PerturbationSettings(out="unused", **FAST)
    split = split_conditions(sorted({name for name, _ in screen.items}), "none", validation_fraction=0)
    model, processor, _ = make_model(screen, split, screen.controls, settings)
    genes = match_screen_genes(screen.genes, processor)
    cells = TrainingCells.of(screen, genes, split.train, screen.controls)
    stream = ExampleStream(cells, processor, model.config, settings)
    batches = [batch for _, batch in zip(range(7), stream.batches(0), strict=False)]
    later = next(iter(stream.batches(6)))
    assert all((batches[6][name] == later[name]).all() for name in later if hasattr(later[name], "shape"))
    assert float(batches[0]["values"].sum()) != float(batches[4]["values"].sum())
    two = [next(iter(ExampleStream(cells, processor, model.config, settings, rank, 2).batches(0))) for rank in (0, 1)]
    assert float(two[0]["values"].sum()) != float(two[1]["values"].sum())


def test_the_target_cell_is_the_perturbed_cell(make_screen: Callable[..., AnnData]) -> None:
    screen = read_screen(make_screen(), ScreenColumns(batch_key="replicate"))
    settings = PerturbationSettings(out="unused", target="cell", made_up_doubles=0, **FAST)
    split = split_conditions(sorted({name for name, _ in screen.items}), "none", validation_fraction=0)
    model, processor, _ = make_model(screen, split, screen.controls, settings)
    cells = TrainingCells.of(screen, match_screen_genes(screen.genes, processor), split.train, screen.controls)
    labels = next(iter(ExampleStream(cells, processor, model.config, settings).batches(0)))["labels"].numpy()
    known = {row.tobytes() for row in screen.values[np.flatnonzero(screen.conditions != CONTROL)].toarray()}
    found = labels.ravel()[labels.ravel() >= 0].reshape(-1, len(GENES)).astype(np.float32)
    assert all(row.tobytes() in known for row in found)


@pytest.mark.parametrize("change", [{"epochs": 0}, {"hide_names": 1.0}, {"control_fraction": 0.0}])
def test_settings_out_of_range_raise(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        PerturbationSettings(out="unused", **change)


def test_the_command_trains_predicts_and_evaluates(
    make_screen: Callable[..., AnnData], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    screen, run, out = (str(tmp_path / name) for name in ("screen.h5ad", "run", "out.h5ad"))
    make_screen().write_h5ad(screen)
    fast = ["--epochs", "1", "--hidden_size", "16", "--use_cpu", "true", "--disable_tqdm", "true"]
    perturb.main(["train", screen, "--out", run, "--batch_key", "replicate", "--split", "unseen_single", *fast])
    printed = capsys.readouterr().out
    assert "held out, unseen_single" in printed
    assert "validation: loss " in printed
    assert "{" not in printed
    perturb.main(["predict", screen, "GENE0+GENE1", "--model", f"{run}/best_model", "--out", out, "--n_cells", "3"])
    assert "GENE0+GENE1: " in capsys.readouterr().out
    assert read_h5ad(out).n_obs == 3
    perturb.main(["evaluate", screen, "--run", run, "--out", f"{run}/scores"])
    assert "no change" in capsys.readouterr().out
    assert Path(run, "scores", "report.html").is_file()
    for arguments in (
        ["predict", screen, "GENE99", "--model", f"{run}/best_model", "--out", str(tmp_path / "other.h5ad")],
        ["predict", screen, "GENE0", "--model", f"{run}/best_model", "--out", out],
        ["evaluate", screen, "--run", run, "--out", f"{run}/scores"],
    ):
        with pytest.raises(SystemExit) as ended:
            perturb.main(arguments)
        assert ended.value.code not in (0, None)
    assert not (tmp_path / "other.h5ad").exists()
