"""Test that the vector of a cell depends on its content alone: not on order, batch, file or storage."""

import runpy
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import anndata
import h5py
import numpy as np
import pandas as pd
import pytest
import torch
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix
from transformers import BertConfig, BertModel

from scgpt_hf import inference
from scgpt_hf.analysis.embed import embed_anndata, umap_of
from scgpt_hf.analysis.embed_file import embed_file
from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.cells.source import open_source
from scgpt_hf.inference import EmbedSettings, embed_cells
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining, ScGPTModel
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "embed.py"
N_CELLS, N_GENES, N_KNOWN = 50, 40, 30
IDS = [f"ENSG{number:011}" for number in range(N_GENES)]
QUIET: EmbedSettings = {"progress": False}


def make_cells() -> AnnData:
    """Make 50 cells with many ties; nearly all express more of the 30 known genes than 11 tokens hold."""
    counts = np.random.default_rng(0).poisson(1.5, (N_CELLS, N_GENES)).astype(np.float32)
    counts[:, 0] = 1
    var = pd.DataFrame({"feature_name": [f"GENE{number}" for number in range(N_GENES)]}, index=IDS)
    obs = pd.DataFrame({"is_primary_data": [False] * N_CELLS}, index=[f"cell{number}" for number in range(N_CELLS)])
    return AnnData(csr_matrix(counts), obs=obs, var=var)


@pytest.fixture(scope="module")
def processor() -> ScGPTProcessor:
    return ScGPTProcessor.from_genes(IDS[:N_KNOWN], max_tokens=12)


@pytest.fixture(scope="module")
def model(processor: ScGPTProcessor) -> ScGPTModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}
    config = ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes)
    return ScGPTModel(config).eval()


@pytest.fixture(scope="module")
def saved(model: ScGPTModel, processor: ScGPTProcessor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "best_model"
    pretraining = ScGPTForPreTraining(model.config)
    pretraining.base_model.load_state_dict(model.state_dict())
    pretraining.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def expected(model: ScGPTModel, processor: ScGPTProcessor) -> np.ndarray:
    """Embed one padded cell at a time, through the processor that any user calls."""
    midpoint = ScGPTProcessor.from_genes(processor.genes, max_tokens=processor.max_tokens, ties="midpoint")
    adata = make_cells()
    with torch.inference_mode():
        vectors = [model(**midpoint(adata[cell].copy())).cell_embedding for cell in range(N_CELLS)]
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1).numpy()


@settings(deadline=None, max_examples=15)
@given(cell_ids=st.lists(st.integers(0, N_CELLS - 1), unique=True), batch_size=st.integers(1, 60))
def test_a_vector_does_not_depend_on_the_order_the_batch_or_the_other_cells(
    cell_ids: list[int], batch_size: int, model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    source = open_source(make_cells(), primary_only=False)
    ids = np.array(cell_ids, np.int64)
    embedding = embed_cells(source, ids, model, processor, batch_size=batch_size, **QUIET)
    assert embedding.dtype == np.float32
    np.testing.assert_allclose(embedding, expected[ids], atol=2e-6)


@pytest.mark.parametrize(
    "change",
    [
        lambda adata: adata[:, np.random.default_rng(1).permutation(N_GENES)].copy(),
        lambda adata: AnnData(adata.X.astype(np.int64), obs=adata.obs, var=adata.var),
        lambda adata: AnnData(adata.X.toarray(), obs=adata.obs, var=adata.var),
        lambda adata: AnnData(adata.X, obs=adata.obs, var=adata.var.set_index("feature_name").assign(gene_ids=IDS)),
    ],
    ids=["columns moved", "integers", "dense", "ids in a column"],
)
def test_a_vector_does_not_depend_on_how_counts_are_stored(
    change: Any, model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    adata = change(make_cells())
    embed_anndata(adata, model, processor, **QUIET)
    np.testing.assert_allclose(adata.obsm["X_scgpt"], expected, atol=2e-6)


def test_a_part_of_the_cells_is_embedded_as_with_all_cells(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    part = make_cells()[33:].copy()  # cells get other row numbers, and genes are sampled in nearly every cell
    embed_anndata(part, model, processor, **QUIET)
    np.testing.assert_allclose(part.obsm["X_scgpt"], expected[33:], atol=2e-6)


def test_windows_are_small_and_do_not_change_the_result(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = AnnDataSource(make_cells(), primary_only=False)
    read, sizes = source.read, []

    def record_size(cell_ids: Any, columns: Any) -> Any:
        sizes.append(len(cell_ids))
        return read(cell_ids, columns)

    monkeypatch.setattr(inference, "CHUNK_SIZE", 16)
    monkeypatch.setattr(source, "read", record_size)
    embedding = embed_cells(source, np.arange(N_CELLS), model, processor, batch_size=8, **QUIET)
    assert sizes == [16, 16, 16, 2]
    np.testing.assert_allclose(embedding, expected, atol=2e-6)


@pytest.mark.slow
def test_memory_does_not_grow_with_the_length_of_a_file(
    model: ScGPTModel, processor: ScGPTProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "CHUNK_SIZE", 128)
    counts = np.random.default_rng(0).poisson(3, (512, 500)).astype(np.float32)
    counts[:, 0] = 1
    var = pd.DataFrame(index=[f"ENSG{number:011}" for number in range(500)])

    def peak(n_times: int) -> int:
        AnnData(csr_matrix(np.tile(counts, (n_times, 1))), var=var).write_h5ad(tmp_path / "cells.h5ad")
        tracemalloc.start()
        try:
            embed_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", model, processor, overwrite=True, **QUIET)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(2)  # allocates what the process keeps, such as imported modules
    short, long = peak(2), peak(8)
    assert long < short + 2 * counts.nbytes  # the files differ by six times that, and by their indices


def test_a_model_in_training_mode_is_used_without_dropout_and_stays_in_training_mode(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    adata = make_cells()
    model.train()
    try:
        embed_anndata(adata, model, processor, **QUIET)
        assert model.training
    finally:
        model.eval()
    np.testing.assert_allclose(adata.obsm["X_scgpt"], expected, atol=2e-6)


def test_vectors_have_length_one_unless_configured_otherwise(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    adata = make_cells()
    embed_anndata(adata, model, processor, key_added="X_long", normalize=False, **QUIET)
    lengths = np.linalg.norm(adata.obsm["X_long"], axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.01).any()
    np.testing.assert_allclose(adata.obsm["X_long"] / lengths, expected, atol=2e-6)


def test_a_saved_checkpoint_embeds_and_the_report_is_written(saved: Path, expected: np.ndarray) -> None:
    adata = make_cells()
    report = embed_anndata(adata, saved, **QUIET)
    np.testing.assert_allclose(adata.obsm["X_scgpt"], expected, atol=2e-6)
    assert adata.uns["X_scgpt"] == report
    assert report["model"] == str(saved)
    assert (report["cells"], report["empty_cells"], report["normalized"], report["cls_value"]) == (50, 0, True, 0.0)
    assert report["genes"] == {"by_id": 30, "by_symbol": 0, "duplicates": 0, "unknown": 10, "vocabulary": 30}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_is_embedded_as_in_memory_and_keeps_its_other_contents(
    in_place: bool, saved: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    adata = make_cells()
    adata.uns["kept"] = "yes"
    adata.write_h5ad(tmp_path / "cells.h5ad")
    out = tmp_path / ("cells.h5ad" if in_place else "out.h5ad")
    report = embed_file(tmp_path / "cells.h5ad", out, saved, overwrite=in_place, batch_size=7, **QUIET)
    found = anndata.read_h5ad(out)
    np.testing.assert_allclose(found.obsm["X_scgpt"], expected, atol=2e-6)
    assert found.uns["X_scgpt"]["genes"] == report["genes"]
    assert found.uns["kept"] == "yes"
    assert (found.X != adata.X).nnz == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", out.name}
    backed = anndata.read_h5ad(out, backed="r")
    embed_anndata(backed, saved, key_added="X_again", **QUIET)
    np.testing.assert_allclose(backed.obsm["X_again"], expected, atol=2e-6)
    backed.file.close()


def test_empty_cells_raise_an_error_that_lists_them_or_become_nan(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray, tmp_path: Path
) -> None:
    adata = make_cells()
    counts = adata.X.toarray()
    counts[[3, 9], :N_KNOWN] = 0
    adata.X = csr_matrix(counts)
    with pytest.raises(ValueError, match=r"2 of the cells 0 to 49 express no gene .* first ids: \[3, 9\]"):
        embed_anndata(adata, model, processor, **QUIET)
    assert not adata.obsm
    adata.write_h5ad(tmp_path / "cells.h5ad")
    written = embed_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", model, processor, empty="nan", **QUIET)
    report = embed_anndata(adata, model, processor, empty="nan", **QUIET)
    assert report["empty_cells"] == written["empty_cells"] == 2
    others = np.setdiff1d(np.arange(N_CELLS), [3, 9])
    for embedding in (adata.obsm["X_scgpt"], anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scgpt"]):
        assert np.isnan(embedding[[3, 9]]).all()
        np.testing.assert_allclose(embedding[others], expected[others], atol=2e-6)


def test_an_embedding_is_replaced_only_with_overwrite(model: ScGPTModel, processor: ScGPTProcessor) -> None:
    adata = make_cells()
    adata.obsm["X_scgpt"] = np.zeros((N_CELLS, 1))
    with pytest.raises(ValueError, match="'X_scgpt' already"):
        embed_anndata(adata, model, processor, **QUIET)
    embed_anndata(adata, model, processor, overwrite=True, **QUIET)
    assert adata.obsm["X_scgpt"].shape == (N_CELLS, 16)


def test_a_view_of_a_backed_file_raises_before_it_is_embedded(tmp_path: Path) -> None:
    make_cells().write_h5ad(tmp_path / "cells.h5ad")
    backed = anndata.read_h5ad(tmp_path / "cells.h5ad", backed="r")
    with pytest.raises(ValueError, match=r"a view of .*cells\.h5ad.*to_memory"):
        embed_anndata(backed[:10], "no/model", **QUIET)
    backed.file.close()
    with pytest.raises(ValueError, match="'a/b' cannot be the name"):
        embed_anndata(make_cells(), "no/model", key_added="a/b", **QUIET)


def test_vectors_are_kept_beside_a_file_that_cannot_be_completed(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray, tmp_path: Path
) -> None:
    adata = make_cells()
    adata.write_h5ad(tmp_path / "cells.h5ad")
    with h5py.File(tmp_path / "cells.h5ad", "r+") as file:
        del file["uns"]
        file["uns"] = 1.0  # an array, to which no report can be added
    with pytest.raises(OSError, match=r"could not be written: .* are in .*unsaved"):
        embed_file(tmp_path / "cells.h5ad", tmp_path / "out.h5ad", model, processor, **QUIET)
    (kept,) = tmp_path.glob("out.h5ad.unsaved-*")
    np.testing.assert_allclose(np.load(kept / "obsm-X_scgpt.npy"), expected, atol=2e-6)
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", kept.name}


def test_a_file_that_cannot_be_embedded_leaves_nothing_behind(
    model: ScGPTModel, processor: ScGPTProcessor, tmp_path: Path
) -> None:
    adata = make_cells()
    counts = adata.X.toarray()
    counts[40] = 0
    adata.X = csr_matrix(counts)
    adata.obsm["X_pca"] = counts[:, :2]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "out.h5ad").write_text("previous")
    path, out = tmp_path / "cells.h5ad", tmp_path / "out.h5ad"
    with pytest.raises(FileExistsError, match="out"):
        embed_file(path, out, model, processor, **QUIET)
    with pytest.raises(ValueError, match="X_pca"):
        embed_file(path, tmp_path / "new.h5ad", model, processor, key_added="X_pca", **QUIET)
    with pytest.raises(ValueError, match=r"first ids: \[40\]"):
        embed_file(path, out, model, processor, overwrite=True, **QUIET)
    del adata.obsm["X_pca"]
    adata.write_h5ad(damaged := tmp_path / "damaged.h5ad")
    with h5py.File(damaged, "r+") as file:
        del file["obsm"]
        file["obsm"] = 7
    with pytest.raises(ValueError, match="damaged"):
        embed_file(damaged, out, model, processor, overwrite=True, **QUIET)
    damaged.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "out.h5ad"}
    assert out.read_text() == "previous"


def make_normalized() -> AnnData:
    adata = make_cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    return adata


def make_normalized_with_two_layers() -> AnnData:
    adata = make_normalized()
    adata.layers["umi"] = adata.layers["counts"].copy()
    return adata


def make_mouse_cells() -> AnnData:
    adata = make_cells()
    adata.var_names = [name.replace("ENSG", "ENSMUSG") for name in adata.var_names]
    return adata


def make_cells_of_unknown_genes() -> AnnData:
    adata = make_cells()
    adata.var_names = [f"peak{number}" for number in range(N_GENES)]
    adata.var["feature_name"] = adata.var_names
    return adata


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (make_normalized_with_two_layers, r"layer='counts'"),
        (make_mouse_cells, "ENSMUSG00000000000"),
        (make_cells_of_unknown_genes, "0 of the 40 genes"),
        (lambda: make_cells()[:0].copy(), "no cells"),
    ],
)
def test_unusable_data_raise_an_error(make: Any, message: str, model: ScGPTModel, processor: ScGPTProcessor) -> None:
    with pytest.raises(ValueError, match=message):
        embed_anndata(make(), model, processor, **QUIET)


def test_a_checkpoint_loads_without_its_heads_but_not_without_some_layers(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_model(saved)
    assert not caplog.records
    shutil.copytree(saved, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(ValueError, match=r"12 weights .*scgpt.layers.1"):
        load_model(tmp_path / "model")


def test_counts_are_read_from_the_requested_layer(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    adata = make_normalized()
    for layer in ("counts", None):  # it is also found
        assert embed_anndata(adata, model, processor, layer=layer, overwrite=True, **QUIET)["layer"] == "counts"
    np.testing.assert_allclose(adata.obsm["X_scgpt"], expected, atol=2e-6)


def test_a_model_that_cannot_be_used_raises_an_error(model: ScGPTModel, saved: Path) -> None:
    with pytest.raises(ValueError, match="needs its processor"):
        embed_anndata(make_cells(), model, **QUIET)
    with pytest.raises(ValueError, match=r"33 genes .* 34"):
        embed_anndata(make_cells(), model, ScGPTProcessor.from_genes(IDS[:31]), **QUIET)
    bert = BertModel(
        BertConfig(vocab_size=33, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ValueError, match="'bert'"):
        embed_anndata(make_cells(), bert, ScGPTProcessor.from_genes(IDS[:30]), **QUIET)
    with pytest.raises(ValueError, match="best_model"):
        embed_anndata(make_cells(), saved.parent, **QUIET)
    with pytest.raises(FileNotFoundError, match="runs/mine/best"):
        embed_anndata(make_cells(), "runs/mine/best", **QUIET)


@pytest.mark.slow  # numba compiles for half a minute; test_scripts computes a UMAP in the default run
def test_the_same_seed_gives_the_same_umap() -> None:
    embedding = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    first, again, other = (umap_of(embedding, seed) for seed in (1, 1, 2))
    assert first.shape == (40, 2)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_umap_of_too_few_cells_or_of_empty_cells_raises() -> None:
    with pytest.raises(ValueError, match="at least 4 cells, found 3"):
        umap_of(np.zeros((3, 8)), 0)
    with pytest.raises(ValueError, match="1 of 5 cells"):
        umap_of(np.vstack([np.zeros((4, 2)), [[np.nan, 0]]]), 0)


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_embeds_a_file_and_prints_how_many_genes_were_matched(
    saved: Path,
    expected: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    make_normalized().write_h5ad(tmp_path / "cells.h5ad")
    arguments = tmp_path / "cells.h5ad", "--model", saved, "--out", tmp_path / "out.h5ad"
    run_script(monkeypatch, *arguments, "--layer", "counts", "--batch_size", 16, "--device", "cpu")
    printed = capsys.readouterr()
    assert "Embedded 50 of 50 cells" in printed.out
    assert "30 matched by id" in printed.out
    np.testing.assert_allclose(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scgpt"], expected, atol=2e-6)
    with pytest.raises(SystemExit, match=r"embed\.py: .*out\.h5ad exists"):
        run_script(monkeypatch, *arguments, "--layer", "counts")


def test_the_help_of_the_script_shows_how_to_go_on_in_scanpy(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "--help")
    printed = capsys.readouterr().out
    assert "--model runs/demo/best_model --out embedded.h5ad" in printed
    assert 'scanpy.pp.neighbors(adata, use_rep="X_scgpt")' in printed
