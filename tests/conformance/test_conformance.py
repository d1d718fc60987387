"""The tests that transformers has for all of its models pass for ours."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT

SCRIPT = ROOT / "scripts" / "conformance.py"


@pytest.mark.network  # pip fetches the source package of transformers
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_our_models_pass_the_tests_of_transformers(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), "--cache", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-1000:]
    assert "failed" not in done.stdout.splitlines()[-1]
