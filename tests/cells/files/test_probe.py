"""Files on which the HDF5 library crashes or hangs raise; all other files are left to the reader."""

import signal
import subprocess

import h5py
import numpy as np
import pytest

from scgpt_hf.cells.files import probe
from scgpt_hf.cells.files.contents import open_anndata
from scgpt_hf.cells.files.probe import require_readable
from scgpt_hf.cells.source import open_source

HEADER = 16  # bytes before the first entry of a heap of HDF5, and of each entry


@pytest.fixture
def path(tmp_path, small_cells):
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def profiled():
    """Ignore the signal that ends the child process, as a profiler may do."""
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.fixture
def children(monkeypatch):
    """The results of the child processes that were run."""
    done, run = [], subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: done.append(run(*args, **settings)) or done[-1])
    return done


@pytest.mark.usefixtures("profiled")
@pytest.mark.parametrize("read", [open_source, open_anndata])
def test_a_file_on_which_hdf5_hangs_raises(path, read, monkeypatch):
    monkeypatch.setattr(probe, "STEP_S", 0.5)
    content = bytearray(path.read_bytes())
    entry = content.index(b"GCOL") + HEADER
    content[entry : entry + HEADER] = bytes(HEADER)  # free space of length 0: HDF5 skips it, and stays where it is
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cells\.h5ad.*does not finish"):
        read(path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_on_which_hdf5_crashes_raises_with_the_place_and_the_signal(path, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text("import os, signal\nprint(1, '/obs', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(probe, "__file__", str(child))
    other = tmp_path / "other.h5ad"
    other.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"other\.h5ad.*/obs.*SIGSEGV"):
        require_readable([str(path), str(other)])


def test_a_child_that_fails_raises_its_error(path, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text("raise ImportError('no h5py')")
    monkeypatch.setattr(probe, "__file__", str(child))
    with pytest.raises(ChildProcessError, match=r"cells\.h5ad.*ImportError: no h5py"):
        require_readable([str(path)])


def test_a_file_is_checked_once_until_it_changes(path, children):
    for _ in range(2):
        require_readable([str(path)])
    assert len(children) == 1
    with h5py.File(path, "r+") as file:
        file["more"] = 1
    require_readable([str(path)])
    assert len(children) == 2


def test_links_may_form_cycles_or_lead_nowhere(path):
    with h5py.File(path, "r+") as file:
        file["uns/circle"] = file["uns"]
        file["uns/nowhere"] = h5py.SoftLink("/nothing")
        file["uns/outside"] = h5py.ExternalLink("nothing.h5", "/")
        file["uns/numbers"] = h5py.Empty("f4")
        file["uns/texts"] = np.array([["a", "b"]] * 3, dtype=h5py.string_dtype())
    with open_source(path) as source:
        assert len(source.obs())


@pytest.mark.parametrize("name", ["a b.h5ad", "-P.h5ad", "zelle\nß.h5ad", "b\udce4d.h5ad", "'; exit 1.h5ad"])
def test_a_file_may_have_any_name(path, tmp_path, monkeypatch, children, name):
    monkeypatch.chdir(tmp_path)
    path.rename(name)
    require_readable([name])
    assert b"0 '/obs/donor_id" in children[0].stdout


@pytest.mark.parametrize("executable", [None, "", "no/such/python"])
def test_a_python_that_cannot_be_started_raises(path, monkeypatch, executable):
    monkeypatch.setattr("sys.executable", executable)
    with pytest.raises(ChildProcessError, match=r"cells\.h5ad.*starting Python"):
        require_readable([str(path)])


def test_files_that_only_raise_exceptions_are_left_to_the_reader(tmp_path):
    (tmp_path / "text.h5ad").write_text("not hdf5")
    require_readable([str(tmp_path / "text.h5ad")])
    with pytest.raises(FileNotFoundError, match=r"none\.h5ad"):
        require_readable([str(tmp_path / "none.h5ad")])
