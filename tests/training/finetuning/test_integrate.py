"""Integration: new heads are initialized, other weights are loaded, and the model embeds cells by their batch."""

import json
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pytest
import torch
from anndata import AnnData
from safetensors.torch import load_file
from transformers import AutoModel

from scgpt_hf import (
    AnnotateSettings,
    IntegrateSettings,
    ScGPTConfig,
    ScGPTForPreTraining,
    ScGPTProcessor,
    embed_anndata,
    finetune_classifier,
    finetune_integration,
)

QUIET = {"use_cpu": True, "disable_tqdm": True}


@pytest.fixture(scope="module")
def cells(small_cells: list[AnnData]) -> AnnData:
    return anndata.concat(small_cells, join="inner", merge="same")


@pytest.fixture(scope="module")
def base(cells: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "best_model"
    processor = ScGPTProcessor.from_genes(list(cells.var_names))
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes)
    ScGPTForPreTraining(config).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def run(cells: AnnData, base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("run") / "joined"
    settings = IntegrateSettings(model=str(base), out=str(out), batch_key="dataset_id", epochs=2, **QUIET)
    return out, finetune_integration(cells, settings)


def test_a_run_trains_all_objectives_and_lists_the_new_parts(run: tuple[Path, dict[str, Any]], base: Path) -> None:
    out, summary = run
    assert {path.name for path in out.iterdir()} == {
        "best_model", "settings.yaml", "split.json", "metrics.jsonl", "summary.json",
    }  # fmt: skip
    assert summary["new"] == ["cell_to_gene_head", "domain_encoder", "domain_head", "expression_head", "input_norm"]
    assert summary["domains"]["first"] == {"train": 144, "validation": 16}
    config = json.loads((out / "best_model" / "config.json").read_text())
    assert (config["batch_key"], config["domains"], config["n_domains"]) == ("dataset_id", ["first", "second"], 2)
    assert config["loss_weights"] == {"gep": 1.0, "gepc": 1.0, "ecs": 10.0, "dar": 1.0}
    losses = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert any({"eval_gep_mse", "eval_gepc_mse", "eval_ecs", "eval_dar"} <= line.keys() for line in losses)
    saved, before = (load_file(folder / "model.safetensors") for folder in (out / "best_model", base))
    name = "scgpt.gene_encoder.embedding.weight"  # loaded, then trained a little
    assert 0 < (saved[name] - before[name]).abs().max() < 0.02


def test_the_embedding_of_a_cell_depends_on_its_batch_and_not_on_the_other_cells(
    run: tuple[Path, dict[str, Any]], cells: AnnData
) -> None:
    out, _ = run
    full, part = cells.copy(), cells[100:200:3].copy()
    embed_anndata(full, out / "best_model", progress=False)
    embed_anndata(part, out / "best_model", batch_size=5, progress=False)
    np.testing.assert_allclose(part.obsm["X_scgpt"], full.obsm["X_scgpt"][100:200:3], atol=2e-6)
    swapped = cells[:20].copy()
    swapped.obs["dataset_id"] = "second"
    embed_anndata(swapped, out / "best_model", progress=False)
    assert np.abs(swapped.obsm["X_scgpt"] - full.obsm["X_scgpt"][:20]).max() > 1e-3


def test_a_batch_that_the_model_does_not_know_raises(run: tuple[Path, dict[str, Any]], cells: AnnData) -> None:
    out, _ = run
    other = cells[:20].copy()
    other.obs["dataset_id"] = "third"
    with pytest.raises(ValueError, match=r"experimental batches .*not trained on: \['third'\]"):
        embed_anndata(other, out / "best_model", progress=False)
    del other.obs["dataset_id"]
    with pytest.raises(ValueError, match="dataset_id"):
        embed_anndata(other, out / "best_model", progress=False)
    model, processor = AutoModel.from_pretrained(out / "best_model"), ScGPTProcessor.from_pretrained(out / "best_model")
    model.config.batch_key = None
    with pytest.raises(ValueError, match=r"set model\.config\.batch_key"):
        embed_anndata(cells[:20].copy(), model, processor, progress=False)


def test_an_integrated_model_can_be_fine_tuned_on_labels(
    run: tuple[Path, dict[str, Any]], cells: AnnData, tmp_path: Path
) -> None:
    out, _ = run
    settings = AnnotateSettings(
        model=str(out / "best_model"),
        out=str(tmp_path / "types"),
        labels_key="cell_type",
        **QUIET,
    )
    assert finetune_classifier(cells, settings)["validation_cells"] > 0
    before, after = (load_file(folder / "best_model" / "model.safetensors") for folder in (out, tmp_path / "types"))
    name = "scgpt.input_norm.running_mean"
    assert torch.equal(before[name], after[name])  # a frozen encoder's norm does not move


def test_a_single_batch_and_settings_out_of_range_raise(cells: AnnData, base: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {"model": str(base), "out": str(tmp_path / "run"), "batch_key": "assay", **QUIET}
    with pytest.raises(ValueError, match=r"two or more experimental batches.*10x 3' v3"):
        finetune_integration(cells, IntegrateSettings(**given))
    with pytest.raises(ValueError, match="expected mask_ratio"):
        IntegrateSettings(**given, mask_ratio=1.0)
    assert not (tmp_path / "run").exists()


def test_models_that_count_padding_embed_padded_batches(cells: AnnData, base: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(base, cell_pooling="average").eval()
    processor = ScGPTProcessor.from_pretrained(base)
    part = cells[:5].copy()
    embed_anndata(part, model, processor, normalize=False, progress=False)
    processor.ties = "midpoint"
    with torch.inference_mode():
        expected = model(**processor(cells[:5].copy())).cell_embedding.numpy()
    np.testing.assert_allclose(part.obsm["X_scgpt"], expected, atol=1e-5)
