"""Test that a checkpoint of pretraining records the symbols and experimental batches that other cells need."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData

from scgpt_hf.analysis.embed import embed_anndata
from scgpt_hf.cells.source import open_source
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.recipe import build_model, build_processor
from scgpt_hf.training.settings import DataSettings, ModelSettings


@pytest.fixture(scope="module")
def saved(small_census: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a model with a batch norm for each data set, as scripts/pretrain.py builds it."""
    folder = tmp_path_factory.mktemp("run") / "model"
    source = open_source(small_census)
    genes = source.genes["feature_id"].tolist()
    processor = build_processor(genes, DataSettings(max_tokens=30), source)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    settings = ModelSettings(**sizes, input_norm="domain")
    model = build_model(processor, settings, ["first", "second"], "dataset_id")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def test_genes_are_matched_by_the_symbols_of_the_training_data(saved: Path, small_cells: list[AnnData]) -> None:
    by_id = small_cells[0][:20].copy()
    by_symbol = by_id.copy()
    by_symbol.var = by_symbol.var.set_index("feature_name")
    settings = {"progress": False, "batch_size": 20}  # batch norms count padding, so compare equal batches
    assert embed_anndata(by_id, saved, **settings)["genes"]["by_id"] == 190
    coverage = embed_anndata(by_symbol, saved, **settings)["genes"]
    assert coverage == {"by_id": 0, "by_symbol": 190, "duplicates": 0, "unknown": 0, "vocabulary": 200}
    np.testing.assert_allclose(by_symbol.obsm["X_scgpt"], by_id.obsm["X_scgpt"], atol=1e-6)
    processor = ScGPTProcessor.from_pretrained(saved)
    assert (processor(by_symbol)["input_ids"] == processor(by_id)["input_ids"]).all()


def test_cells_are_embedded_with_the_domains_of_training(saved: Path, small_cells: list[AnnData]) -> None:
    cells = small_cells[0][:20].copy()
    embed_anndata(cells, saved, progress=False)
    assert np.isfinite(cells.obsm["X_scgpt"]).all()
    cells.obs["dataset_id"] = "third"
    with pytest.raises(ValueError, match=r"dataset_id.*'third'.*'first', 'second'"):
        embed_anndata(cells, saved, overwrite=True, progress=False)
    del cells.obs["dataset_id"]
    with pytest.raises(ValueError, match="dataset_id"):
        embed_anndata(cells, saved, overwrite=True, progress=False)


def test_a_model_of_a_newer_version_raises_an_error_that_names_its_folder(
    saved: Path, small_cells: list[AnnData], tmp_path: Path
) -> None:
    path = Path(shutil.copytree(saved, tmp_path / "model")) / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "norm_scheme": "rms"}))
    with pytest.raises(ValueError, match=r"model cannot be used: .*norm_scheme"):
        embed_anndata(small_cells[0][:20].copy(), path.parent, progress=False)
