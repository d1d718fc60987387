"""Commands of the README and the documentation are accepted: names of configs, flags, settings that fit together."""

import re
import shlex
from pathlib import Path

import pytest

from scgpt_hf.training.recipe import check_settings
from scgpt_hf.training.settings_parsing import parse_settings
from tests.support import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LEFT_OUT = {"…", "runs/mine/settings.yaml", "--report_to"}  # to fill in; written by a run; needs the extra trackers


def pretraining_commands() -> list[str]:
    """Return each `scgpt-hf pretrain` or `-m scgpt_hf.cli.pretrain` of a bash block or a table, without its comment."""
    found = []
    for page in PAGES:
        text = page.read_text().replace("\\\n", " ")
        blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
        lines = [line for block in blocks for line in block.splitlines()]
        lines += re.findall(r"`(scgpt-hf pretrain[^`]*)`", text)
        for line in lines:
            if match := re.search(r"(?:scgpt-hf |scgpt_hf\.cli\.)pretrain\b([^#;&|)]*)", line):
                found.append(match[1].strip())
    return sorted({" ".join(one.split()) for one in found if not LEFT_OUT & set(one.split()) and "$" not in one})


def test_commands_are_found() -> None:
    assert "blood-300k --dry_run" in pretraining_commands()


@pytest.mark.parametrize("command", pretraining_commands())
def test_a_documented_run_has_valid_settings(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    check_settings(parse_settings(shlex.split(command), ""))
