"""`scgpt-hf` lists its commands without importing the package, and passes the other arguments on to one of them."""

import subprocess
import sys
import tomllib

import pytest

import scgpt_hf
import scgpt_hf_cli
from scgpt_hf.cells.files.formats import SUPPORTED
from tests.support import ROOT


def test_the_list_of_commands_imports_neither_the_package_nor_torch():
    code = (
        "import sys, scgpt_hf_cli; sys.argv = ['scgpt-hf', '--help']; scgpt_hf_cli.main(); "
        "assert not {'scgpt_hf', 'torch', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = [line.split()[0] for line in done.stdout.splitlines() if line.startswith("  ")]
    assert listed[: len(scgpt_hf_cli.COMMANDS)] == list(scgpt_hf_cli.COMMANDS)


@pytest.mark.parametrize("name", scgpt_hf_cli.COMMANDS)
def test_the_help_of_a_command_shows_its_name_an_example_and_its_options(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scgpt-hf", name, "--help"])
    with pytest.raises(SystemExit) as ended:
        scgpt_hf_cli.main()
    assert not ended.value.code
    text = capsys.readouterr().out
    assert text.startswith(f"usage: scgpt-hf {name}")
    assert f"  scgpt-hf {name}" in text
    assert "default: None" not in text


@pytest.mark.parametrize("name", ["annotate", "build-census", "cache", "embed", "finetune", "pretrain"])
def test_the_help_of_a_command_that_reads_files_lists_their_formats(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scgpt-hf", name, "--help"])
    with pytest.raises(SystemExit):
        scgpt_hf_cli.main()
    assert SUPPORTED in " ".join(capsys.readouterr().out.split())


def test_the_arguments_reach_the_command_and_its_errors_name_it(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["scgpt-hf", "report", str(tmp_path / "absent")])
    with pytest.raises(SystemExit, match=r"^scgpt-hf report: .*absent"):
        scgpt_hf_cli.main()


@pytest.mark.parametrize(
    "command",
    [
        ("finetune", "--model", "M", "--labels_key", "cell_type"),
        ("integrate", "--model", "M", "--batch_key", "assay"),
        ("perturb", "train"),
    ],
)
def test_a_flag_that_does_not_exist_ends_a_training_command_with_2(command, monkeypatch, capsys):
    flags = ("cells.h5ad", "--out", "runs/new", "--num_train_epochs", "1")
    monkeypatch.setattr(sys, "argv", ["scgpt-hf", *command, *flags])
    with pytest.raises(SystemExit) as ended:
        scgpt_hf_cli.main()
    assert ended.value.code == 2
    assert "unrecognized arguments: --num_train_epochs 1" in capsys.readouterr().err.splitlines()[-1]


def test_the_help_of_integrate_shows_its_own_task_as_the_default(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scgpt-hf", "integrate", "--help"])
    with pytest.raises(SystemExit):
        scgpt_hf_cli.main()
    assert "what to fine-tune for (default: integrate)" in " ".join(capsys.readouterr().out.split())


def test_the_version_is_that_of_the_package(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["scgpt-hf", "--version"])
    scgpt_hf_cli.main()
    assert capsys.readouterr().out == f"scgpt_hf {scgpt_hf.__version__}\n"


def test_an_unknown_command_ends_with_the_known_ones(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["scgpt-hf", "train"])
    with pytest.raises(SystemExit, match=r"'train'.*pretrain, finetune"):
        scgpt_hf_cli.main()


def test_the_installed_command_starts_the_module():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"scgpt-hf": "scgpt_hf_cli:main"}
    assert project["tool"]["setuptools"]["py-modules"] == ["scgpt_hf_cli"]
