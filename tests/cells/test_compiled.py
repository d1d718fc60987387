"""Compiled functions work, and are cached if possible, where neither the package nor HOME is writable."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

# Uses a copy of the package; prints how many functions were read from the cache and how many were compiled.
SCRIPT = """
import sys
import numpy as np
from scgpt_hf.cells.cache import shards
from scgpt_hf.cells.soma import build, chunks
from scgpt_hf.cells.soma.native import reader
from scgpt_hf.tokens import sampling_scgpt

assert build.__file__.startswith(sys.argv[1])
assert build._moments(np.array([0, 2]), np.array([1.0, 3.0]))[0] == 4
assert sampling_scgpt.random_word(np.uint64(1234567), 0) == 6457827717110365317
modules = (shards, build, chunks, reader, sampling_scgpt)
stats = [function.stats for module in modules for function in vars(module).values() if hasattr(function, "py_func")]
print(sum(found.cache_hits.total() for found in stats), sum(found.cache_misses.total() for found in stats))
"""


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Return the environment of a process that can write neither to the package, even as root, nor to HOME."""
    package = tmp_path / "installed" / "scgpt_hf"
    shutil.copytree(ROOT / "scgpt_hf", package, ignore=shutil.ignore_patterns("__pycache__"))
    for folder in (package, *(path for path in package.rglob("*") if path.is_dir())):
        (folder / "__pycache__").write_text("a file where numba expects a folder")
        folder.chmod(0o555)
    home = tmp_path / "home"
    home.write_text("a file")
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    folders = {"HOME": home, "XDG_CACHE_HOME": home, "PYTHONPATH": package.parent, "TMPDIR": temporary}
    return os.environ | {name: str(path) for name, path in folders.items()} | {"NUMBA_CACHE_DIR": ""}


def run(environment: dict[str, str]) -> tuple[int, int, str]:
    """Run the script; return how many functions were read from the cache, how many compiled, and the log."""
    command = [sys.executable, "-c", SCRIPT, environment["PYTHONPATH"]]
    done = subprocess.run(command, cwd=environment["PYTHONPATH"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    n_read, n_compiled = map(int, done.stdout.split())
    return n_read, n_compiled, done.stderr


def test_functions_are_compiled_once_where_package_and_home_are_not_writable(environment: dict[str, str]) -> None:
    n_read, n_compiled, _ = run(environment)
    assert n_read == 0
    assert n_compiled >= 2
    n_read, n_compiled, _ = run(environment)
    assert n_read >= 2
    assert n_compiled == 0
    assert list(Path(environment["TMPDIR"], f"scgpt_hf-numba-{os.getuid()}").rglob("*.nbi"))


def test_functions_work_without_a_cache_if_others_can_write_to_the_temporary_folder(
    environment: dict[str, str],
) -> None:
    folder = Path(environment["TMPDIR"], f"scgpt_hf-numba-{os.getuid()}")
    folder.mkdir()
    folder.chmod(0o777)  # numba would unpickle files of other users
    n_read, _, log = run(environment)
    assert n_read == 0
    assert log.count("set NUMBA_CACHE_DIR") == 1
    assert not list(folder.iterdir())
