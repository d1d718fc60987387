"""Resuming raises unless the checkpoint is complete and the data, order, masks and tokens are those of the run."""

import hashlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest

from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.training.fault_tolerance.checkpoints import checkpoints_in
from scgpt_hf.training.fault_tolerance.losses import load_losses, losses_path
from scgpt_hf.training.fault_tolerance.resume import require_resumable
from tests.support.training import prepare

FLAGS = ("--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "no", "--load_best_model_at_end", "false")


@pytest.fixture(scope="module")
def run(small_census, tmp_path_factory):
    folder = tmp_path_factory.mktemp("resuming") / "run"
    trainer, _, _ = prepare(small_census, folder, *FLAGS, "--max_steps", "4")
    trainer.train()
    return folder


@pytest.fixture
def copied(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "run"))


def resume(census, folder, *flags):
    flags = (*FLAGS, "--max_steps", "6", "--resume_from_checkpoint", "latest", *flags)
    trainer, _, checkpoint = prepare(census, folder, *flags)
    trainer.train(resume_from_checkpoint=checkpoint)


def forge(checkpoint, name, content):
    """Put other content into a file of a checkpoint, or remove it, so that the manifest agrees."""
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    (checkpoint / name).unlink()
    del manifest["files"][name]
    if content is not None:
        (checkpoint / name).write_bytes(content)
        manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


class Malicious:
    def __init__(self, witness):
        self.witness = witness

    def __reduce__(self):
        return os.mkdir, (str(self.witness),)


@pytest.mark.parametrize("content", [None, b"", b"junk", b"[]", "pickle"])
@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "losses_0.json"],
)
def test_a_forged_checkpoint_is_rejected_and_runs_no_code(small_census, copied, tmp_path, name, content):
    if content == "pickle":
        content = pickle.dumps(Malicious(tmp_path / "executed"))
    forge(copied / "checkpoint-4", name, content)
    with pytest.raises(ValueError, match=r"checkpoint-4\b"):
        resume(small_census, copied)
    assert not (tmp_path / "executed").exists()
    assert [path.name for path in checkpoints_in(copied)] == ["checkpoint-2", "checkpoint-4"]


@pytest.mark.parametrize("change", [{"global_step": 3}, {"log_history": [1]}, {"log_history": [{"step": 9}]}])
def test_a_trainer_state_of_another_step_is_rejected(copied, change):
    state = json.loads((copied / "checkpoint-4" / "trainer_state.json").read_text())
    forge(copied / "checkpoint-4", "trainer_state.json", json.dumps({**state, **change}).encode())
    with pytest.raises(ValueError, match="checkpoint-4"):
        require_resumable(copied / "checkpoint-4")


def test_a_checkpoint_has_the_losses_since_the_last_log_line(run):
    losses = load_losses([losses_path(run / "checkpoint-2", rank=0)])
    assert set(losses.sums) == {"gep", "gepc"}
    assert losses.n_steps == 2


@pytest.mark.parametrize(
    "flags",
    [
        ("--n_bins", "11"),
        ("--max_tokens", "33"),
        ("--ties", "midpoint"),
        ("--cls_value", "-2"),
        ("--input_style", "log1p"),
        ("--mask_ratios", "0.5"),
        ("--seed", "7"),
    ],
)
def test_a_run_cannot_resume_with_other_tokens_or_another_order(small_census, run, flags):
    name = flags[0].removeprefix("--")
    with pytest.raises(ValueError, match=name):
        resume(small_census, run, *flags)


def test_data_whose_donors_have_moved_to_other_cells_are_rejected(small_census, run, monkeypatch):
    def reversed_obs(self, columns=()):
        obs = original(self, columns)
        return obs.assign(**{column: obs[column].to_numpy()[::-1] for column in columns})

    original = CensusSource.obs
    monkeypatch.setattr(CensusSource, "obs", reversed_obs)
    with pytest.raises(ValueError, match=r"'train' belonged to the donors \['donor_"):
        resume(small_census, run)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda split: split["parts"].pop("validation"), "validation"),
        (
            lambda split: split["parts"]["train"].update(cell_ranges=[[1000, 1010]], n_cells=10),
            "not in the data any more",
        ),
        (lambda split: split["source"].update(genes=["nothing"]), r"genes .*nothing"),
        (lambda split: split["source"].update(steps=5), "'steps'"),
        (lambda split: split["source"].update(tokens=[]), "'tokens'"),
        (lambda split: split["source"].update(paths=5), "'paths'"),
    ],
)
def test_a_split_that_does_not_fit_the_data_is_rejected(small_census, copied, change, message):
    split = json.loads((copied / "split.json").read_text())
    change(split)
    (copied / "split.json").write_text(json.dumps(split))
    with pytest.raises(ValueError, match=message):
        resume(small_census, copied)


def test_deeply_nested_json_is_rejected_like_other_malformed_files(small_census, copied):
    (copied / "checkpoint-4" / "manifest.json").write_text("[" * 100_000)
    (copied / "split.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match=r"split\.json is not JSON"):
        resume(small_census, copied)
