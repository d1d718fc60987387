"""The first 20 losses of a tiny model stay what they were: a change that moves them says so in the CHANGELOG."""

import json

import pytest

from tests.golden.make_losses import GOLDEN, first_losses


def test_the_first_20_losses_are_the_golden_ones():
    expected = json.loads(GOLDEN.read_text())
    assert first_losses() == pytest.approx(expected, rel=1e-4)
    assert expected[-1] < expected[0]
