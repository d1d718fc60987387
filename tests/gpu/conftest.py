"""What only a CUDA device can show; run with `pytest -m gpu tests`. Everything here skips where there is none."""

import pytest
import torch


@pytest.fixture(scope="session")
def gpu() -> torch.device:
    """A CUDA device."""
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return torch.device("cuda")
