"""Baselines: equal to plain loops over the tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.baselines import baselines_from, sum_bins, sum_errors

VOCAB = 6


def batch(tokens: list[tuple[int, int, bool]], shift: float = 0.0) -> dict[str, torch.Tensor]:
    """Return a batch of one cell from (gene, bin, masked), its labels shifted by a number of bins."""
    ids, bins, hidden = (np.array(column) for column in zip(*tokens, strict=True))
    labels = np.where(hidden, bins + shift, IGNORE)
    return {
        "input_ids": torch.tensor(ids)[None],
        "values": torch.tensor(bins, dtype=torch.float32)[None],
        "labels": torch.tensor(labels, dtype=torch.float32)[None],
    }


tokens = st.lists(st.tuples(st.integers(0, VOCAB - 1), st.integers(1, 50), st.booleans()), min_size=1, max_size=30)


@given(train=st.lists(tokens, min_size=1, max_size=4), validation=st.lists(tokens, min_size=1, max_size=4))
def test_baselines_equal_plain_loops(train, validation):
    hidden = [(gene, value) for cell in validation for gene, value, masked in cell if masked]
    low, high = (
        [batch(cell, shift) for cell in validation] for shift in (-1.0, 5.0)
    )  # the middle of the bins is 2 off
    sums = sum_errors(map(batch, validation), low, high, sum_bins(map(batch, train), VOCAB))
    if not hidden:
        with pytest.raises(ValueError, match="no position"):
            baselines_from(sums)
        return
    seen = [(gene, value) for cell in train for gene, value, _ in cell]
    constant = np.mean([value for _, value in seen])
    means = {gene: np.mean([value for other, value in seen if other == gene]) for gene, _ in seen}
    found = baselines_from(sums)
    assert found.constant_mse == pytest.approx(np.mean([(value - constant) ** 2 for _, value in hidden]))
    expected = np.mean([(value - means.get(gene, constant)) ** 2 for gene, value in hidden])
    assert found.gene_mean_mse == pytest.approx(expected)
    assert found.tie_floor_mse == pytest.approx(4.0)
