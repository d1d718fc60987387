"""The first 20 losses of a tiny model equal the stored ones."""

import json

import pytest

from tests.golden.make_losses import GOLDEN, first_losses


def test_the_first_20_losses_equal_the_stored_ones():
    expected = json.loads(GOLDEN.read_text())
    assert first_losses() == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
