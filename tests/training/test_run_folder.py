"""The run folder: nobody writes over a run, and nothing is left half-written."""

import json
from copy import deepcopy

import pytest
from transformers import TrainerControl, TrainerState

from scgpt_hf.training.fault_tolerance.checkpoints import CheckpointError, Manifest, written_whole
from scgpt_hf.training.fault_tolerance.ranks import Ranks
from scgpt_hf.training.run_folder import (
    MetricsFile,
    claim_run_folder,
    read_lines,
    require_space,
    write_json,
    write_whole,
)


def test_a_new_run_takes_an_absent_or_empty_folder(tmp_path):
    assert claim_run_folder(tmp_path / "new", None) is None
    assert claim_run_folder(tmp_path, None) is None


def test_a_new_run_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(FileExistsError, match="it has no checkpoint; remove it"):
        claim_run_folder(tmp_path, None)


def test_resuming_finds_the_latest_checkpoint_or_says_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        claim_run_folder(tmp_path, "latest")
    for step in (5, 20):
        with written_whole(tmp_path, Manifest(step, 1, [(8, step)]), Ranks(1, 0, 1)) as beside:
            (beside / "model").write_text("weights")
    assert claim_run_folder(tmp_path, "true") == str(tmp_path / "checkpoint-20")
    assert claim_run_folder(tmp_path, str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        claim_run_folder(tmp_path, None)


def test_a_named_checkpoint_must_be_of_the_run_and_what_was_written(tmp_path):
    with pytest.raises(ValueError, match="is no checkpoint of the run"):
        claim_run_folder(tmp_path / "run", str(tmp_path))
    (tmp_path / "checkpoint-5").mkdir()
    with pytest.raises(CheckpointError, match=r"manifest.json is missing.*latest finds the newest valid"):
        claim_run_folder(tmp_path, str(tmp_path / "checkpoint-5"))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_too_little_space_is_said_before_training(tmp_path):
    require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(OSError, match=r"the run needs 1,000,000,000\.00 GB"):
        require_space(tmp_path, 10**18)


def log(metrics: MetricsFile, state: TrainerState, step: int, **values: float) -> None:
    """Log as the trainer does."""
    state.global_step = step
    state.log_history.append({**values, "step": step})
    metrics.on_log(None, state, TrainerControl(), values)


def test_metrics_of_a_resumed_run_are_what_its_checkpoint_knows(tmp_path):
    """What was logged after the checkpoint, of its own step too, is logged again, not twice."""
    metrics, state = MetricsFile(tmp_path), TrainerState()
    log(metrics, state, 1, loss=0.5)
    log(metrics, state, 2, loss=1.0)
    known = deepcopy(state)
    log(metrics, state, 2, eval_loss=9.0)
    log(metrics, state, 3, loss=1.5)
    metrics.on_train_begin(None, known, TrainerControl())
    lines = read_lines(tmp_path / "metrics.jsonl")
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 0.5), (2, 1.0)]
    assert [line["step"] for line in read_lines(tmp_path / "metrics.dropped.jsonl")] == [2, 3]


def test_a_last_line_that_a_crash_cut_off_is_left_out_and_seconds_go_on(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "seconds": 60.0}\n{"step": 2, "sec')
    assert read_lines(path) == [{"step": 1, "seconds": 60.0}]
    metrics, state = MetricsFile(tmp_path), TrainerState(log_history=[{"seconds": 60.0, "step": 1}])
    metrics.on_train_begin(None, state, TrainerControl())
    assert not (tmp_path / "metrics.dropped.jsonl").exists()
    log(metrics, state, 2)
    assert 60 <= read_lines(path)[-1]["seconds"] < 70
    assert state.log_history[-1] == read_lines(path)[-1]


@pytest.mark.parametrize("line", ["junk", "{}", "[]", "3", "[" * 100_000])
def test_a_line_that_is_none_is_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 2}\n')
    with pytest.raises(ValueError, match=f"line 2 of {path} is no JSON object with a step"):
        read_lines(path)


def test_write_whole_replaces(tmp_path):
    for text in ("one", "two"):
        write_whole(tmp_path / "file", text)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["two"]
