"""A file that is written atomically is the old one or the complete new one, and nothing else stays in its folder."""

import pytest

from scgpt_hf.cells.atomic import replace_file, write_atomically


def test_the_file_is_replaced_by_the_new_text(tmp_path):
    for text in ("old", "new: é"):
        write_atomically(tmp_path / "file", text)
    assert (tmp_path / "file").read_text(encoding="utf-8") == "new: é"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_error_leaves_the_old_file_and_no_temporary_one(tmp_path):
    path, folder = tmp_path / "file", tmp_path / "temporary"
    folder.mkdir()
    path.write_text("old")

    def fail() -> None:
        with replace_file(path, folder=folder) as temporary:
            assert temporary.parent == folder
            temporary.write_text("half of the n")
            raise RuntimeError("interrupted")

    with pytest.raises(RuntimeError, match="interrupted"):
        fail()
    assert path.read_text() == "old"
    assert not list(folder.iterdir())


def test_the_error_of_a_folder_that_does_not_exist_names_the_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="absent/file"):
        write_atomically(tmp_path / "absent" / "file", "text")
