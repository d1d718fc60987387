"""The wheel works where the repository is not: built from the sdist, installed in a fresh environment, and run."""

import os
import subprocess
import sys
import sysconfig
import tarfile
import venv
from pathlib import Path

import pytest

from tests.support import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
SMALL = ["--max_steps", "4", "--hidden_size", "16", "--num_hidden_layers", "1", "--shortcut_steps", "0"]


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "COVERAGE_PROCESS_START")}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env | environment)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of an environment with the wheel; its dependencies are those of the environment of the tests."""
    folder = tmp_path_factory.mktemp("wheel")
    build = "from setuptools import build_meta; import sys; build_meta.build_sdist(sys.argv[1])"
    tracked = run("git", "ls-files", cwd=ROOT).splitlines()
    for name in (name for name in tracked if name.split("/")[0] not in ("tests", "benchmarks", "examples", "docs")):
        (folder / "source" / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / "source" / name).write_bytes((ROOT / name).read_bytes() if (ROOT / name).is_file() else b"")
    run(sys.executable, "-c", build, folder, cwd=folder / "source")
    with tarfile.open(next(folder.glob("*.tar.gz"))) as sdist:
        sdist.extractall(folder, filter="data")
    (unpacked,) = folder.glob("scgpt_hf-*/")
    options = ["--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", str(folder)]
    run(sys.executable, "-m", "pip", "wheel", *options, unpacked, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    venv.create(folder / "env", with_pip=False)
    python = folder / "env" / "bin" / "python"
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "env")}))
    (site / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    run(sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--quiet", wheel, cwd=folder)
    return python.parent


def test_the_wheel_pretrains_embeds_checks_and_converts(installed: Path, tmp_path: Path) -> None:
    python, command = installed / "python", installed / "scgpt-hf"
    where = "import scgpt_hf, pathlib; p = pathlib.Path(scgpt_hf.__file__); print(p, (p.parent / 'py.typed').is_file())"
    assert run(python, "-c", where, cwd=tmp_path).split() == [
        str(next(installed.parent.glob("lib/python*/site-packages/scgpt_hf/__init__.py"))),
        "True",
    ]
    assert "pretrain" in run(command, "--help", cwd=tmp_path)
    assert "blood-300k" in run(command, "pretrain", "--help", cwd=tmp_path)
    launch = [python, "-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "scgpt_hf.cli.pretrain"]
    text = run(*launch, "demo", *SMALL, "--use_cpu", "true", cwd=tmp_path, ACCELERATE_USE_CPU="true")
    assert "Everything is in" in text
    assert "Writing model shards" not in text
    run(python, "-c", "import scgpt_hf; scgpt_hf.demo_cells().write_h5ad('cells.h5ad')", cwd=tmp_path)
    assert "using blood-mini" in run(command, "embed", "cells.h5ad", "--out", "by_default.h5ad", cwd=tmp_path)
    model = ["--model", "runs/demo/best_model"]
    assert "This file will work." in run(command, "check", "cells.h5ad", *model, cwd=tmp_path)
    assert "Embedded 700 of 700" in run(command, "embed", "cells.h5ad", *model, "--out", "out.h5ad", cwd=tmp_path)
    assert (tmp_path / "out.h5ad").is_file()
    assert "scGPT_human" in run(command, "convert", "--help", cwd=tmp_path)
