"""`pretrain`: a complete run as a library call, which leaves the state of the process alone."""

import json
import signal
import subprocess
import sys

import torch

from scgpt_hf import parse_settings, pretrain
from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.pretraining import prepare_run
from scgpt_hf.training.recipe import make_trainer
from tests.support import ROOT
from tests.support.memory_source import make_cells
from tests.support.training import QUIET, TINY


def test_a_library_call_writes_a_run_folder_and_leaves_the_process_alone(small_census, tmp_path, monkeypatch):
    folder, reports, threads = tmp_path / "run", [], []
    monkeypatch.setattr(torch, "set_num_threads", threads.append)
    flags = [*TINY, "--data", str(small_census), "--output_dir", str(folder)]
    handlers = [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    summary = pretrain(parse_settings(flags), report=reports.append)
    assert not threads
    assert handlers == [signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)]
    files = {"best_model", "settings.yaml", "split.json", "metrics.jsonl", "summary.json", "README.md", "report.html"}
    assert files <= {path.name for path in folder.iterdir()}
    assert json.loads((folder / "summary.json").read_text())["steps"] == summary["steps"]
    (report,) = reports
    assert f"{summary['best']['eval_gep_mse']:.2f}" in report

    # A finished run is not trained again, and its summary is returned.
    written = (folder / "metrics.jsonl").read_bytes()
    again = pretrain(parse_settings([*flags, "--resume_from_checkpoint", "latest"]))
    assert again["steps"] == summary["steps"]
    assert (folder / "metrics.jsonl").read_bytes() == written


def test_genes_that_are_not_expressed_can_be_tokens_too(small_census, tmp_path):
    weights = '{"gep": 1, "gepc": 1, "gep_zero": 1, "gepc_zero": 1}'
    flags = ["--include_zeros", "true", "--explicit_zero_prob", "true", "--loss_weights", weights, "--max_steps", "4"]
    settings = parse_settings(
        [*TINY, *QUIET, "--data", str(small_census), "--output_dir", str(tmp_path / "run"), *flags]
    )
    run = prepare_run(settings)
    n_zeros = next(iter(run.data_module.unmasked()))["values"].eq(0).sum()
    assert n_zeros > 1000  # far more than the <cls> tokens of a batch
    trainer = make_trainer(run.data_module, run.model, settings.training)
    trainer.train()
    assert any("gep_zero" in line for line in trainer.state.log_history)


def test_training_on_a_cache_needs_no_library_that_reads_files(tmp_path):
    """As on a machine with a GPU that has little but torch; `benchmarks/gpu.py` trains there."""
    write_cache(make_cells([40] * 4, n_genes=60), tmp_path / "cells")
    code = (
        "import sys\n"
        "sys.modules |= dict.fromkeys(['anndata', 'cellxgene_census', 'scanpy', 'tiledb', 'tiledbsoma'])\n"
        "import scgpt_hf.pretraining\n"
        "from scgpt_hf.cells.source import open_source\n"
        f"assert len(open_source({str(tmp_path / 'cells')!r}).obs()) == 160"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
