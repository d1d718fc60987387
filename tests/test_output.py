"""Test that every command refuses output that cannot be written before it computes, and that results are kept."""

import importlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from scgpt_hf.output import require_writable_file, require_writable_folder, write_beside
from scgpt_hf.training.run_folder import write_atomically
from tests.support import ROOT

COMMANDS: dict[str, list[str]] = {
    "embed": ["DATA", "--model", "no/model", "--out", "OUT"],
    "annotate": ["DATA", "--model", "no/model", "--out", "OUT"],
    "evaluate": ["DATA", "--embedding", "X", "--out", "OUT"],
    "convert": ["no_checkpoint", "--out", "OUT"],
    "build_census": ["DATA", "--out", "OUT"],
    "finetune": ["DATA", "--model", "no/model", "--labels_key", "cell_type", "--out", "OUT"],
    "pretrain": ["--data", "DATA", "--output_dir", "OUT"],
    "cache": ["DATA", "OUT"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_refuses_an_output_below_a_file_before_it_reads_a_model(
    command: str, small_census: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("kept")
    places = {"DATA": str(small_census.parent / "first.h5ad"), "OUT": str(tmp_path / "file" / "out")}
    monkeypatch.setattr(sys, "argv", [command, *(places.get(word, word) for word in COMMANDS[command])])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=rf"cannot write .*{tmp_path / 'file'}.*(is not a folder|no folder)"):
        importlib.import_module(f"scgpt_hf.cli.{command}").main()
    assert (tmp_path / "file").read_text() == "kept"
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


@pytest.mark.parametrize("command", ["embed", "annotate"])
@pytest.mark.parametrize(("out", "message"), [(".", "is a folder; name a file"), ("no/x.h5ad", "no folder no")])
def test_a_command_that_writes_a_file_refuses_a_folder_and_an_absent_folder(
    command: str, out: str, message: str, small_census: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = small_census.parent / "first.h5ad"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [command, str(data), "--model", "no/model", "--out", out, "--overwrite"])
    with pytest.raises(SystemExit, match=message):
        importlib.import_module(f"scgpt_hf.cli.{command}").main()
    assert not list(tmp_path.iterdir())


def test_a_check_leaves_nothing_behind_and_names_the_folder(tmp_path: Path) -> None:
    require_writable_folder(tmp_path / "new" / "folder")
    require_writable_file(tmp_path / "new.h5ad", overwrite=False)
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.h5ad").touch()
    require_writable_file(tmp_path / "old.h5ad", overwrite=True)
    with pytest.raises(FileExistsError, match=r"old\.h5ad exists"):
        require_writable_file(tmp_path / "old.h5ad", overwrite=False)


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs a folder to which nobody can write")
def test_a_folder_that_cannot_be_written_to_raises() -> None:
    with pytest.raises(OSError, match="cannot write to /proc/new: creating a file in /proc failed"):
        require_writable_folder("/proc/new")


def test_results_are_written_beside_the_output_or_else_to_the_temporary_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))

    def write(folder: Path) -> None:
        (folder / "result").write_text("42")

    error = write_beside(tmp_path / "out.h5ad", write, ValueError("the cause"))
    (kept,) = tmp_path.glob("out.h5ad.unsaved-*/result")
    assert str(kept.parent) in str(error)
    assert "the cause" in str(error)
    error = write_beside(tmp_path / "absent" / "out.h5ad", write, ValueError("the cause"))
    (kept,) = (tmp_path / "temporary").glob("out.h5ad.unsaved-*/result")
    assert str(kept.parent) in str(error)

    def fail(folder: Path) -> Any:
        raise TypeError("cannot be written")

    assert "could not be kept either" in str(write_beside(tmp_path / "other", fail, ValueError("the cause")))
    assert not list(tmp_path.rglob("other*"))


def test_an_error_of_writing_names_the_file_and_not_its_temporary_name(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"cannot write {tmp_path / 'absent' / 'report.html'}:"):
        write_atomically(tmp_path / "absent" / "report.html", "text")


def test_commands_are_those_that_write() -> None:
    others = {"check", "inference_arguments", "job_arguments", "process", "publish", "report", "__init__"}
    assert COMMANDS.keys() | others == {path.stem for path in (ROOT / "scgpt_hf" / "cli").glob("*.py")}


@pytest.mark.parametrize("kind", [str, Path])
def test_the_address_of_a_store_is_no_folder(kind):
    with pytest.raises(ValueError, match="it is not on this machine; write to a folder"):
        require_writable_folder(kind("s3://bucket/folder"))
