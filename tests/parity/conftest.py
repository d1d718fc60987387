"""Fixtures of the parity tests, which compare our numbers with tensors that scGPT's code computed."""

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def fixtures(shared: Path) -> Path:
    """The folder with the networks and tensors of scGPT's code; its README.md describes each of them."""
    return shared / "fixtures" / "scgpt_parity"
