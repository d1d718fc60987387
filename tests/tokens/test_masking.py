"""Masks: an exact share of each cell's genes, never `<cls>`, the same wherever the cell stands."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.tokens import masking_scgpt
from scgpt_hf.tokens.masking_scgpt import draw_ratios, mask_tokens
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens
from scgpt_hf.tokens.sampling_scgpt import _threshold


def _tokens(n_genes: list[int], first_cell: int = 0) -> Tokens:
    cells = [np.concatenate([[999], np.arange(n) * 3]) for n in n_genes]
    ids = np.concatenate([*cells, np.empty(0)]).astype(np.int64)
    indptr = np.cumsum([0, *(n + 1 for n in n_genes)]).astype(np.int64)
    return Tokens(ids, (ids % 50 + 1).astype(np.float32), None, indptr, first_cell + np.arange(len(n_genes)))


def _masked(tokens: Tokens, ratios: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return where values are hidden; none of `_tokens` is `IGNORE`."""
    labels = mask_tokens(tokens, ratios, seed=seed, epoch=epoch, mask_value=-1.0).labels
    assert labels is not None
    hidden: np.ndarray = labels != IGNORE
    return hidden


GENES = st.lists(st.integers(1, 60), max_size=12)


@settings(deadline=None)
@given(n_genes=GENES, ratio=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_mask_takes_the_share_of_every_cell_and_spares_cls(n_genes: list[int], ratio: float, seed: int) -> None:
    tokens = _tokens(n_genes)
    masked = _masked(tokens, np.full(len(n_genes), ratio), seed=seed, epoch=0)
    for n, (start, stop) in zip(n_genes, pairwise(tokens.indptr), strict=True):
        assert masked[start:stop].sum() == int(ratio * n)
        assert not masked[start]


@settings(deadline=None)
@given(n_genes=GENES, seed=st.integers(0, 2**32 - 1), n_first=st.integers(0, 1))
def test_engines_agree_to_the_bit(n_genes: list[int], seed: int, n_first: int) -> None:
    tokens = _tokens(n_genes)
    arguments: dict[str, Any] = {"seed": seed, "epoch": 4}
    ratios = draw_ratios(tokens.cell_ids, (0.0, 0.3, 0.75, 1.0), **arguments)
    hidden = mask_tokens(tokens, ratios, mask_value=-1, n_first=n_first, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_scgpt, "COMPILED", False)
        plain = mask_tokens(tokens, ratios, mask_value=-1, n_first=n_first, **arguments)
    for key in ("values", "labels"):
        assert getattr(plain, key).dtype == getattr(hidden, key).dtype == np.float32
        np.testing.assert_array_equal(getattr(plain, key), getattr(hidden, key))


@settings(deadline=None)
@given(words=st.lists(st.integers(1, 2**64 - 1) | st.integers(1, 9), min_size=1, max_size=40), share=st.floats(0, 1))
def test_threshold_lets_through_what_sorting_would(words: list[int], share: float) -> None:
    k = 1 + int(share * (len(words) - 1))
    drawn = np.array(words, np.uint64)
    np.testing.assert_array_equal(drawn <= _threshold(drawn, k), drawn <= np.sort(drawn)[k - 1])


def test_a_cell_with_one_gene_has_none_masked() -> None:
    assert not _masked(_tokens([1, 1]), np.array([0.25, 0.75]), seed=0, epoch=0).any()
    assert _masked(_tokens([1]), np.array([1.0]), seed=0, epoch=0).tolist() == [False, True]


def test_masks_belong_to_the_cell() -> None:
    ratios = np.full(6, 0.5)
    whole = _masked(_tokens([20, 5, 31, 8, 60, 2], 100), ratios, seed=7, epoch=1)
    alone = _masked(_tokens([31], 102), ratios[:1], seed=7, epoch=1)
    start = _tokens([20, 5]).indptr[-1]
    np.testing.assert_array_equal(whole[start : start + 32], alone)


def test_masks_change_with_seed_and_epoch() -> None:
    tokens, ratios = _tokens([400]), np.array([0.5])
    first = _masked(tokens, ratios, seed=0, epoch=0)
    for other in (_masked(tokens, ratios, seed=1, epoch=0), _masked(tokens, ratios, seed=0, epoch=1)):
        assert 60 < (first & other)[1:].sum() < 140  # 100 expected of independent halves


def test_every_gene_is_masked_equally_often() -> None:
    tokens, ratios = _tokens([40]), np.array([0.25])
    often = sum(_masked(tokens, ratios, seed=0, epoch=epoch).astype(int) for epoch in range(2000))[1:]
    assert abs(often - 500).max() < 4 * np.sqrt(2000 * 0.25 * 0.75)


def test_each_cell_draws_its_ratio_uniformly_and_alone() -> None:
    cells = np.arange(9000)
    ratios = draw_ratios(cells, (0.25, 0.5, 0.75), seed=0, epoch=0)
    found, times = np.unique(ratios, return_counts=True)
    assert found.tolist() == [0.25, 0.5, 0.75]
    assert ((times - 3000.0) ** 2 / 3000).sum() < 13.8  # chi square, 2 degrees of freedom, 99.9 %
    np.testing.assert_array_equal(draw_ratios(cells[100:200], (0.25, 0.5, 0.75), seed=0, epoch=0), ratios[100:200])


def test_mask_tokens_hides_values_and_keeps_them_as_labels() -> None:
    tokens = _tokens([4, 3])
    hidden = mask_tokens(tokens, np.array([0.5, 0.5]), seed=0, epoch=0, mask_value=-1.0)
    masked = hidden.values == -1
    assert hidden.labels is not None
    assert masked.sum() == 3
    np.testing.assert_array_equal(hidden.labels[masked], tokens.values[masked])
    np.testing.assert_array_equal(hidden.values[~masked], tokens.values[~masked])
    assert (hidden.labels[~masked] == IGNORE).all()
    assert tokens.labels is None  # the tokens themselves are left as they were


@pytest.mark.parametrize("ratios", [(), (0.5, 1.5), (-0.1,), (float("nan"),)])
def test_bad_ratios_raise(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask ratios in \[0, 1\]"):
        draw_ratios(np.arange(3), ratios, seed=0, epoch=0)
