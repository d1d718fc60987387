"""The progress bar: lines in a log file, nothing for short or quiet work."""

import logging
import sys
from types import ModuleType

import pytest

from scgpt_hf import progress_bar as module
from scgpt_hf.progress_bar import progress_bar


def test_a_log_file_gets_whole_lines(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(module, "_DELAY_S", 0.0)
    monkeypatch.setitem(sys.modules, "ipykernel", ModuleType("ipykernel"))  # other libraries import it, too
    with progress_bar(total=700, description="embedding", unit="cells") as bar:
        bar.update(350)
        bar.refresh()
        bar.update(350)
        bar.refresh()
    lines = [line for line in capsys.readouterr().err.splitlines() if line]
    assert len(lines) == 3
    assert lines[1].startswith("embedding: 50 %, 350 of 700 cells, ")
    assert lines[2].startswith("embedding: 100 %, 700 of 700 cells, ")


def test_short_work_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress_bar(range(3), description="embedding", unit="cells")) == [0, 1, 2]
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("hidden_by", ["argument", "verbosity"])
def test_a_bar_can_be_hidden(
    hidden_by: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "_DELAY_S", 0.0)
    if hidden_by == "verbosity":
        monkeypatch.setattr(logging.getLogger("scgpt_hf"), "level", logging.ERROR)
    with progress_bar(total=3, description="embedding", unit="cells", show=hidden_by != "argument") as bar:
        bar.update(3)
        bar.refresh()
    assert capsys.readouterr().err == ""
