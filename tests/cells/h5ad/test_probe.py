"""Files that kill the HDF5 library, or keep it for ever, are refused; all else is left to the reader."""

import signal
import subprocess

import h5py
import numpy as np
import pytest

from scgpt_hf.analysis.annotate_file import open_backed
from scgpt_hf.cells.h5ad import probe
from scgpt_hf.cells.h5ad.probe import require_readable
from scgpt_hf.cells.source import open_source

HEADER = 16  # bytes before the first entry of a heap of HDF5, and of each entry


@pytest.fixture
def path(tmp_path, small_cells):
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    return tmp_path / "cells.h5ad"


@pytest.fixture
def profiled():
    """The signal that ends the child is ignored here, as a profiler may have it."""
    before = signal.signal(signal.SIGPROF, signal.SIG_IGN)
    yield
    signal.signal(signal.SIGPROF, before)


@pytest.mark.usefixtures("profiled")
@pytest.mark.parametrize("read", [open_source, open_backed])
def test_a_file_on_which_hdf5_never_ends_is_refused(path, read, monkeypatch):
    monkeypatch.setattr(probe, "STEP_S", 0.5)
    content = bytearray(path.read_bytes())
    entry = content.index(b"GCOL") + HEADER
    content[entry : entry + HEADER] = bytes(HEADER)  # free space of no length: HDF5 steps over it, and does not move
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot read '.*cells.h5ad' .* the HDF5 library does not come to an end"):
        read(path)
    assert path.read_bytes() == content
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_a_file_on_which_hdf5_crashes_is_refused(path, tmp_path, monkeypatch):
    child = tmp_path / "child.py"
    child.write_text("import os, signal\nprint(1, '/obs', flush=True)\nos.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(probe, "__file__", str(child))
    other = tmp_path / "other.h5ad"
    other.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=r"cannot read '.*other.h5ad' .*: at /obs the HDF5 library dies of SIGSEGV"):
        require_readable([str(path), str(other)])
    child.write_text("raise ImportError('no h5py')")
    with pytest.raises(ChildProcessError, match=r"cannot examine '.*cells.h5ad' .*: ImportError: no h5py"):
        require_readable([str(path)])


def test_a_file_is_walked_once_until_it_changes(path, monkeypatch):
    walks = []
    walk = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: walks.append(args) or walk(*args, **settings))
    for _ in range(2):
        require_readable([str(path)])
    assert len(walks) == 1
    with h5py.File(path, "r+") as file:
        file["more"] = 1
    require_readable([str(path)])
    assert len(walks) == 2


def test_links_that_lead_in_circles_or_nowhere_are_walked(path):
    with h5py.File(path, "r+") as file:
        file["uns/circle"] = file["uns"]
        file["uns/nowhere"] = h5py.SoftLink("/nothing")
        file["uns/outside"] = h5py.ExternalLink("nothing.h5", "/")
        file["uns/numbers"] = h5py.Empty("f4")
        file["uns/texts"] = np.array([["a", "b"]] * 3, dtype=h5py.string_dtype())
    with open_source(path) as source:
        assert len(source.obs())


@pytest.mark.parametrize("name", ["a b.h5ad", "-P.h5ad", "zelle\nß.h5ad", "b\udce4d.h5ad", "'; exit 1.h5ad"])
def test_a_file_may_have_any_name(path, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    path.rename(name)
    steps = []
    walk = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: steps.append(walk(*args, **settings)) or steps[0])
    require_readable([name])
    assert b"0 '/obs/donor_id" in steps[0].stdout


@pytest.mark.parametrize("executable", [None, "", "no/such/python"])
def test_a_python_that_cannot_be_started_is_said(path, monkeypatch, executable):
    monkeypatch.setattr("sys.executable", executable)
    with pytest.raises(ChildProcessError, match=r"cannot examine '.*cells.h5ad' .* starting Python as .* failed"):
        require_readable([str(path)])


def test_what_merely_raises_is_left_to_its_reader(tmp_path):
    (tmp_path / "text.h5ad").write_text("not hdf5")
    require_readable([str(tmp_path / "text.h5ad")])
    with pytest.raises(FileNotFoundError, match=r"none.h5ad"):
        require_readable([str(tmp_path / "none.h5ad")])
