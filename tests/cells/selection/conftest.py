"""Fixtures of the tests of selection."""

import pytest

from scgpt_hf.cells.selection import counts


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read 64 cells at a time, in chunks of 32, so that a few hundred cells take several reads."""
    monkeypatch.setattr(counts, "_CELLS_PER_READ", 64)
    monkeypatch.setattr(counts, "CHUNK_SIZE", 32)
