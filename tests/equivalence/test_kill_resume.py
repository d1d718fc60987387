"""A run that is killed twice is bitwise equal, in every step, to an uninterrupted one; see killed_run.py."""

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("seed", [0])
def test_kill_9_in_the_first_and_in_a_later_epoch_changes_no_bit(small_census, tmp_path, seed):
    """Compares loss, batch, weights and optimizer of every step, the log, and the final weights."""
    command = [sys.executable, str(Path(__file__).with_name("killed_run.py")), str(small_census), str(tmp_path)]
    done = subprocess.run([*command, str(seed)], capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    print(f"seed {seed}:", result := done.stdout.splitlines()[-1])
    run = json.loads(result)
    first, later = run["kills"]
    assert 0 < first["resumes_at"] <= first["killed_after"] < run["epoch"] < later["killed_after"] < run["steps"]
    assert run["compared"] >= run["steps"]
