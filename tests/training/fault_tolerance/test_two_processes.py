"""Two processes stay together: with all objectives, when a step is skipped, on a signal, on a read error of one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scgpt_hf.training.fault_tolerance.checkpoints import newest_valid, verify
from tests.support import ROOT
from tests.support.training import QUIET, prepare, read_metrics
from tests.training.fault_tolerance.two_processes import SAME_RUN


@pytest.mark.slow
def test_two_processes_stop_together_and_one_process_resumes(small_census, tmp_path):
    here = Path(__file__).parent
    env = {**os.environ, "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--rdzv_backend", "c10d"]
    command += ["--rdzv_endpoint", "localhost:0", str(here / "two_processes.py")]
    done = subprocess.run(
        [*command, str(small_census), str(tmp_path)], env=env, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-4000:]
    checks = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"objectives"')))
    assert checks == {
        "objectives": 9,
        "same_start": True,
        "skipped": True,
        "exit_code": 143,
        "saved": 2,
        "read_error": "cannot read cells after step 3: gone",
    }
    assert "step 2 was skipped" in done.stderr
    flags = ("--loss_weights", '{"gep": 0.01, "counts": 1}', "--cls_shortcut", "true", "--gene_vectors", "data")
    trainer, _, _ = prepare(
        small_census, tmp_path / "one", *QUIET, *flags, "--per_device_train_batch_size", "8", *SAME_RUN
    )
    trainer.train()
    losses = [
        [line["counts"] for line in read_metrics(tmp_path / run) if "counts" in line] for run in ("one", "counts")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 6
    manifest = verify(newest_valid(tmp_path / "stopped"))
    assert (manifest.step, manifest.world_size, manifest.history) == (3, 2, [(64, 3)])
    flags = ("--per_device_train_batch_size", "64", "--resume_from_checkpoint", "latest", "--dropout", "0")
    trainer, _, checkpoint = prepare(small_census, tmp_path / "stopped", *flags)
    trainer.train(resume_from_checkpoint=checkpoint)
    assert trainer.state.global_step == trainer.schedule.n_steps == 4
