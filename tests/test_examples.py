"""The notebooks run one after the other, and are stored with their outputs."""

import ast
import os
import shutil
import sys
from pathlib import Path

import nbformat
import pytest

from tests.support import ROOT

NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
MAX_BYTES = 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_small_and_stored_with_their_outputs(path: Path) -> None:
    assert path.stat().st_size < MAX_BYTES
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error"]
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert "site-packages" not in path.read_text(encoding="utf-8")  # a warning with a path of the machine that ran it
    for cell in code:
        ast.parse("\n".join(line for line in cell.source.splitlines() if not line.startswith("!")))


def run(notebooks: list[Path], folder: Path) -> None:
    """Execute notebooks in a temporary folder with the layout of the repository."""
    from nbclient import NotebookClient

    shutil.copytree(ROOT / "scripts", folder / "scripts")
    (folder / "examples").mkdir()
    for path in notebooks:
        notebook = nbformat.read(path, as_version=4)
        NotebookClient(notebook, timeout=240, resources={"metadata": {"path": folder / "examples"}}).execute()


def test_the_second_notebook_runs_on_any_checkpoint(tmp_path: Path) -> None:
    import torch

    from scgpt_hf import ScGPTConfig, ScGPTForPreTraining, ScGPTProcessor, demo_cells

    torch.manual_seed(0)
    processor = ScGPTProcessor.from_genes(list(demo_cells().var_names))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = ScGPTForPreTraining(
        ScGPTConfig(vocab_size=processor.vocab_size, pad_token_id=processor.pad_id, **sizes)
    )  # untrained: the test ignores its results
    for part in (model, processor):
        part.save_pretrained(tmp_path / "runs" / "example" / "best_model")
    run(NOTEBOOKS[1:2], tmp_path)


def test_the_third_notebook_runs_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_EPOCHS", "1")
    run(NOTEBOOKS[2:], tmp_path)
    assert (tmp_path / "runs" / "example_perturbation" / "best_model" / "model.safetensors").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_notebooks_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_EPOCHS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert len(NOTEBOOKS) == 3
    run(NOTEBOOKS, tmp_path)
    assert (tmp_path / "runs" / "example" / "best_model" / "model.safetensors").exists()
