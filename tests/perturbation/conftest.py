"""Fixtures: a small screen whose effects are known."""

from collections.abc import Callable

import pytest
from anndata import AnnData

from tests.support.screens import build_screen


@pytest.fixture
def make_screen() -> Callable[..., AnnData]:
    return build_screen


@pytest.fixture
def screen() -> AnnData:
    return build_screen()
