"""FSDP2 by its config file: two processes that share the model train and save what one process does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.training.fault_tolerance.checkpoints import newest_valid, verify
from tests.support import ROOT
from tests.support.training import prepare


@pytest.mark.slow
def test_a_sharded_model_trains_and_is_saved_like_an_unsharded_one(small_census, tmp_path):
    here, folder = Path(__file__).parent, tmp_path / "sharded"
    env = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "accelerate_fsdp_config.yaml"), "--mixed_precision", "no"]
    done = subprocess.run(
        [*command, str(here / "sharded.py"), str(small_census), str(folder)],
        **{"env": env, "capture_output": True, "text": True, "timeout": 280},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    sharded = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"1"')))
    assert (verify(newest_valid(folder)).step, verify(newest_valid(folder)).world_size) == (6, 2)
    for saved in (folder / "best_model", newest_valid(folder)):
        assert (saved / "modeling_scgpt.py").is_file()
        assert not list(saved.glob("_fsdp*"))
        assert json.loads((saved / "config.json").read_text())["architectures"] == ["ScGPTForPreTraining"]
        ScGPTForPreTraining.from_pretrained(saved)
    flags = ("--per_device_train_batch_size", "64", "--dropout", "0", "--logging_steps", "1", "--max_steps", "4")
    trainer, _, _ = prepare(small_census, tmp_path / "unsharded", *flags)
    trainer.train()
    losses = {str(line["step"]): line["loss"] for line in trainer.state.log_history if "loss" in line}
    assert [sharded[step] for step in losses] == pytest.approx(list(losses.values()), rel=1e-3)
