"""The run folder: nobody writes over a run, and nothing is left half-written."""

import json

import pytest
from transformers import TrainerControl, TrainerState

from scgpt_hf.training.run_folder import MetricsFile, claim_run_folder, require_space, write_json, write_whole


def test_a_new_run_takes_an_absent_or_empty_folder(tmp_path):
    assert claim_run_folder(tmp_path / "new", None) is None
    assert claim_run_folder(tmp_path, None) is None


def test_a_new_run_refuses_a_folder_that_holds_something(tmp_path):
    (tmp_path / "split.json").write_text("{}")
    with pytest.raises(FileExistsError, match="--resume_from_checkpoint latest"):
        claim_run_folder(tmp_path, None)


def test_resuming_finds_the_latest_checkpoint_or_says_there_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no checkpoint"):
        claim_run_folder(tmp_path, "latest")
    for step in (5, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
    assert claim_run_folder(tmp_path, "true") == str(tmp_path / "checkpoint-20")
    assert claim_run_folder(tmp_path, str(tmp_path / "checkpoint-5")) == str(tmp_path / "checkpoint-5")
    with pytest.raises(FileNotFoundError, match="has no trainer_state"):
        claim_run_folder(tmp_path, str(tmp_path))


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "summary.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text()) == {"a": 1}


def test_too_little_space_is_said_before_training(tmp_path):
    require_space(tmp_path, 1)
    with pytest.raises(OSError, match=r"the run needs 1,000,000,000\.00 GB"):
        require_space(tmp_path, 10**18)


def test_metrics_of_a_resumed_run_continue_at_its_checkpoint(tmp_path):
    metrics, control = MetricsFile(tmp_path), TrainerControl()
    for step in (1, 2, 3):
        metrics.on_log(None, TrainerState(global_step=step), control, {"loss": step / 2})
    metrics.on_train_begin(None, TrainerState(global_step=2), control)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}]


def test_write_whole_replaces(tmp_path):
    for text in ("one", "two"):
        write_whole(tmp_path / "file", text)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["two"]
