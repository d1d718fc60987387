"""Tests of `scripts/publish.py`."""

from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.hub_run import make_run, run_script
from tests.support.hub_server import Client, Hub

SCRIPT = ROOT / "scripts" / "publish.py"
TOKEN = "hf_owner"


def test_script_publishes_a_private_model_on_a_branch(hub: Hub, client: Client, run: Path) -> None:
    arguments = [str(run), "org/by-script", "--private", "--revision", "v2"]
    done = client(run_script, SCRIPT, arguments, TOKEN)
    assert (done.returncode, done.stdout) == (0, f"Published at {hub.url}/org/by-script/tree/v2\n"), done.stderr
    assert hub.state.repositories["models/org/by-script"].private
    assert "model.safetensors" in hub.files("org/by-script", "v2")


@pytest.mark.parametrize(
    ("folder", "arguments", "expected"),
    [
        ("none", ["org/name"], "publish.py: there is no folder"),
        ("run", ["name"], "publish.py: expected a repository id"),
        ("run", ["stranger/name"], "publish.py: no write access to stranger/name (403)"),
        ("cache", ["org/name"], "publish.py: "),
        ("cache", ["org/name", "--revision", "v2"], "is a cache, and caches are always published on main"),
    ],
)
def test_script_prints_errors_without_a_traceback(
    client: Client, tmp_path: Path, folder: str, arguments: list[str], expected: str
) -> None:
    make_run(tmp_path / "run")
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "genes.csv").write_text("")
    done = client(run_script, SCRIPT, [str(tmp_path / folder), *arguments], TOKEN)
    assert done.returncode == 1
    assert expected in done.stderr
    assert "Traceback" not in done.stderr
