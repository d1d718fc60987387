"""From a labelled AnnData to a folder of scores: methods, transfer from a reference, errors, and the script."""

import json
import runpy
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from anndata import AnnData
from scipy.sparse import csr_matrix

from scgpt_hf.analysis.evaluation.baseline_embeddings import LOGISTIC, PCA, RANKS
from scgpt_hf.analysis.evaluation.evaluate import METRICS, TRANSFER, Evaluation, evaluate_embeddings
from scgpt_hf.reporting import evaluation_results
from scgpt_hf.reporting.evaluation_results import tabulate, write_evaluation
from scgpt_hf.scoring.metrics import NotComputable
from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "evaluate.py"
QUIET = {"progress": False}
KEYS = (["X_scgpt"], "cell_type", "donor_id")


def labelled_cells(small_cells: list[AnnData], which: int = 0) -> AnnData:
    """About 150 cells of four types whose embedding separates the types.

    One cell has no label, and one is the only cell of its label.
    """
    adata = small_cells[which].copy()
    types = adata.obs["cell_type"].astype("category").cat.codes.to_numpy()
    noise = np.random.default_rng(which).normal(size=(adata.n_obs, 50))  # 50 features, as many as PCA has
    adata.obsm["X_scgpt"] = (noise + 6 * np.eye(50)[types]).astype(np.float32)
    names = adata.obs["cell_type"].astype(object).to_numpy()
    names[0], names[1] = "unknown", "single"
    adata.obs["cell_type"] = names
    return adata


@pytest.fixture(scope="module")
def evaluation(small_cells: list[AnnData]) -> Evaluation:
    """Scores of one embedding and the default baselines; the reference lacks NK cells."""
    reference = labelled_cells(small_cells, 1)
    reference.obs["cell_type"] = reference.obs["cell_type"].astype(object).replace("NK cell", "another")
    return evaluate_embeddings(labelled_cells(small_cells), *KEYS, reference=reference, **QUIET)


def test_every_metric_of_every_method_has_a_value_or_a_reason(evaluation: Evaluation) -> None:
    assert list(evaluation.methods) == ["X_scgpt", PCA, LOGISTIC, RANKS]
    for scores in evaluation.methods.values():
        assert {*scores.values, *scores.reasons} == {*METRICS, "bio", "batch", "total"}
        assert not set(scores.values) & set(scores.reasons)
    table = tabulate(evaluation)
    assert (table["value"].notna() ^ (table["reason"] != "")).all()
    assert evaluation.methods["X_scgpt"].reasons == {}


@pytest.mark.parametrize("method", [LOGISTIC, RANKS])
def test_classifiers_are_scored_as_such_only(evaluation: Evaluation, method: str) -> None:
    assert set(evaluation.methods[method].values) == {"linear probe macro-F1", "transfer linear probe macro-F1"}
    assert evaluation.methods[method].reasons["NMI"] == "does not apply to this method"


def test_cells_that_are_not_scored_are_counted(evaluation: Evaluation) -> None:
    assert evaluation.cells.left_out == {"without a label": 1, "the only cell of their label": 1}
    assert len(evaluation.cells.rows) == 158
    assert evaluation.methods["X_scgpt"].predictions[TRANSFER[0]].left_out.keys() == {"NK cell"}


def test_an_embedding_that_separates_the_types_has_high_scores(evaluation: Evaluation) -> None:
    scores = evaluation.methods["X_scgpt"].values
    assert scores["linear probe macro-F1"] > 0.9
    assert scores["transfer kNN macro-F1"] > 0.9


def test_the_settings_are_recorded_with_their_defaults(evaluation: Evaluation) -> None:
    keys = {"embedding_keys": ["X_scgpt"], "labels_key": "cell_type", "batch_key": "donor_id"}
    assert keys.items() <= evaluation.settings.items()
    assert evaluation.settings["unlabeled_categories"] == ("unknown",)


def test_the_folder_has_scores_and_figures(evaluation: Evaluation, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(evaluation_results, "umap_of", lambda embedding, seed: embedding[:, :2])
    write_evaluation(evaluation, tmp_path / "scores", vector=["svg"], extra={"data": "cells.h5ad"})
    names = {path.name for path in (tmp_path / "scores").iterdir()}
    assert names >= {"scores.csv", "scores.json", "scores.png", "scores.svg", "f1.png", "umap-x-scgpt-label.png"}
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]
    record = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert record["data"] == "cells.h5ad"
    assert record["settings"]["labels_key"] == "cell_type"
    assert record["methods"]["X_scgpt"]["scores"] == evaluation.methods["X_scgpt"].values
    assert all((tmp_path / "scores" / figure["file"]).is_file() for figure in record["figures"])
    table = pd.read_csv(tmp_path / "scores" / "scores.csv")
    assert set(table.columns) == {"method", "metric", "value", "reason"}
    with pytest.raises(OSError, match="exists and is not empty"):
        write_evaluation(evaluation, tmp_path / "scores")


def test_scores_are_kept_beside_a_folder_that_another_process_has_written(
    evaluation: Evaluation, tmp_path: Path, monkeypatch
) -> None:
    def save_slowly(*args: object) -> None:
        (tmp_path / "scores").mkdir(exist_ok=True)
        (tmp_path / "scores" / "kept").write_text("by the other process")

    monkeypatch.setattr(evaluation_results, "umap_of", lambda embedding, seed: embedding[:, :2])
    monkeypatch.setattr(evaluation_results, "save_figure", save_slowly)
    with pytest.raises(OSError, match=r"another process has written .* not lost: they are in .*scores\.unsaved"):
        write_evaluation(evaluation, tmp_path / "scores")
    assert [path.name for path in (tmp_path / "scores").iterdir()] == ["kept"]
    assert len(list(tmp_path.glob("scores.unsaved-*/scores.json"))) == len(list(tmp_path.iterdir())) - 1 == 1


def test_a_failed_write_leaves_the_scores_beside_the_folder(
    evaluation: Evaluation, tmp_path: Path, monkeypatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evaluation_results, "save_figure", fail)
    with pytest.raises(OSError, match=r"No space left .* in .*scores\.unsaved"):
        write_evaluation(evaluation, tmp_path / "scores")
    (kept,) = tmp_path.iterdir()
    assert {path.name for path in kept.iterdir()} == {"scores.csv", "scores.json"}
    pd.testing.assert_frame_equal(
        pd.read_csv(kept / "scores.csv", keep_default_na=False, na_values={"value": ""}), tabulate(evaluation)
    )


def test_a_metric_passed_by_name_raises_if_it_cannot_be_computed(small_cells: list[AnnData]) -> None:
    cells = labelled_cells(small_cells)
    cells.obs["batch"] = "one"
    with pytest.raises(NotComputable) as caught:
        evaluate_embeddings(cells, ["X_scgpt"], "cell_type", "batch", metrics=["iLISI"], baselines=[], **QUIET)
    assert caught.value.metric == "iLISI"


def test_metrics_that_cannot_be_computed_are_reported_by_default(small_cells: list[AnnData]) -> None:
    cells = labelled_cells(small_cells)
    cells.obs["cell_type"] = "blood"
    done = evaluate_embeddings(cells, ["X_scgpt"], "cell_type", "cell_type", baselines=[], **QUIET)
    reasons = done.methods["X_scgpt"].reasons
    assert "'blood'" in reasons["NMI"]
    assert reasons["bio"] == "needs NMI and ARI and ASW label and cLISI"
    assert set(done.methods["X_scgpt"].values) == {"graph connectivity"}


def test_without_scib_metrics_the_other_metrics_are_computed(small_cells: list[AnnData], monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    cells = labelled_cells(small_cells)
    scores = evaluate_embeddings(cells, *KEYS, baselines=[], **QUIET).methods["X_scgpt"]
    assert scores.values["kNN macro-F1"] > 0.5
    assert "scgpt_hf[metrics]" in scores.reasons["NMI"]
    assert "NMI" not in scores.values
    with pytest.raises(ModuleNotFoundError, match="scib_metrics is not installed"):
        evaluate_embeddings(cells, *KEYS, baselines=[], metrics=["NMI"], **QUIET)


def test_baselines_need_raw_counts(small_cells: list[AnnData]) -> None:
    cells = labelled_cells(small_cells)
    cells.X = csr_matrix(cells.X) * 0.5
    with pytest.raises(ValueError, match="expected raw counts"):
        evaluate_embeddings(cells, *KEYS, **QUIET)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"metrics": ["AMI"]}, "unknown metric 'AMI'; expected some of"),
        ({"baselines": ["PCA"]}, "unknown baseline 'PCA'; expected some of"),
        ({"metrics": [TRANSFER[0]]}, "'transfer kNN macro-F1' needs labelled reference cells"),
    ],
)
def test_unknown_names_raise(small_cells: list[AnnData], settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_embeddings(labelled_cells(small_cells), *KEYS, **settings, **QUIET)


def test_transfer_needs_a_common_type(small_cells: list[AnnData]) -> None:
    cells, reference = labelled_cells(small_cells), labelled_cells(small_cells, 1)
    reference.obs["cell_type"] = [f"{name} (reference)" for name in reference.obs["cell_type"]]
    done = evaluate_embeddings(cells, *KEYS, reference=reference, baselines=[], **QUIET)
    assert "no type in common" in done.methods["X_scgpt"].reasons[TRANSFER[0]]


def test_baselines_of_a_transfer_need_a_common_gene(small_cells: list[AnnData]) -> None:
    cells, reference = labelled_cells(small_cells), labelled_cells(small_cells, 1)
    reference.var_names = [f"gene {n}" for n in range(reference.n_vars)]
    with pytest.raises(ValueError, match="no gene in common"):
        evaluate_embeddings(cells, *KEYS, reference=reference, **QUIET)


def test_the_script_scores_a_file_prints_the_scores_and_writes_a_report(
    small_cells: list[AnnData], tmp_path: Path, monkeypatch, capsys
) -> None:
    labelled_cells(small_cells).write_h5ad(tmp_path / "cells.h5ad")
    arguments = ["--embedding", "X_scgpt", "--labels_key", "cell_type", "--batch_key", "donor_id"]
    arguments += ["--metrics", "kNN macro-F1", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", str(tmp_path / "cells.h5ad"), *arguments])
    monkeypatch.setattr(evaluation_results, "umap_of", lambda embedding, seed: embedding[:, :2])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    printed = capsys.readouterr().out
    assert "kNN macro-F1" in printed
    assert "158 cells scored; left out: {'without a label': 1, 'the only cell of their label': 1}" in printed
    assert (tmp_path / "out" / "report.html").is_file()
    assert anndata.read_h5ad(tmp_path / "cells.h5ad").n_obs == 160  # the input is not changed
    with pytest.raises(SystemExit, match="exists and is not empty"):
        runpy.run_path(str(SCRIPT), run_name="__main__")


def test_the_script_stops_at_a_file_that_is_not_h5ad(tmp_path: Path, monkeypatch) -> None:
    arguments = ["--embedding", "X_scgpt", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", __file__, *arguments])
    with pytest.raises(SystemExit, match=r"evaluate\.py: .*test_evaluate\.py"):
        runpy.run_path(str(SCRIPT), run_name="__main__")
