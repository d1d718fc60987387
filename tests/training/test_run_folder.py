"""The run folder: no run overwrites another one, and no file is left incomplete."""

import fcntl
import json
from copy import deepcopy

import pytest
from transformers import TrainerControl, TrainerState

from scgpt_hf.pretraining import pretrain
from scgpt_hf.publishing.record import read_metrics
from scgpt_hf.training.fault_tolerance.checkpoints import CheckpointError, Manifest, write_checkpoint
from scgpt_hf.training.fault_tolerance.ranks import Ranks
from scgpt_hf.training.finetuning.annotate import finetune_classifier
from scgpt_hf.training.finetuning.integrate import finetune_integration
from scgpt_hf.training.finetuning.settings import AnnotateSettings, IntegrateSettings
from scgpt_hf.training.run_folder import (
    MetricsFile,
    list_results,
    require_new_folder,
    require_space,
    resolve_checkpoint,
    write_json,
)
from scgpt_hf.training.settings_parsing import parse_settings
from tests.support.training import TINY


def test_a_new_run_accepts_an_absent_or_empty_folder(tmp_path):
    assert resolve_checkpoint(tmp_path / "new", None) is None
    assert resolve_checkpoint(tmp_path, None) is None


def test_a_new_run_rejects_a_folder_that_is_not_empty(tmp_path):
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(FileExistsError, match="it has no checkpoint; remove it"):
        resolve_checkpoint(tmp_path, None)


def test_a_new_run_never_recommends_removing_what_is_no_run(tmp_path):
    data = tmp_path / "cells.h5ad"
    data.write_text("data")
    for path, found in ((data, "is a file, not a run folder"), (tmp_path, r"holds no run, but e.g. \['cells.h5ad'\]")):
        for option in ("--output_dir", "--out"):
            with pytest.raises(FileExistsError, match=rf"{found}; name a new folder with {option}") as raised:
                require_new_folder(path, option)
            assert "remove" not in str(raised.value)


def test_the_list_of_results_names_the_files_that_exist(tmp_path):
    for name in ("report.html", "summary.json", "loss.png"):
        (tmp_path / name).touch()
    assert list_results(tmp_path) == f"Everything is in {tmp_path}: report.html summary.json loss.png"


def test_resuming_finds_the_newest_checkpoint_or_raises(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        resolve_checkpoint(tmp_path, "latest")
    for step in (5, 20):
        with write_checkpoint(tmp_path, Manifest(step, 1, [(8, step)]), Ranks(1, 0, 1)) as beside:
            (beside / "model").write_text("weights")
    assert resolve_checkpoint(tmp_path, "true") == str(tmp_path / "checkpoint-20")
    assert resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        resolve_checkpoint(tmp_path, None)


def test_a_job_that_is_started_again_continues_or_starts(tmp_path):
    run = tmp_path / "run"
    assert resolve_checkpoint(run, "auto") is None
    run.mkdir()
    (run / "split.json").touch()  # the run was killed before its first checkpoint
    assert resolve_checkpoint(run, "auto") is None
    with write_checkpoint(run, Manifest(5, 1, [(8, 5)]), Ranks(1, 0, 1)) as beside:
        (beside / "model").write_text("weights")
    assert resolve_checkpoint(run, "auto") == str(run / "checkpoint-5")
    (run / "checkpoint-5" / "model").write_text("damaged")
    with pytest.raises(FileNotFoundError, match="no checkpoint to resume from"):  # it is not trained again unasked
        resolve_checkpoint(run, "auto")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "cells.h5ad").touch()
    with pytest.raises(FileExistsError, match="holds no run"):
        resolve_checkpoint(tmp_path / "other", "auto")


def test_a_named_checkpoint_must_belong_to_the_run_and_be_valid(tmp_path):
    with pytest.raises(ValueError, match="is not a checkpoint of the run"):
        resolve_checkpoint(tmp_path / "run", str(tmp_path))
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        resolve_checkpoint(tmp_path, str(tmp_path / "checkpoint-5"))


def test_content_that_is_no_json_leaves_the_old_file(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_too_little_disk_space_raises(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OSError, match=r"the run needs 1,000,000,000\.00 GB"):
        require_space(tmp_path, 10**18)


def log(metrics: MetricsFile, state: TrainerState, step: int, **values: float) -> None:
    """Log like the trainer."""
    state.global_step = step
    state.log_history.append({**values, "epoch": step / 10, "step": step})
    metrics.on_log(None, state, TrainerControl(), values)


def test_metrics_of_a_resumed_run_are_those_of_its_checkpoint(tmp_path):
    """Lines after the checkpoint, and lines of its step that it lacks, are moved to another file."""
    metrics, state = MetricsFile(tmp_path), TrainerState()
    log(metrics, state, 1, loss=0.5)
    log(metrics, state, 2, loss=1.0)
    known = deepcopy(state)
    log(metrics, state, 2, eval_loss=9.0)
    log(metrics, state, 3, loss=1.5)
    metrics.on_train_begin(None, known, TrainerControl())
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0)]
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.dropped.jsonl")] == [2, 3]


def test_an_incomplete_last_line_is_left_out_and_the_seconds_continue(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "epoch": 0.1, "seconds": 60.0}\n{"step": 2, "epo')
    metrics, state = MetricsFile(tmp_path), TrainerState(log_history=[{"step": 1, "epoch": 0.1, "seconds": 60.0}])
    metrics.on_train_begin(None, state, TrainerControl())
    assert not (tmp_path / "metrics.dropped.jsonl").exists()
    log(metrics, state, 2)
    assert 60 <= read_metrics(path)[-1]["seconds"] < 70
    assert state.log_history[-1] == read_metrics(path)[-1]


def test_a_second_run_in_the_same_folder_raises_before_it_writes_anything(tmp_path):
    settings = parse_settings([*TINY, "--output_dir", str(tmp_path / "run")], "test")
    tuning = {"model": "no model", "out": str(tmp_path / "run")}
    runs = (
        lambda: pretrain(settings),
        lambda: finetune_classifier([], AnnotateSettings(**tuning, labels_key="cell_type")),
        lambda: finetune_integration([], IntegrateSettings(**tuning, batch_key="assay")),
    )
    with (tmp_path / ".run.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for run in runs:
            with pytest.raises(FileExistsError, match=r"another process is writing .*run; wait until it has finished"):
                run()
    assert not (tmp_path / "run").exists()
