"""Fixtures every room shares: the folder of real data and reference tensors."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder with `data/blood` and `fixtures/scgpt_parity`; tests that need it skip where it is absent."""
    folder = Path(os.environ.get("SCGPT_HF_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not folder.is_dir():
        pytest.skip(f"no shared data at {folder}; set SCGPT_HF_SHARED to the folder that holds data/ and fixtures/")
    return folder
