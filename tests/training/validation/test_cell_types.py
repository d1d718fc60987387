"""Watching biology: scores of labelled validation cells beside PCA, in the log, as metric of the best model."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState

from scgpt_hf.cells.source import open_source
from scgpt_hf.inference import embed_cells
from scgpt_hf.pretraining import prepare_run
from scgpt_hf.scoring.embedding_scores import EMBEDDING_SCORES, score_embedding
from scgpt_hf.training.settings_parsing import parse_settings
from scgpt_hf.training.validation.cell_types import CellTypeScorer, select_labelled_cells
from tests.support import ROOT
from tests.support.training import EVERY_4, QUIET, TINY, prepare, read_metrics, weights_of

LABELS = ("--eval_labels", "cell_type", "--validation_fraction", "0.5")
NAMES = [f"eval_{name}" for name in EMBEDDING_SCORES] + [f"eval_pca_{name}" for name in EMBEDDING_SCORES]


@pytest.fixture(scope="module")
def watched(small_census, tmp_path_factory):
    """A run that watches cell types and keeps the model with the best kNN macro-F1."""
    folder = tmp_path_factory.mktemp("run") / "watched"
    flags = [*LABELS, "--metric_for_best_model", "knn_macro_f1", "--load_best_model_at_end", "true"]
    trainer, data_module, _ = prepare(small_census, folder, *flags)
    with pytest.MonkeyPatch.context() as patch:
        lines = []
        patch.setattr(logging.getLogger("scgpt_hf.training.validation.cell_types"), "info", lambda *a: lines.append(a))
        trainer.train()
    return trainer, data_module, folder, [line[0] % line[1:] for line in lines]


def test_every_validation_logs_the_scores_of_model_and_pca_and_the_first_one_its_cost(watched):
    _, _, folder, lines = watched
    validations = [line for line in read_metrics(folder) if "eval_loss" in line]
    assert len(validations) == 2
    assert all(set(NAMES) <= line.keys() for line in validations)
    assert len({line["eval_pca_nmi"] for line in validations}) == 1
    assert validations[0]["eval_asw_label"] != validations[1]["eval_asw_label"]
    (line,) = lines
    assert re.fullmatch(r"cell types: \d+ labelled .* embedded in [\d.]+ s and scored in [\d.]+ s", line)


def test_the_best_model_is_that_of_the_highest_score(watched):
    trainer, _, folder, _ = watched
    assert trainer.args.greater_is_better is True
    validations = [line for line in read_metrics(folder) if "eval_loss" in line]
    assert trainer.state.best_metric == max(line["eval_knn_macro_f1"] for line in validations)


def test_the_scores_are_those_of_the_embedding_that_inference_computes(watched):
    trainer, data_module, _, _ = watched
    cells = trainer.cell_types.cells
    embedding = embed_cells(
        data_module.source, cells.cell_ids, trainer.model, data_module.processor, progress=False, batch_size=64
    )
    expected, _ = score_embedding(embedding, cells, 42)
    found = trainer.score_cell_types(trainer.cell_types)
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=1e-6)


def test_the_scored_cells_are_labelled_ones_of_held_out_donors(watched, small_census):
    trainer, data_module, _, _ = watched
    cells = trainer.cell_types.cells
    obs = data_module.source.obs(["cell_type", "donor_id"]).loc[cells.cell_ids]
    assert set(cells.cell_ids) <= set(data_module.selection.parts["validation"])
    assert (obs["cell_type"].astype(str) == cells.labels).all()
    assert (obs["donor_id"].astype(str) == cells.donors).all()
    assert "unknown" not in cells.labels


def test_two_processes_have_together_the_batches_of_one(watched):
    """The composition of a batch does not depend on the number of processes, so scores are equal to the last bit."""
    _, data_module, _, _ = watched
    cell_ids = data_module.selection.parts["validation"]
    one = data_module.labelled_batches(cell_ids)
    config = data_module._validation_config
    both = []
    try:
        for rank in (0, 1):
            data_module._validation_config = config.__class__(**{**vars(config), "rank": rank, "world_size": 2})
            both.append(data_module.labelled_batches(cell_ids))
    finally:
        data_module._validation_config = config
    merged = [both[step % 2][step // 2] for step in range(len(one))]
    assert len(one) > 1
    for alone, shared in zip(one, merged, strict=True):
        assert alone.keys() == shared.keys()
        assert all(
            torch.equal(alone[key], shared[key]) if isinstance(alone[key], torch.Tensor) else alone[key] == shared[key]
            for key in alone
        )


@pytest.mark.slow
def test_two_processes_report_the_scores_of_one(small_census, tmp_path):
    flags = [*LABELS, "--per_device_eval_batch_size", "16"]
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(Path(__file__).with_name("two_processes.py"))]
    done = subprocess.run(
        [*command, str(small_census), str(tmp_path / "two"), *flags],
        **{"env": env, "capture_output": True, "text": True, "timeout": 280},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"')))
    trainer, _, _ = prepare(small_census, tmp_path / "one", *flags)
    expected = trainer.evaluate()
    assert {name: found[name] for name in NAMES} == {name: expected[name] for name in NAMES}


def test_watching_leaves_the_training_as_it_was_and_a_resumed_run_continues_exactly(small_census, tmp_path):
    def train(name, *flags, stop=None):
        trainer, _, checkpoint = prepare(small_census, tmp_path / name, *EVERY_4, *LABELS[2:], *flags)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, read_metrics(tmp_path / name)

    plain, _ = train("plain", "--seed", "3")
    watched, lines = train("watched", "--seed", "3", *LABELS[:2])
    assert all(torch.equal(weight, weights_of(watched)[name]) for name, weight in weights_of(plain).items())
    later = [path for path in (tmp_path / "watched").glob("checkpoint-*") if not path.name.endswith("-4")]
    for path in later:
        path.rename(tmp_path / path.name)
    resumed, lines_of_resumed = train("watched", "--seed", "3", *LABELS[:2], "--resume_from_checkpoint", "latest")
    assert all(torch.equal(weight, weights_of(watched)[name]) for name, weight in weights_of(resumed).items())
    assert lines_of_resumed == lines


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--eval_labels", "type"), "obs has no column 'type'; name another one with --eval_labels"),
        (("--eval_labels", "suspension_type"), "fewer than two values of 'suspension_type' have two validation cells"),
        (("--eval_labels", "cell_type", *QUIET), "eval_labels has no effect with eval_strategy 'no'"),
        (("--metric_for_best_model", "nmi"), "metric_for_best_model is 'nmi'; validation measures"),
    ],
)
def test_settings_that_cannot_be_used_raise(small_census, tmp_path, flags, message):
    with pytest.raises(ValueError, match=message):
        prepare(small_census, tmp_path / "run", *flags)


def test_a_missing_library_raises_before_data_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr("scgpt_hf.training.validation.cell_types.find_spec", lambda name: None)
    settings = parse_settings([*TINY, "--data", "no such data", "--eval_labels", "cell_type"], "test")
    with pytest.raises(ValueError, match=r'pip install "scgpt_hf\[metrics\]"'):
        prepare_run(settings)


def test_many_labels_are_sampled_within_the_limit(monkeypatch, small_census, tmp_path):
    monkeypatch.setattr("scgpt_hf.training.validation.cell_types.MAX_CELLS", 20)
    settings = parse_settings([*TINY, "--data", str(small_census), *LABELS], "test")
    run = prepare_run(settings)
    cells = select_labelled_cells(run.source, run.selection, settings)
    assert len(cells.cell_ids) == 20
    assert set(np.unique(cells.labels, return_counts=True)[1] >= 2) == {True}
    assert open_source(small_census).obs(["cell_type"])["cell_type"].nunique() == len(set(cells.labels))


def test_an_embedding_that_is_not_finite_or_has_collapsed_raises(watched):
    trainer, _, _, _ = watched
    PartialState()
    good = trainer.cell_types
    ids = torch.from_numpy(good.cells.cell_ids)
    batches = [{"cell_ids": ids, "values": torch.zeros(len(ids))}]
    scorer = CellTypeScorer(good.cells, batches, 1, good.pca_scores, 42)
    with pytest.raises(ValueError, match="NaN or infinity in their embedding"):
        scorer.score(lambda batch: torch.full((len(ids), 4), torch.nan))
    rng = np.random.default_rng(0)
    found = scorer.score(lambda batch: torch.from_numpy(rng.normal(size=(len(ids), 4)).astype(np.float32)))
    assert set(found) == set(scorer.names)
    assert json.dumps(found)
