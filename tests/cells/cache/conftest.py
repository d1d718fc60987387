"""Fixtures of the tests of caches."""

import pytest

from scgpt_hf.cells.source import CellSource, open_source
from tests.support.caches import make_cells


@pytest.fixture(scope="module")
def source() -> CellSource:
    """9,000 cells in five chunks."""
    return open_source(make_cells())
