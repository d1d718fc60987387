"""The threads of a process: the setting first, then the environment, then its share of the cores."""

import pytest
import torch

from scgpt_hf.training import device as machine
from scgpt_hf.training.device import device_name, set_cpu_threads
from scgpt_hf.training.settings import TrainingSettings

LAUNCHED = {"ACCELERATE_MIXED_PRECISION": "no"}


@pytest.mark.parametrize(
    ("setting", "environment", "expected"),
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
def test_threads_asked_for_are_given_and_others_are_a_share(monkeypatch, tmp_path, setting, environment, expected):
    args = TrainingSettings(output_dir=str(tmp_path), use_cpu=True, cpu_threads=setting)
    given = []
    monkeypatch.setattr(machine, "n_cores", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    for name in ("OMP_NUM_THREADS", "LOCAL_WORLD_SIZE", *LAUNCHED):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    set_cpu_threads(args)
    assert given == ([] if expected is None else [expected])  # None: as torch took it from the environment


def test_a_cpu_is_called_by_its_kind_and_threads():
    assert device_name(torch.device("cpu")).endswith(f" CPU, {torch.get_num_threads()} threads")
