"""Processes that write the same folder: one of them does, the others wait or raise, and nothing is replaced."""

import threading
from pathlib import Path

import pytest

from scgpt_hf.cells.locking import exclusive, rename_new


def test_a_second_writer_raises_or_waits(tmp_path: Path) -> None:
    target, holds, release, order = tmp_path / "data", threading.Event(), threading.Event(), []

    def write() -> None:
        with exclusive(target):
            holds.set()
            release.wait()
            order.append("first")

    def follow() -> None:
        with exclusive(target, wait=True):
            order.append("second")

    first, second = threading.Thread(target=write), threading.Thread(target=follow)
    first.start()
    holds.wait()
    with pytest.raises(FileExistsError, match=r"another process is writing .*/data; wait until it has finished"):
        exclusive(target).__enter__()
    second.start()
    release.set()
    first.join()
    second.join()
    assert order == ["first", "second"]
    assert not list(tmp_path.iterdir())


def test_one_thread_can_lock_twice_and_a_failed_block_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(KeyError), exclusive(tmp_path / "new" / "data"), exclusive(tmp_path / "new" / "data"):
        raise KeyError
    assert not list(tmp_path.iterdir())


def test_a_folder_without_write_permission_is_used_without_a_lock(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with exclusive(tmp_path / "file" / "data"):  # no lock can be created in a file
        pass


def test_a_rename_does_not_replace_files(tmp_path: Path) -> None:
    for name in ("new", "target", "empty"):
        (tmp_path / name).mkdir()
    (tmp_path / "target" / "kept").write_text("first")
    (tmp_path / "file").write_text("first")
    for name in ("target", "file"):
        with pytest.raises(FileExistsError, match=f"another process has written .*/{name} meanwhile"):
            rename_new(tmp_path / "new", tmp_path / name)
    rename_new(tmp_path / "new", tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "file", "kept", "target"]
