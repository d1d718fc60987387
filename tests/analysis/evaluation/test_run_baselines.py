"""Baselines of a pretraining run: fitted at its end, read from its folder, shown beside its embedding."""

import html
import json

import anndata
import numpy as np
import pytest
import torch

from scgpt_hf import embed_anndata, parse_settings, pretrain
from scgpt_hf.analysis.evaluation.baseline_embeddings import BASELINES, RANKS, SCVI
from scgpt_hf.analysis.evaluation.evaluate import evaluate_embeddings
from scgpt_hf.analysis.evaluation.run_baselines import (
    COUNT_MLP,
    TRAINING_PCA,
    UNTRAINED,
    available_baselines,
    run_features,
    untrained_model,
)
from scgpt_hf.cells.source import open_source
from scgpt_hf.cli import evaluate as command
from scgpt_hf.reporting import evaluation_results
from scgpt_hf.scoring.fitted_pca import PCA_FILE, FittedPCA
from tests.support.training import TINY

OF_RUN = [TRAINING_PCA, COUNT_MLP, UNTRAINED]


@pytest.fixture(scope="module")
def run(small_census, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    flags = ["--num_train_epochs", "1", "--eval_labels", "cell_type", "--validation_fraction", "0.5", "--seed", "5"]
    pretrain(parse_settings([*TINY, "--data", str(small_census), "--output_dir", str(folder), *flags]))
    return folder


@pytest.fixture(scope="module")
def cells(small_cells, run):
    cells = small_cells[0].copy()
    embed_anndata(cells, run / "best_model", progress=False)
    return cells


def test_a_run_keeps_its_baselines_and_they_are_fitted_to_its_training_cells(run, small_census):
    assert available_baselines(run) == OF_RUN
    pca = FittedPCA.load(run / PCA_FILE)
    source, split = open_source(small_census), json.loads((run / "split.json").read_text())
    genes = source.genes["feature_id"].tolist()
    obs = source.obs(["donor_id"])
    train = obs.index[obs["donor_id"].isin(split["parts"]["train"]["donors"])].to_numpy()
    embedding = pca.transform(source.read(train).counts, genes)
    np.testing.assert_allclose(embedding.mean(axis=0), 0, atol=1e-4)


def test_card_report_and_summary_of_the_run_show_all_its_baselines(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["baseline_scores"].keys() == {COUNT_MLP, UNTRAINED}
    assert summary["best"]["eval_knn_macro_f1"] > 0
    for file in ("README.md", "report.html"):
        text = (run / file).read_text()
        assert all(name in text for name in ("this model", *OF_RUN))


def test_genes_may_be_named_by_symbol(run, cells):
    by_symbol = cells.copy()
    by_symbol.var_names = by_symbol.var["feature_name"].astype(str).to_numpy()
    expected, found = (
        run_features(run, open_source(adata, primary_only=False), np.arange(20), OF_RUN) for adata in (cells, by_symbol)
    )
    for name in OF_RUN:
        np.testing.assert_allclose(found[name], expected[name], atol=1e-4)


def test_the_untrained_model_has_the_weights_that_the_seed_of_the_run_gives(run):
    state = torch.get_rng_state()
    first, second = untrained_model(run), untrained_model(run)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(5)
    expected = type(first)(first.config)
    for name, weight in first.named_parameters():
        assert torch.equal(weight.cpu(), dict(second.named_parameters())[name].cpu())
        assert torch.equal(weight.cpu(), dict(expected.named_parameters())[name])


def test_an_evaluation_shows_every_baseline_and_its_source(run, cells, tmp_path, monkeypatch):
    monkeypatch.setattr(evaluation_results, "umap_of", lambda embedding, seed: embedding[:, :2])
    cells.write_h5ad(tmp_path / "cells.h5ad")
    options = ["--embedding", "X_scgpt", "--run", str(run), "--metrics", "kNN macro-F1", "linear probe macro-F1"]
    command.main([str(tmp_path / "cells.h5ad"), *options, "--out", str(tmp_path / "out")])
    record = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert set(record["methods"]) == {"X_scgpt", *BASELINES} - {SCVI}
    assert record["settings"]["run"] == "run"
    assert set(record["methods"][RANKS]["scores"]) == {"linear probe macro-F1"}
    report = (tmp_path / "out" / "report.html").read_text()
    for name in record["methods"].keys() - {"X_scgpt"}:
        assert html.escape(BASELINES[name].meaning) in report
    assert "arXiv:2602.16696" in report


def test_types_are_transferred_with_the_baselines_of_the_run(run, cells, small_cells):
    reference = small_cells[1].copy()
    embed_anndata(reference, run / "best_model", progress=False)
    found = evaluate_embeddings(
        cells, ["X_scgpt"], "cell_type", "donor_id", reference=reference, run=run,
        baselines=[*OF_RUN, RANKS], metrics=None, progress=False,
    )  # fmt: skip
    for name in OF_RUN:
        assert "transfer kNN macro-F1" in found.methods[name].values
    assert "transfer linear probe macro-F1" in found.methods[RANKS].values


def test_baselines_of_a_run_need_the_run(run, cells, tmp_path):
    keys = (["X_scgpt"], "cell_type", "donor_id")
    with pytest.raises(ValueError, match=r"'untrained model' belongs to a pretraining run; .*--run"):
        evaluate_embeddings(cells, *keys, baselines=[UNTRAINED], progress=False)
    with pytest.raises(ValueError, match="is not the folder of a pretraining run"):
        evaluate_embeddings(cells, *keys, run=tmp_path, progress=False)
    with pytest.raises(ValueError, match="is not the folder of a pretraining run"):
        evaluate_embeddings(cells, *keys, run=run / "best_model", progress=False)


def test_the_input_stays_as_it_was(run, cells):
    before = anndata.AnnData(cells.X.copy(), obs=cells.obs.copy())
    run_features(run, open_source(cells, primary_only=False), np.arange(5), OF_RUN)
    assert (before.X != cells.X).nnz == 0
