"""An AnnData in, a folder of scores out: which cells count, baselines on the same cells, transfer, and bad input."""

import json
import runpy
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.analysis.evaluation.baseline_embeddings import (
    BASELINES,
    LOGISTIC,
    PCA,
    SCVI,
    log_normalize,
    principal_components,
    scvi_embedding,
    variable_genes,
)
from scgpt_hf.analysis.evaluation.evaluate import METRICS, TRANSFER, Evaluation, evaluate_embeddings
from scgpt_hf.analysis.evaluation.metrics import NotComputable
from scgpt_hf.analysis.evaluation.scored_cells import KEPT_PER_LABEL, choose_scored, sample_cells
from scgpt_hf.reporting import evaluation_results
from scgpt_hf.reporting.evaluation_results import tabulate, write_evaluation
from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "evaluate.py"
QUIET = {"progress": False}


def labelled_cells(small_cells: list[AnnData], which: int = 0) -> AnnData:
    """150 or so cells of four types with an embedding that shows the type, one unlabelled, one alone of its label."""
    adata = small_cells[which].copy()
    types = adata.obs["cell_type"].astype("category").cat.codes.to_numpy()
    noise = np.random.default_rng(which).normal(size=(adata.n_obs, 50))  # as wide as PCA
    adata.obsm["X_scgpt"] = (noise + 6 * np.eye(50)[types]).astype(np.float32)
    names = adata.obs["cell_type"].astype(object).to_numpy()
    names[0], names[1] = "unknown", "alone"
    adata.obs["cell_type"] = names
    return adata


@pytest.fixture(scope="module")
def evaluation(small_cells: list[AnnData]) -> Evaluation:
    reference = labelled_cells(small_cells, 1)
    reference.obs["cell_type"] = reference.obs["cell_type"].astype(object).replace("NK cell", "another")
    cells = labelled_cells(small_cells)
    return evaluate_embeddings(cells, ["X_scgpt"], "cell_type", "donor_id", reference=reference, **QUIET)


def test_every_metric_of_every_method_has_a_value_or_a_reason(evaluation: Evaluation) -> None:
    assert list(evaluation.methods) == ["X_scgpt", PCA, LOGISTIC]
    for scores in evaluation.methods.values():
        assert {*scores.values, *scores.reasons} == {*METRICS, "bio", "batch", "total"}
        assert not set(scores.values) & set(scores.reasons)
    table = tabulate(evaluation)
    assert (table["value"].notna() ^ (table["reason"] != "")).all()
    assert evaluation.methods["X_scgpt"].reasons == {}


def test_logistic_regression_is_scored_as_the_classifier_it_is(evaluation: Evaluation) -> None:
    assert set(evaluation.methods[LOGISTIC].values) == {"linear probe macro-F1", "transfer linear probe macro-F1"}
    assert evaluation.methods[LOGISTIC].reasons["NMI"] == "does not apply to this method"


def test_cells_left_out_are_counted(evaluation: Evaluation) -> None:
    assert evaluation.cells.left_out == {"without a label": 1, "alone of their label": 1}
    assert len(evaluation.cells.rows) == 158
    assert evaluation.methods["X_scgpt"].predictions[TRANSFER[0]].left_out.keys() == {"NK cell"}


def test_a_good_embedding_is_seen_to_be_good(evaluation: Evaluation) -> None:
    scores = evaluation.methods["X_scgpt"].values
    assert scores["linear probe macro-F1"] > 0.9
    assert scores["transfer kNN macro-F1"] > 0.9


def test_the_folder_is_whole_and_says_everything(evaluation: Evaluation, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation_results, "umap_of", lambda embedding, seed: embedding[:, :2])
    write_evaluation(evaluation, tmp_path / "scores", vector=["svg"], extra={"data": "cells.h5ad"})
    names = {path.name for path in (tmp_path / "scores").iterdir()}
    assert names >= {"scores.csv", "scores.json", "scores.png", "scores.svg", "f1.png", "umap-x-scgpt-label.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    record = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert record["data"] == "cells.h5ad"
    assert record["methods"]["X_scgpt"]["scores"] == evaluation.methods["X_scgpt"].values
    assert all((tmp_path / "scores" / figure["file"]).is_file() for figure in record["figures"])
    table = pd.read_csv(tmp_path / "scores" / "scores.csv")
    assert set(table.columns) == {"method", "metric", "value", "reason"}
    with pytest.raises(FileExistsError, match="exists and is not empty; name a new folder"):
        write_evaluation(evaluation, tmp_path / "scores")


def test_a_failed_write_leaves_nothing(evaluation: Evaluation, tmp_path: Path, monkeypatch) -> None:
    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_results, "save_figure", no_space)
    with pytest.raises(OSError, match="No space left"):
        write_evaluation(evaluation, tmp_path / "scores")
    assert list(tmp_path.iterdir()) == []


def test_one_batch_is_reported_or_an_error_if_asked_for_by_name(small_cells: list[AnnData]) -> None:
    cells = labelled_cells(small_cells)
    cells.obs["batch"] = "one"
    arguments = (cells, ["X_scgpt"], "cell_type", "batch")
    with pytest.raises(
        NotComputable, match="iLISI is not computable: it compares several, and there is one batch alone: 'one'"
    ):
        evaluate_embeddings(*arguments, metrics=["iLISI"], baselines=[], **QUIET)


def test_one_label_is_reported_with_its_cause(small_cells: list[AnnData]) -> None:
    cells = labelled_cells(small_cells)
    cells.obs["cell_type"] = "blood"
    done = evaluate_embeddings(cells, ["X_scgpt"], "cell_type", "cell_type", baselines=[], **QUIET)
    reasons = done.methods["X_scgpt"].reasons
    assert reasons["NMI"] == "it compares several, and there is one label alone: 'blood'"
    assert reasons["bio"] == "needs NMI and ARI and ASW label and cLISI"
    assert set(done.methods["X_scgpt"].values) == {"graph connectivity"}


def broken(small_cells: list[AnnData], how: str) -> AnnData:
    cells = labelled_cells(small_cells)
    if how == "empty":
        return cells[:0].copy()
    if how == "not finite":
        cells.obsm["X_scgpt"][5, 0] = np.nan
    if how == "no batch":
        cells.obs.loc[cells.obs.index[:3], "donor_id"] = None
    if how == "all alone":
        cells.obs["cell_type"] = cells.obs_names.to_numpy()
    if how == "normalised":
        cells.X = csr_matrix(cells.X) * 0.5
    return cells


@pytest.mark.parametrize(
    ("how", "arguments", "message"),
    [
        ("empty", (["X_scgpt"], "cell_type", "donor_id"), "the AnnData is empty: it has no cells"),
        ("", (["X_pca"], "cell_type", "donor_id"), r"obsm has no 'X_pca'; it has \['X_scgpt'\]"),
        ("", (["X_scgpt"], "type", "donor_id"), "obs has no column 'type'"),
        ("not finite", (["X_scgpt"], "cell_type", "donor_id"), r"obsm\['X_scgpt'\]: 1 of 158 cells have no finite"),
        ("no batch", (["X_scgpt"], "cell_type", "donor_id"), "3 of 160 cells have no 'donor_id'"),
        ("all alone", (["X_scgpt"], "cell_type", "donor_id"), "no label of 'cell_type' has two cells: 160 of 160"),
        ("normalised", (["X_scgpt"], "cell_type", "donor_id"), "expected raw counts"),
    ],
)
def test_bad_input_raises(small_cells: list[AnnData], how: str, arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_embeddings(broken(small_cells, how), *arguments, **QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["AMI"]}, "no metric is called 'AMI'; expected some of"),
        ({"baselines": ["PCA"]}, "no baseline is called 'PCA'; expected some of"),
        ({"metrics": [TRANSFER[0]]}, "'transfer kNN macro-F1' needs a reference"),
    ],
)
def test_unknown_names_raise(small_cells: list[AnnData], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_embeddings(labelled_cells(small_cells), ["X_scgpt"], "cell_type", "donor_id", **settings, **QUIET)


def test_reference_and_query_without_a_common_type_are_told_apart(small_cells: list[AnnData]) -> None:
    cells, reference = labelled_cells(small_cells), labelled_cells(small_cells, 1)
    reference.obs["cell_type"] = [f"{name} (reference)" for name in reference.obs["cell_type"]]
    done = evaluate_embeddings(
        cells, ["X_scgpt"], "cell_type", "donor_id", reference=reference, baselines=[], **QUIET
    ).methods["X_scgpt"]  # fmt: skip
    assert "share no type" in done.reasons[TRANSFER[0]]
    reference.var_names = [f"gene {n}" for n in range(reference.n_vars)]
    with pytest.raises(ValueError, match="share no gene"):
        evaluate_embeddings(cells, ["X_scgpt"], "cell_type", "donor_id", reference=reference, **QUIET)


@settings(deadline=None, max_examples=20)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz")), min_size=70, max_size=300), st.integers(0, 9)
)
def test_a_sample_keeps_rare_labels_and_gives_each_stratum_its_share(cells: list[tuple[str, str]], seed: int) -> None:
    labels, batches = map(np.array, zip(*cells, strict=True))
    chosen = sample_cells(labels, batches, 65, seed)
    assert len(chosen) == 65
    assert (np.diff(chosen) > 0).all()
    assert (chosen == sample_cells(labels, batches, 65, seed)).all()
    for label in set(labels):
        assert (labels[chosen] == label).sum() >= min(KEPT_PER_LABEL, (labels == label).sum())


def test_a_large_set_is_sampled_in_proportion() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice(["common", "some", "rare"], 120_000, p=[0.8, 0.1999, 0.0001])
    batches = rng.choice(["x", "y"], 120_000, p=[0.7, 0.3])
    adata = AnnData(obs=pd.DataFrame({"label": labels, "batch": batches}, index=np.arange(120_000).astype(str)))
    adata.obsm["X"] = rng.normal(size=(120_000, 2)).astype(np.float32)
    cells = choose_scored(adata, ["X"], "label", "batch")
    assert len(cells.rows) == 50_000
    assert cells.left_out == {"beyond a sample of 50,000": 70_000}
    assert (cells.embeddings["X"] == adata.obsm["X"][cells.rows]).all()
    assert (cells.labels == "rare").sum() == (labels == "rare").sum()
    for label, batch in (("common", "x"), ("common", "y"), ("some", "x"), ("some", "y")):
        whole = ((labels == label) & (batches == batch)).mean()
        assert ((cells.labels == label) & (cells.batches == batch)).mean() == pytest.approx(whole, rel=0.01)
    with pytest.raises(ValueError, match="no room for 20 cells of each label"):
        sample_cells(labels, batches, 30, 0)


def test_variable_genes_leave_out_what_only_small_batches_show(small_cells: list[AnnData]) -> None:
    normalized = log_normalize(small_cells[0].X)
    assert np.allclose(np.expm1(normalized.toarray()).sum(axis=1), 1e4, rtol=1e-4)
    batches = np.array(["big"] * 80 + ["other"] * 78 + ["tiny"] * 2)
    genes = variable_genes(normalized, batches, 30)
    assert len(genes) == 30
    assert (np.diff(genes) > 0).all()
    assert len(variable_genes(normalized, np.arange(160).astype(str), 30)) == 30
    assert len(variable_genes(normalized, batches)) == len(np.flatnonzero(normalized.getnnz(axis=0)))
    with pytest.raises(ValueError, match="no gene is expressed in these 3 cells"):
        variable_genes(csr_matrix((3, 5), dtype=np.float32), np.array(["a"] * 3))


def test_a_query_is_projected_as_the_reference_is() -> None:
    features = np.random.default_rng(0).normal(size=(30, 8))
    components, projected = principal_components(features, 0, features[:5])
    assert components.shape == (30, 7)
    assert np.allclose(components[:5], projected, atol=1e-5)
    with pytest.raises(ValueError, match=r"at least two cells and two genes, found \(1, 8\)"):
        principal_components(features[:1], 0)


def test_a_missing_scvi_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scvi", None)
    with pytest.raises(ModuleNotFoundError, match=r'the baseline scVI needs: pip install "scgpt_hf\[scvi\]"'):
        scvi_embedding(csr_matrix((3, 4)), np.array(["a", "a", "b"]), 0)
    assert SCVI in BASELINES


@pytest.mark.slow
def test_scvi_gives_each_cell_ten_numbers_and_the_same_again(small_cells: list[AnnData]) -> None:
    pytest.importorskip("scvi")
    counts, batches = small_cells[0].X, small_cells[0].obs["donor_id"].to_numpy(str)
    first, again = (scvi_embedding(counts, batches, 1, max_epochs=2, enable_progress_bar=False) for _ in range(2))
    assert first.shape == (160, 10)
    assert np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)


def test_the_script_scores_a_file_prints_and_writes_a_page(
    small_cells: list[AnnData], tmp_path: Path, monkeypatch, capsys
) -> None:
    labelled_cells(small_cells).write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["--embedding", "X_scgpt", "--metrics", "kNN macro-F1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "cells.h5ad"), *arguments])
    monkeypatch.setattr(evaluation_results, "umap_of", lambda embedding, seed: embedding[:, :2])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    said = capsys.readouterr().out
    assert "kNN macro-F1" in said
    assert "158 cells scored; left out: {'without a label': 1, 'alone of their label': 1}" in said
    assert (tmp_path / "out" / "report.html").is_file()
    with pytest.raises(SystemExit, match="exists and is not empty"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert anndata.read_h5ad(tmp_path / "cells.h5ad").n_obs == 160
    monkeypatch.setattr(sys, "argv", ["evaluate.py", __file__, *arguments[:-1], str(tmp_path / "other")])
    with pytest.raises(SystemExit, match=r"evaluate\.py: cannot read '.*test_evaluation\.py' as an \.h5ad file"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
