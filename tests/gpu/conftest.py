"""Fixtures of the tests that need a CUDA device. Run them with `pytest -m gpu tests`."""

import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """A CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
