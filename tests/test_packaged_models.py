"""Test the models that come with the package: they load by name and offline, are small, and are what embedding uses."""

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForPreTraining

import scgpt_hf
from scgpt_hf.cli.embed import main as embed_command
from scgpt_hf.packaged_models import DEFAULT_MODEL, MODELS, locate_checkpoint, packaged_names
from tests.support import ROOT


@pytest.mark.parametrize("name", packaged_names())
def test_a_packaged_model_is_small_and_has_a_card_and_no_code(name: str) -> None:
    files = {path.name: path.stat().st_size for path in Path(MODELS, name).iterdir()}
    assert sum(files.values()) <= 5_000_000
    assert {"README.md", "config.json", "model.safetensors", "processor_config.json"} <= set(files)
    assert not [file for file in files if file.endswith((".py", ".pt", ".bin", ".pkl"))]
    assert "license:" in Path(MODELS, name, "README.md").read_text(encoding="utf-8")


def test_it_loads_by_name_and_has_the_weights_of_its_folder() -> None:
    model, processor = scgpt_hf.load_model("blood-mini", device="cpu")
    same = AutoModel.from_pretrained(scgpt_hf.packaged_model("blood-mini"))
    assert model.name_or_path == "blood-mini"  # and not where the package is installed
    assert model.dtype == torch.float32
    assert processor.vocab_size == model.config.vocab_size
    for name, weight in same.state_dict().items():
        assert torch.equal(weight, model.state_dict()[name])


def test_it_has_the_heads_of_pretraining() -> None:
    name = scgpt_hf.packaged_model()
    model, report = AutoModelForPreTraining.from_pretrained(name, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert model.count_head is not None


def test_embedding_uses_it_unless_another_model_is_given() -> None:
    cells = scgpt_hf.demo_cells()
    report = scgpt_hf.embed_anndata(cells, progress=False)
    assert report["model"] == DEFAULT_MODEL
    assert cells.obsm["X_scgpt"].shape == (700, 128)


def test_the_command_says_which_model_it_uses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scgpt_hf.demo_cells()[:50].copy().write_h5ad("cells.h5ad")
    embed_command(["cells.h5ad", "--out", "out.h5ad"])
    said = capsys.readouterr().out
    assert "No --model: using blood-mini" in said
    assert "with blood-mini" in said
    assert Path(said.split("limits: ")[1].splitlines()[0]).is_file()


def test_a_folder_of_that_name_takes_precedence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert locate_checkpoint("blood-mini") == Path(MODELS, "blood-mini")
    (tmp_path / "blood-mini").mkdir()
    assert locate_checkpoint("blood-mini") == "blood-mini"


def test_an_unknown_name_is_an_error_that_lists_the_models() -> None:
    with pytest.raises(ValueError, match="no model 'blood-mni'; it has blood-mini"):
        scgpt_hf.packaged_model("blood-mni")
    with pytest.raises(FileNotFoundError, match="models of the package are blood-mini"):
        scgpt_hf.load_model("runs/none/blood mini")


def test_it_separates_the_cell_types_of_the_demo_better_than_an_untrained_model() -> None:
    """Cell types of scanpy's PBMC 68k subset, which were not used in training; kNN macro-F1 within the set."""
    cells = scgpt_hf.demo_cells()
    scgpt_hf.embed_anndata(cells, progress=False)
    model, processor = scgpt_hf.load_model("blood-mini", device="cpu")
    torch.manual_seed(0)
    scgpt_hf.embed_anndata(cells, AutoModel.from_config(model.config), processor, key_added="random", progress=False)
    found = scgpt_hf.evaluate_embeddings(
        cells, ["X_scgpt", "random"], "cell_type", metrics=None, baselines=(), progress=False
    )
    trained, random = (found.methods[name].values["kNN macro-F1"] for name in ("X_scgpt", "random"))
    assert np.isfinite(trained)
    assert trained > random + 0.1


def test_the_card_has_the_scores_that_were_measured() -> None:
    import json

    result = json.loads((ROOT / "benchmarks/results/blood_mini.json").read_text(encoding="utf-8"))
    card = Path(MODELS, "blood-mini", "README.md").read_text(encoding="utf-8")
    for scores in result["methods"].values():
        for of_set in scores.values():
            assert f"{of_set['kNN macro-F1']:.3f}".lstrip("0") in card
