"""Checkpoints written in the background: the same bytes, as safe as those written in the foreground."""

import json
import logging
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from scgpt_hf.training.fault_tolerance import host_copy
from scgpt_hf.training.fault_tolerance.background import BackgroundSave
from scgpt_hf.training.fault_tolerance.checkpoints import checkpoints_in, newest_valid, verify
from scgpt_hf.training.fault_tolerance.host_copy import HostCopy, available_memory
from tests.support import ROOT
from tests.support.training import EVERY_4, prepare, weights_of

BACKGROUND = ("--save_in_background", "true")
CPU = torch.device("cpu")


def content_of(checkpoint: Path) -> dict[str, object]:
    """Return the bytes of all files of a checkpoint; of the trainer's state, what does not depend on the clock."""
    files = {
        path.relative_to(checkpoint).as_posix(): path.read_bytes() for path in checkpoint.rglob("*") if path.is_file()
    }
    del files["manifest.json"]  # verified; it has the hashes of the others
    state = json.loads(files.pop("trainer_state.json"))
    clock = ("seconds", "_per_second", "waiting_share")
    history = [{k: v for k, v in line.items() if not k.endswith(clock)} for line in state.pop("log_history")]
    return {**files, "history": history, "state": state | {"best_model_checkpoint": None}}


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--optim", "muon", "--ema_decay", "0.9"),
        ("--input_norm", "domain", "--batch_key", "dataset_id", "--save_steps", "1"),
    ],
    ids=["adamw", "muon and average", "batch norm, every step"],
)
def test_checkpoints_have_the_bytes_of_those_written_in_the_foreground(small_census, tmp_path, monkeypatch, flags):
    copy = HostCopy.fill

    def copy_late(self):
        time.sleep(0.3)  # training goes on as far as it may
        copy(self)

    monkeypatch.setattr(HostCopy, "fill", copy_late)
    trainers = []
    for name, extra in (("foreground", ()), ("background", BACKGROUND)):
        trainer, _, _ = prepare(
            small_census, tmp_path / name, *EVERY_4, "--dropout", "0.1", *flags, *extra, "--max_steps", "8"
        )
        trainer.train()
        trainers.append(trainer)
    expected, found = checkpoints_in(tmp_path / "foreground"), checkpoints_in(tmp_path / "background")
    assert [path.name for path in found] == [path.name for path in expected]
    assert len(found) >= 2
    for path, other in zip(found, expected, strict=True):
        assert verify(path) == verify(other)
        contents = content_of(path), content_of(other)
        assert contents[0].keys() == contents[1].keys()
        assert [name for name in contents[0] if contents[0][name] != contents[1][name]] == []
    for name, weight in weights_of(trainers[0]).items():
        assert torch.equal(weight, trainers[1].model.get_parameter(name)), name
    assert not (tmp_path / "background" / ".unfinished").exists()
    assert not [thread for thread in threading.enumerate() if thread.name == "scgpt-checkpoint"]


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
from scgpt_hf.training.fault_tolerance import checkpoints
from tests.support.training import EVERY_4, prepare

census, folder, moment, threads = sys.argv[1:]
torch.set_num_threads(int(threads))  # as those of the run that resumes, or sums are rounded differently
trainer, _, _ = prepare(Path(census), Path(folder), *EVERY_4, "--dropout", "0.1", "--save_in_background", "true")
module, name = {"writing": (torch, "save"), "completing": (checkpoints, "_replace")}[moment]
original = getattr(module, name)

def kill(content, path, *others):
    if "checkpoint-8" in str(path) and (moment == "completing" or "optimizer" in str(path)):
        if moment == "writing":
            with open(path, "wb") as file:
                file.write(b"half")
        while trainer.state.global_step < 9:  # training goes on meanwhile
            pass
        os.kill(os.getpid(), signal.SIGKILL)
    original(content, path, *others)

setattr(module, name, kill)
trainer.train()
"""


@pytest.mark.parametrize("moment", ["writing", "completing"])
def test_a_run_killed_while_it_writes_resumes_from_the_previous_checkpoint(small_census, tmp_path, moment):
    run, expected = tmp_path / "killed", tmp_path / "uninterrupted"
    command = [sys.executable, "-c", KILLED, str(small_census), str(run), moment, str(torch.get_num_threads())]
    killed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=200)
    assert killed.returncode == -9, killed.stderr[-4000:]
    assert (run / ".unfinished" / "checkpoint-8").is_dir()
    assert newest_valid(run).name == "checkpoint-4"
    flags = (*EVERY_4, "--dropout", "0.1", *BACKGROUND)
    resumed, _, checkpoint = prepare(small_census, run, *flags, "--resume_from_checkpoint", "latest")
    resumed.train(resume_from_checkpoint=checkpoint)
    uninterrupted, _, _ = prepare(small_census, expected, *flags)
    uninterrupted.train()
    for name, weight in weights_of(uninterrupted).items():
        assert torch.equal(weight, resumed.model.get_parameter(name)), name


def test_without_memory_for_a_copy_files_are_written_at_once(small_census, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(host_copy, "available_memory", lambda: 2**29)
    trainer, _, _ = prepare(small_census, tmp_path / "run", *EVERY_4, *BACKGROUND, "--max_steps", "5")
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert "needs 0.0 GB of host memory, 0.5 GB are free" in caplog.text
    assert [verify(path).step for path in checkpoints_in(tmp_path / "run")] == [4, 5]


def test_copies_keep_shared_storage_and_the_values_of_their_moment():
    table = torch.arange(12.0).reshape(3, 4)
    betas = (0.9, 0.99)
    state = {"a": table, "tied": table[1:], "groups": [{"betas": betas, "lr": torch.tensor(0.1)}, {"betas": betas}]}
    copies = HostCopy(CPU)
    places = []
    for round in (0, 1):  # the second copy uses the memory of the first one
        copies.clear()
        copied = copies.add(state)
        copies.fill()
        table += 100
        assert torch.equal(copied["a"], torch.arange(12.0).reshape(3, 4) + 100 * round)
        assert copied["tied"].untyped_storage().data_ptr() == copied["a"].untyped_storage().data_ptr()
        assert torch.equal(copied["tied"], copied["a"][1:])
        assert copied["groups"][0]["betas"] is copied["groups"][1]["betas"] is betas
        places.append(copied["a"].data_ptr())
    assert places[0] == places[1]


def test_an_error_of_the_thread_is_returned_once_and_the_next_checkpoint_is_written():
    save, written = BackgroundSave(CPU), []
    assert save.wait() is None
    save.start(lambda tensors: None, lambda: 1 / 0)
    assert isinstance(save.wait(), ZeroDivisionError)
    assert not save.failed
    weights = torch.zeros(3)
    released = threading.Event()

    def write(copy):
        released.wait()
        written.append(copy)

    save.defer({"weights": weights}, write)
    save.start(lambda tensors: written.append(len(tensors)), lambda: written.append("finished"))
    save.wait_for_copies()
    weights += 1
    released.set()
    assert save.wait() is None
    assert written[0] == 1
    assert torch.equal(written[1]["weights"], torch.zeros(3))
    assert written[2] == "finished"


def test_available_memory_counts_the_limits_of_control_groups(tmp_path, monkeypatch):
    free = available_memory()
    assert free is None or free > 0
    if not Path("/proc/self/cgroup").exists():
        pytest.skip("needs the control groups of Linux")
    for name, text in {
        "memory.max": "5000000",
        "memory.current": "3000000",
        "memory.stat": "inactive_file 1000\n",
    }.items():
        (tmp_path / name).write_text(text)
        (tmp_path / "memory").mkdir(exist_ok=True)
        (tmp_path / "memory" / name).write_text(text)
    monkeypatch.setattr(host_copy, "_CGROUPS", tmp_path)
    assert available_memory() == 2_001_000
