"""The command `pretrain`: the number of CPU threads."""

import pytest
import torch

from scgpt_hf.cli import pretrain
from scgpt_hf.training.settings import TrainingSettings

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}  # as `accelerate launch` leaves it in the environment


@pytest.mark.parametrize(
    ("cpu_threads", "environment", "expected"),
    [
        (3, {"OMP_NUM_THREADS": "5"}, 3),
        (0, {"OMP_NUM_THREADS": "5"}, None),
        (0, {"OMP_NUM_THREADS": "1"}, None),
        (0, {"OMP_NUM_THREADS": "5", **LAUNCHED}, None),
        (0, {"OMP_NUM_THREADS": "1", **LAUNCHED}, 8),
        (0, {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": "2"}, 4),
        (0, {"LOCAL_WORLD_SIZE": "16"}, 1),
        (0, {}, 8),
    ],
)
def test_threads_come_from_the_setting_then_the_environment_then_the_cores(
    monkeypatch, tmp_path, cpu_threads, environment, expected
):
    """`expected` is None where torch has already read the number from the environment."""
    args = TrainingSettings(output_dir=str(tmp_path), use_cpu=True, cpu_threads=cpu_threads)
    set_to = []
    monkeypatch.setattr(pretrain, "n_cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", set_to.append)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", *LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    pretrain.set_cpu_threads(args)
    assert set_to == ([] if expected is None else [expected])
