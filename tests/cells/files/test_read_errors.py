"""Files that are not damaged, but locked or of another kind, raise errors that name the cause."""

import fcntl
import gzip
import resource
from pathlib import Path

import h5py
import pytest

from scgpt_hf.cells.files.read_errors import explain_read_error
from scgpt_hf.cells.source import open_source


@pytest.fixture
def path(tmp_path, small_cells):
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


def name_format(path: Path, encoding_version: str) -> None:
    with h5py.File(path, "r+") as file:
        file["obs"].attrs["encoding-version"] = encoding_version


def test_a_file_that_another_program_writes_is_not_called_damaged(path):
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does
        with pytest.raises(BlockingIOError, match=r"cells\.h5ad': another program has the file open") as raised:
            open_source(path)
    assert "damaged" not in str(raised.value)
    assert len(open_source(path).obs())


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [
        (lambda path: path.write_bytes(b""), "an empty file"),
        (lambda path: path.write_bytes(gzip.compress(path.read_bytes())), "a gzip file; decompress"),
        (lambda path: path.write_text("<!DOCTYPE html><html>Not Found"), "web page.*download the file again"),
        (lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n"), "git lfs pull"),
        (lambda path: path.write_bytes(b"\x40\0\0\0\0\0\0\0{}"), "a safetensors file"),
        (lambda path: path.write_bytes(path.read_bytes()[:20_000]), "incomplete: copy or download it again"),
        (lambda path: h5py.File(path, "w").close(), "'var' is missing.*'obs', 'var' and 'X', this file has \\[\\]"),
        (lambda path: name_format(path, "9.9.9"), "update anndata"),
    ],
)
def test_a_file_of_another_kind_is_named(path, spoil, cause):
    spoil(path)
    with pytest.raises(ValueError, match=rf"cells\.h5ad' as an .h5ad file: .*{cause}") as raised:
        open_source(path)
    assert "if it is damaged" not in str(raised.value)


def test_numbers_of_a_type_that_scipy_lacks_are_named(path):
    error = explain_read_error(ValueError("scipy.sparse does not support dtype float16."), str(path), "an .h5ad file")
    assert "float32 or int32" in str(error)
    assert "damaged" not in str(error)


def test_an_error_of_the_system_keeps_its_number(path):
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    open_source(path).close()  # the probe starts a process, and has now seen the file
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
    try:
        with pytest.raises(OSError, match=r"cells\.h5ad.*Too many open files"):
            open_source(path)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
