"""Test that the trackers of `--report_to` receive what `metrics.jsonl` has: the real libraries, without a network."""

import json
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import ROOT

SMALL = (
    *("--max_steps", "3", "--hidden_size", "16", "--num_hidden_layers", "1", "--shortcut_steps", "0"),
    *("--use_cpu", "true", "--logging_steps", "1", "--fit_baselines", "none"),
)


def tensorboard_has(folder: Path, name: str, values: list[float]) -> bool:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    (events,) = folder.glob("runs/one/runs/*")
    found = accumulator.EventAccumulator(str(events))
    found.Reload()
    return [scalar.value for scalar in found.Scalars(name)] == pytest.approx(values)


def wandb_has(folder: Path, name: str, values: list[float]) -> bool:
    """An offline run is one file of records, which hold names and values as text."""
    (run,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = run.read_bytes()
    return name.encode() in content and all(json.dumps(value).encode() in content for value in values)


def trackio_has(folder: Path, name: str, values: list[float]) -> bool:
    (database,) = (folder / "trackio").glob("*.db")
    with sqlite3.connect(database) as connection:
        rows = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY id")]
    return [row[name] for row in rows if name in row] == values


@pytest.mark.parametrize(
    ("tracker", "has"), [("tensorboard", tensorboard_has), ("wandb", wandb_has), ("trackio", trackio_has)]
)
def test_a_tracker_receives_the_metrics(
    tracker: str, has: Callable[[Path, str, list[float]], bool], tmp_path: Path
) -> None:
    pytest.importorskip(tracker, reason=f"{tracker} is not installed")
    command = [
        sys.executable,
        "-m",
        "scgpt_hf.cli.pretrain",
        "--output_dir",
        "runs/one",
        "--report_to",
        tracker,
        *SMALL,
    ]
    offline = {"WANDB_MODE": "offline", "TRACKIO_DIR": str(tmp_path / "trackio"), "HF_HUB_OFFLINE": "1"}
    paths = {"PYTHONPATH": str(ROOT), "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env={**os.environ, **offline, **paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    lines: list[dict[str, Any]] = [
        json.loads(line) for line in (tmp_path / "runs/one/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    for group, name, key in (
        ("train", "gep", "gep"),
        ("train", "counts", "counts"),
        ("eval", "gep_mse", "eval_gep_mse"),
    ):
        values = [line[key] for line in lines if key in line]
        assert values
        assert has(tmp_path, f"{group}/{name}", values), (group, name, values)
