"""Checkpoints: complete or absent, verified before they are used, and the newest and the best always kept."""

import contextlib
import errno
import json
import logging
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.training.fault_tolerance.checkpoints import (
    MANIFEST,
    CheckpointError,
    Manifest,
    checkpoints_in,
    manifest_of,
    newest_valid,
    prune,
    supersede_later,
    verify,
    write_checkpoint,
)
from scgpt_hf.training.fault_tolerance.ranks import Ranks

ONE_PROCESS = Ranks(1, 0, 1)
FILES = {"model.safetensors": b"weights" * 100, "optimizer.pt": b"moments" * 100, "deep/state.json": b"{}"}


def write(folder, step):
    with write_checkpoint(folder, Manifest(step, 1, [(32, step)]), ONE_PROCESS) as staging:
        assert not (folder / f"checkpoint-{step}").exists() or step == 7
        for name, content in FILES.items():
            (staging / name).parent.mkdir(exist_ok=True)
            (staging / name).write_bytes(content)
    return folder / f"checkpoint-{step}"


def test_a_checkpoint_appears_when_it_is_complete(tmp_path):
    checkpoint = write(tmp_path, 7)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    assert verify(checkpoint) == manifest_of(checkpoint) == Manifest(7, 1, [(32, 7)])
    content = json.loads((checkpoint / MANIFEST).read_text())
    assert content["files"].keys() == FILES.keys()
    assert content["files"]["deep/state.json"]["bytes"] == 2


def test_a_checkpoint_of_the_same_step_is_replaced(tmp_path):
    (write(tmp_path, 7) / "old").touch()
    verify(write(tmp_path, 7))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-7"]
    assert not (tmp_path / "checkpoint-7" / "old").exists()


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["truncated", "changed", "removed"])
def test_a_damaged_checkpoint_is_skipped_with_a_warning_that_names_the_file(tmp_path, caplog, name, damage):
    earlier, latest = write(tmp_path, 5), write(tmp_path, 20)
    path = latest / name
    content = path.read_bytes()
    if damage == "removed":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if damage == "truncated" else content[:-1] + b"#")
    with caplog.at_level(logging.WARNING):
        if name == MANIFEST and damage == "truncated":  # one byte less removes only the newline at the end
            path.write_bytes(content[:-20])
        assert newest_valid(tmp_path) == earlier
    assert str(path) in caplog.text
    with pytest.raises(CheckpointError, match=path.name):
        verify(latest)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_a_manifest_changed_anywhere_is_rejected_or_still_consistent(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    checkpoint = write(folder, 3)
    path = checkpoint / MANIFEST
    content = bytearray(path.read_bytes())
    where = data.draw(st.integers(0, len(content) - 1))
    content[where : where + data.draw(st.integers(0, 30))] = data.draw(st.binary(max_size=20))
    path.write_bytes(content)
    with contextlib.suppress(CheckpointError):
        assert verify(checkpoint).step == sum(n for _, n in verify(checkpoint).history)


@pytest.mark.parametrize(
    "change",
    [
        {"files": {"../../secret": {"bytes": 1, "sha256": ""}}},
        {"files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}},
        {"files": []},
        {"step": "3"},
        {"step": 4},
        {"history": 3},
        {"history": [[32, -3], [32, 6]]},
        {"history": [[0, 3]]},
        {"files": {"a" * 300: {"bytes": 1, "sha256": ""}}},
        {"world_size": 0},
        {"world_size": None},
    ],
)
def test_a_malformed_manifest_is_rejected(tmp_path, change):
    checkpoint = write(tmp_path, 3)
    content = json.loads((checkpoint / MANIFEST).read_text())
    (checkpoint / MANIFEST).write_text(json.dumps(content | change))
    with pytest.raises(CheckpointError, match="malformed"):
        verify(checkpoint)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("file write failed")])
def test_a_full_disk_leaves_existing_checkpoints_unchanged(tmp_path, error):
    earlier = write(tmp_path, 5)

    def write_half():
        with write_checkpoint(tmp_path, Manifest(9, 1, [(32, 9)]), ONE_PROCESS) as staging:
            (staging / "model.safetensors").write_bytes(b"half")
            raise error

    with pytest.raises(OSError, match=r"step 9.*checkpoint-5 is unchanged"):
        write_half()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-5"]
    verify(earlier)


def test_the_error_of_no_valid_checkpoint_lists_the_reasons(tmp_path):
    shutil.rmtree(write(tmp_path, 5) / "deep")
    with pytest.raises(FileNotFoundError, match=r"state\.json is missing"):
        newest_valid(tmp_path)


@settings(deadline=None, max_examples=30)
@given(
    steps=st.sets(st.integers(1, 99), min_size=1, max_size=6),
    limit=st.none() | st.integers(2, 6),
    pick=st.integers(0, 9),
)
def test_pruning_keeps_the_newest_and_the_best(steps, limit, pick, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    for step in steps:
        (folder / f"checkpoint-{step}").mkdir()
    best = sorted(steps)[pick] if pick < len(steps) else None
    prune(folder, limit, best)
    left = {int(path.name.split("-")[1]) for path in checkpoints_in(folder)}
    assert max(steps) in left
    assert best is None or best in left
    assert len(left) == min(len(steps), limit or len(steps))
    others = sorted(steps - {best, max(steps)})
    assert sorted(left - {best, max(steps)}) == others[len(others) - len(left - {best, max(steps)}) :]


def test_symbolic_links_are_replaced_and_never_followed(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-9").symlink_to(tmp_path / "nowhere")
    verify(write(tmp_path / "run", 9))
    elsewhere = write(tmp_path / "elsewhere", 3)
    (tmp_path / "run" / "checkpoint-3").symlink_to(elsewhere)
    write(tmp_path / "run", 6)
    prune(tmp_path / "run", 2, None)
    assert [path.name for path in checkpoints_in(tmp_path / "run")] == ["checkpoint-6", "checkpoint-9"]
    verify(elsewhere)


def test_resuming_from_an_earlier_checkpoint_renames_the_later_ones(tmp_path):
    for step in (5, 10, 20):
        write(tmp_path, step)
    (tmp_path / ".unfinished").mkdir()
    supersede_later(tmp_path, 5)
    assert newest_valid(tmp_path).name == "checkpoint-5"
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint-5",
        "checkpoint-10.superseded",
        "checkpoint-20.superseded",
    }
