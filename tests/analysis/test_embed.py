"""One vector per cell, the same wherever and with whomever the cell is met."""

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

from scgpt_hf.analysis import embed, inference
from scgpt_hf.analysis.embed import embed_anndata, embed_cells, umap_of
from scgpt_hf.analysis.embed_file import embed_file
from scgpt_hf.cells import h5ad
from scgpt_hf.cells.h5ad.reader import H5adSource
from scgpt_hf.cells.source import open_source
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining, ScGPTModel
from scgpt_hf.pipeline.genes import match_columns
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "embed.py"
N_CELLS, N_GENES, N_KNOWN = 50, 40, 30
IDS = [f"ENSG{number:011}" for number in range(N_GENES)]
QUIET: embed.EmbedSettings = {"progress": False}


def some_cells() -> AnnData:
    """50 cells whose counts are full of ties; nearly all express more of the 30 known genes than 11 tokens hold."""
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
    """The slow way: one padded cell at a time, through the processor that any user calls."""
    midpoint = ScGPTProcessor.from_genes(processor.genes, max_tokens=processor.max_tokens, ties="midpoint")
    adata = some_cells()
    with torch.inference_mode():
        vectors = [model(**midpoint(adata[cell].copy())).cell_embedding for cell in range(N_CELLS)]
    return torch.nn.functional.normalize(torch.cat(vectors), dim=-1).numpy()


@settings(deadline=None, max_examples=15)
@given(cell_ids=st.lists(st.integers(0, N_CELLS - 1), unique=True), batch_size=st.integers(1, 60))
def test_a_vector_belongs_to_its_cell_in_any_order_batch_and_company(
    cell_ids: list[int], batch_size: int, model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    source = open_source(some_cells(), primary_only=False)
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
def test_the_way_counts_are_stored_changes_nothing(
    change: Any, model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    adata = change(some_cells())
    embed_anndata(adata, model, processor, **QUIET)
    np.testing.assert_allclose(adata.obsm["X_scgpt"], expected, atol=2e-6)


def test_a_part_of_the_cells_is_embedded_as_in_the_whole(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    part = some_cells()[33:].copy()  # rows are numbered anew, and genes are sampled in nearly every cell
    embed_anndata(part, model, processor, **QUIET)
    np.testing.assert_allclose(part.obsm["X_scgpt"], expected[33:], atol=2e-6)


def test_blocks_are_small_and_do_not_show(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = H5adSource(some_cells(), primary_only=False)
    read, sizes = source.read, []

    def watched(cell_ids: Any, columns: Any) -> Any:
        sizes.append(len(cell_ids))
        return read(cell_ids, columns)

    monkeypatch.setattr(inference, "CHUNK_SIZE", 16)
    monkeypatch.setattr(source, "read", watched)
    embedding = embed_cells(source, np.arange(N_CELLS), model, processor, batch_size=8, **QUIET)
    assert sizes == [16, 16, 16, 2]
    np.testing.assert_allclose(embedding, expected, atol=2e-6)


def test_a_file_four_times_as_long_takes_no_more_memory(
    model: ScGPTModel, processor: ScGPTProcessor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "CHUNK_SIZE", 128)
    monkeypatch.setattr(h5ad, "LOOK", 128)
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

    peak(1)  # whatever is kept for good, such as imports
    once, four_times = peak(1), peak(4)
    assert four_times < once + counts.nbytes  # the files differ by three times that, and by their indices


def test_a_model_in_training_is_used_without_dropout_and_goes_on_training(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    adata = some_cells()
    model.train()
    try:
        embed_anndata(adata, model, processor, **QUIET)
        assert model.training
    finally:
        model.eval()
    np.testing.assert_allclose(adata.obsm["X_scgpt"], expected, atol=2e-6)


def test_lengths_are_one_unless_told_otherwise(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray
) -> None:
    adata = some_cells()
    embed_anndata(adata, model, processor, key="X_long", normalize=False, **QUIET)
    lengths = np.linalg.norm(adata.obsm["X_long"], axis=1, keepdims=True)
    assert (np.abs(lengths - 1) > 0.01).any()
    np.testing.assert_allclose(adata.obsm["X_long"] / lengths, expected, atol=2e-6)


def test_a_saved_checkpoint_embeds_and_the_provenance_is_written(saved: Path, expected: np.ndarray) -> None:
    adata = some_cells()
    report = embed_anndata(adata, saved, **QUIET)
    np.testing.assert_allclose(adata.obsm["X_scgpt"], expected, atol=2e-6)
    assert adata.uns["X_scgpt"] == report
    assert report["model"] == str(saved)
    assert (report["cells"], report["empty_cells"], report["normalized"], report["cls_value"]) == (50, 0, True, 0.0)
    assert report["genes"] == {"by_id": 30, "by_symbol": 0, "duplicates": 0, "unknown": 10, "vocabulary": 30}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_file_is_embedded_as_in_memory_and_keeps_all_else(
    in_place: bool, saved: Path, expected: np.ndarray, tmp_path: Path
) -> None:
    adata = some_cells()
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
    embed_anndata(backed, saved, key="X_again", **QUIET)
    np.testing.assert_allclose(backed.obsm["X_again"], expected, atol=2e-6)
    backed.file.close()


def test_genes_are_found_by_id_then_by_symbol_and_each_gene_once() -> None:
    genes = pd.DataFrame(
        [("ENSG00000000001.4", "A"), ("x1", "TP53"), ("x2", "TP53"), ("x3", "CD3D"), ("CD3D", "other"), ("x4", "none")],
        columns=["feature_id", "feature_name"],
    )
    processor = ScGPTProcessor.from_genes(["ENSG00000000001", "CD3D", "TP53", "LYZ"])
    gene_ids, coverage = match_columns(genes, processor)
    assert gene_ids.tolist() == [0, 2, -1, -1, 1, -1]
    assert coverage == {"by_id": 2, "by_symbol": 1, "duplicates": 2, "unknown": 1, "vocabulary": 4}


def test_a_symbol_the_model_knows_finds_its_gene_once() -> None:
    genes = pd.DataFrame(
        [("CD3D", "CD3D"), ("x1", "LYZ"), ("ENSG2", "LYZ"), ("x2", "TP53"), ("x3", "TP53"), ("TP53", "none")],
        columns=["feature_id", "feature_name"],
    )
    processor = ScGPTProcessor.from_genes(["ENSG1", "ENSG2", "ENSG3"], symbols=["CD3D", "LYZ", "TP53"])
    gene_ids, coverage = match_columns(genes, processor)
    assert gene_ids.tolist() == [0, -1, 1, 2, -1, -1]
    assert coverage == {"by_id": 1, "by_symbol": 2, "duplicates": 2, "unknown": 1, "vocabulary": 3}


def test_empty_cells_raise_with_their_number_and_ids_or_become_nan(
    model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray, tmp_path: Path
) -> None:
    adata = some_cells()
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


def test_an_embedding_that_exists_is_refused_unless_told(model: ScGPTModel, processor: ScGPTProcessor) -> None:
    adata = some_cells()
    adata.obsm["X_scgpt"] = np.zeros((N_CELLS, 1))
    with pytest.raises(ValueError, match="obsm has a 'X_scgpt' already"):
        embed_anndata(adata, model, processor, **QUIET)
    embed_anndata(adata, model, processor, overwrite=True, **QUIET)
    assert adata.obsm["X_scgpt"].shape == (N_CELLS, 16)


def test_a_file_that_cannot_be_embedded_leaves_nothing_behind(
    model: ScGPTModel, processor: ScGPTProcessor, tmp_path: Path
) -> None:
    adata = some_cells()
    counts = adata.X.toarray()
    counts[40] = 0
    adata.X = csr_matrix(counts)
    adata.obsm["X_pca"] = counts[:, :2]
    adata.write_h5ad(tmp_path / "cells.h5ad")
    (tmp_path / "out.h5ad").write_text("precious")
    path, out = tmp_path / "cells.h5ad", tmp_path / "out.h5ad"
    with pytest.raises(FileExistsError, match="exists; choose another name"):
        embed_file(path, out, model, processor, **QUIET)
    with pytest.raises(ValueError, match="obsm has a 'X_pca' already"):
        embed_file(path, tmp_path / "new.h5ad", model, processor, key="X_pca", **QUIET)
    with pytest.raises(ValueError, match="1 of the cells"):
        embed_file(path, out, model, processor, overwrite=True, **QUIET)
    del adata.obsm["X_pca"]
    adata.write_h5ad(damaged := tmp_path / "damaged.h5ad")
    with h5py.File(damaged, "r+") as file:
        del file["obsm"]
        file["obsm"] = 7
    with pytest.raises(ValueError, match=r"cannot read '.*damaged.h5ad' as an .h5ad file"):
        embed_file(damaged, out, model, processor, overwrite=True, **QUIET)
    damaged.unlink()
    assert {path.name for path in tmp_path.iterdir()} == {"cells.h5ad", "out.h5ad"}
    assert out.read_text() == "precious"


def normalised() -> AnnData:
    adata = some_cells()
    adata.layers["counts"] = adata.X.copy()
    adata.X = adata.X.log1p()
    return adata


def of_a_mouse() -> AnnData:
    adata = some_cells()
    adata.var_names = [name.replace("ENSG", "ENSMUSG") for name in adata.var_names]
    return adata


def by_mouse_symbols() -> AnnData:
    adata = some_cells()
    adata.var_names = ["Cd3d", "H2afz", "mt-Nd1", *(f"Gm{number}" for number in range(3, N_GENES))]
    adata.var["feature_name"] = adata.var_names
    return adata


def of_nothing_known() -> AnnData:
    adata = some_cells()
    adata.var_names = [f"peak{number}" for number in range(N_GENES)]
    adata.var["feature_name"] = adata.var_names
    return adata


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (normalised, r"raw counts.*layer='counts'"),
        (of_a_mouse, "mouse genes, e.g. .*ENSMUSG00000000000"),
        (by_mouse_symbols, "mouse genes, e.g. .*'Cd3d'"),
        (of_nothing_known, "only 0 of the 40 genes"),
        (lambda: some_cells()[:0].copy(), "no cells"),
    ],
)
def test_unusable_data_raise(make: Any, message: str, model: ScGPTModel, processor: ScGPTProcessor) -> None:
    with pytest.raises(ValueError, match=message):
        embed_anndata(make(), model, processor, **QUIET)


def test_heads_are_left_out_without_a_word_and_layers_are_not(
    saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    embed.load_encoder(saved)
    assert not caplog.records
    shutil.copytree(saved, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(config.read_text().replace('"num_hidden_layers": 2', '"num_hidden_layers": 1'))
    with pytest.raises(ValueError, match=r"has 12 weights for which .* no place, e.g. \['scgpt.layers.1"):
        embed.load_encoder(tmp_path / "model")


def test_a_layer_is_used_where_asked(model: ScGPTModel, processor: ScGPTProcessor, expected: np.ndarray) -> None:
    adata = normalised()
    assert embed_anndata(adata, model, processor, layer="counts", **QUIET)["layer"] == "counts"
    np.testing.assert_allclose(adata.obsm["X_scgpt"], expected, atol=2e-6)


def test_a_model_needs_its_own_processor(model: ScGPTModel, saved: Path) -> None:
    with pytest.raises(ValueError, match="needs its processor"):
        embed_anndata(some_cells(), model, **QUIET)
    with pytest.raises(ValueError, match="33 genes and special tokens, the processor 34"):
        embed_anndata(some_cells(), model, ScGPTProcessor.from_genes(IDS[:31]), **QUIET)
    bert = BertModel(
        BertConfig(vocab_size=33, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(ValueError, match="a 'bert' model, not one of scgpt"):
        embed_anndata(some_cells(), bert, ScGPTProcessor.from_genes(IDS[:30]), **QUIET)
    with pytest.raises(ValueError, match=r"is the folder of a run; its model is .*best_model"):
        embed_anndata(some_cells(), saved.parent, **QUIET)
    with pytest.raises(FileNotFoundError, match=r"there is no folder runs/mine/best, and a repository .* OWNER/NAME"):
        embed_anndata(some_cells(), "runs/mine/best", **QUIET)


@pytest.mark.slow  # numba compiles for half a minute; test_scripts draws a map in the default run
def test_the_map_is_the_same_for_the_same_seed() -> None:
    embedding = np.random.default_rng(0).normal(size=(40, 8)).astype(np.float32)
    first, again, other = (umap_of(embedding, seed) for seed in (1, 1, 2))
    assert first.shape == (40, 2)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


def test_a_map_of_too_few_cells_or_of_empty_cells_raises() -> None:
    with pytest.raises(ValueError, match="at least 4 cells, found 3"):
        umap_of(np.zeros((3, 8)), 0)
    with pytest.raises(ValueError, match="1 of 5 cells have no finite embedding"):
        umap_of(np.vstack([np.zeros((4, 2)), [[np.nan, 0]]]), 0)


def run_script(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    monkeypatch.setattr(sys, "argv", ["embed.py", *map(str, arguments)])
    runpy.run_path(str(SCRIPT), run_name="__main__")


def test_script_embeds_a_file_and_tells_the_coverage(
    saved: Path,
    expected: np.ndarray,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    normalised().write_h5ad(tmp_path / "cells.h5ad")
    arguments = tmp_path / "cells.h5ad", "--model", saved, "--out", tmp_path / "out.h5ad"
    run_script(monkeypatch, *arguments, "--layer", "counts", "--batch_size", 16, "--device", "cpu")
    told = capsys.readouterr()
    assert "Embedded 50 of 50 cells" in told.out
    assert "30 matched by id" in told.out
    assert "50/50" in told.err
    np.testing.assert_allclose(anndata.read_h5ad(tmp_path / "out.h5ad").obsm["X_scgpt"], expected, atol=2e-6)
    with pytest.raises(SystemExit, match=r"embed\.py: .*out\.h5ad exists"):
        run_script(monkeypatch, *arguments, "--layer", "counts")
    with pytest.raises(SystemExit, match=r"embed\.py: .*layer='counts'"):
        run_script(monkeypatch, *arguments, "--overwrite")


def test_script_help_teaches(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run_script(monkeypatch, "--help")
    told = capsys.readouterr().out
    assert "--model runs/demo/best_model --out embedded.h5ad" in told
    assert 'scanpy.pp.neighbors(adata, use_rep="X_scgpt")' in told
