"""Mouse cells, from files to a model: a vocabulary of their own, and models that refuse cells of another species."""

import json
from pathlib import Path

import numpy as np
import pytest
from anndata import AnnData

from scgpt_hf.analysis.embed import embed_anndata
from scgpt_hf.analysis.expression import predict_expression
from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cells.source import open_source
from scgpt_hf.pretrained import load_processor
from scgpt_hf.pretraining import pretrain
from scgpt_hf.training.settings_parsing import parse_settings
from tests.support.training import TINY


def as_mouse(cells: AnnData) -> AnnData:
    """Return the cells with ids and symbols as mouse genes have them."""
    mouse = cells.copy()
    mouse.var_names = [f"ENSMUSG{number:011}" for number in range(mouse.n_vars)]
    mouse.var["feature_name"] = [f"Gene{number}" for number in range(mouse.n_vars)]
    return mouse


@pytest.fixture(scope="module")
def mouse(small_cells: list[AnnData]) -> AnnData:
    return as_mouse(small_cells[0])


@pytest.fixture(scope="module")
def run(mouse: AnnData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretraining run on a Census of mouse cells."""
    folder = tmp_path_factory.mktemp("mouse")
    mouse.write_h5ad(folder / "mouse.h5ad")
    census = build_census([folder / "mouse.h5ad"], folder / "census", organism="mus_musculus")
    assert open_source(str(census)).describe()["organism"] == "mus_musculus"
    flags = ("--data", str(census), "--output_dir", str(folder / "run"), "--num_train_epochs", "1")
    pretrain(parse_settings([*TINY, *flags, "--fit_baselines", "none"]), report=lambda _: None)
    return folder / "run"


def test_a_mouse_model_has_the_vocabulary_of_its_cells_and_reads_them_by_id_and_symbol(
    run: Path, mouse: AnnData
) -> None:
    processor = load_processor(run / "best_model")
    assert all(gene.startswith("ENSMUSG") for gene in processor.genes)
    assert "Mus musculus" in (run / "README.md").read_text()
    assert json.loads((run / "split.json").read_text())["source"]["organism"] == "mus_musculus"
    by_id, by_symbol = mouse.copy(), mouse.copy()
    by_symbol.var_names = list(mouse.var["feature_name"])
    by_symbol.var = by_symbol.var[[]]
    for cells in (by_id, by_symbol):
        embed_anndata(cells, str(run / "best_model"), progress=False)
    np.testing.assert_array_equal(by_id.obsm["X_scgpt"], by_symbol.obsm["X_scgpt"])
    predicted = predict_expression(by_id[:4].copy(), str(run / "best_model"), genes=["Gene3"], progress=False)
    assert np.isfinite(predicted.layers["gep"]).all()


def test_a_mouse_model_refuses_human_cells(run: Path, small_cells: list[AnnData]) -> None:
    with pytest.raises(ValueError, match=r"the data have human genes.*use a model of human cells"):
        embed_anndata(small_cells[0].copy(), str(run / "best_model"), progress=False)


def test_a_human_model_refuses_mouse_cells(
    small_cells: list[AnnData], mouse: AnnData, tmp_path: Path, small_census: Path
) -> None:
    flags = ("--data", str(small_census), "--output_dir", str(tmp_path / "run"), "--num_train_epochs", "1")
    pretrain(parse_settings([*TINY, *flags, "--fit_baselines", "none"]), report=lambda _: None)
    model = str(tmp_path / "run" / "best_model")
    with pytest.raises(ValueError, match=r"the data have mouse genes, e.g. .*ENSMUSG.*use a model of mouse cells"):
        embed_anndata(mouse.copy(), model, progress=False)
    in_capitals = mouse.copy()
    in_capitals.var["feature_name"] = list(small_cells[0].var["feature_name"])  # symbols of human genes
    with pytest.raises(ValueError, match=r"Ensembl ids of mouse genes.*the model is one of human cells"):
        embed_anndata(in_capitals, model, progress=False)
