"""Masks cover an exact share of each cell's genes, never `<cls>`, and do not depend on other cells."""

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.tokens import masking_scgpt
from scgpt_hf.tokens.masking_scgpt import mask_tokens, sample_mask_ratios
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens
from scgpt_hf.tokens.sampling_scgpt import find_threshold


def _tokens(n_genes: list[int], first_cell: int = 0) -> Tokens:
    cells = [np.concatenate([[999], np.arange(n) * 3]) for n in n_genes]
    ids = np.concatenate([*cells, np.empty(0)]).astype(np.int64)
    indptr = np.cumsum([0, *(n + 1 for n in n_genes)]).astype(np.int64)
    return Tokens(ids, (ids % 50 + 1).astype(np.float32), None, indptr, first_cell + np.arange(len(n_genes)))


def _masked(tokens: Tokens, ratios: np.ndarray, *, seed: int, epoch: int) -> np.ndarray:
    """Return which tokens are masked; no value of `_tokens` equals `IGNORE`."""
    labels = mask_tokens(tokens, ratios, seed=seed, epoch=epoch, mask_value=-1.0).labels
    assert labels is not None
    masked: np.ndarray = labels != IGNORE
    return masked


GENES = st.lists(st.integers(1, 60), max_size=12)


@settings(deadline=None)
@given(n_genes=GENES, ratio=st.floats(0, 1), seed=st.integers(0, 2**32 - 1))
def test_the_share_of_every_cell_is_masked_but_never_cls(n_genes: list[int], ratio: float, seed: int) -> None:
    tokens = _tokens(n_genes)
    masked = _masked(tokens, np.full(len(n_genes), ratio), seed=seed, epoch=0)
    for n, (start, stop) in zip(n_genes, pairwise(tokens.indptr), strict=True):
        assert masked[start:stop].sum() == int(ratio * n)
        assert not masked[start]


@settings(deadline=None)
@given(n_genes=GENES, seed=st.integers(0, 2**32 - 1), n_first=st.integers(0, 1))
def test_kernel_and_numpy_agree_to_the_bit(n_genes: list[int], seed: int, n_first: int) -> None:
    tokens = _tokens(n_genes)
    arguments: dict[str, Any] = {"seed": seed, "epoch": 4}
    ratios = sample_mask_ratios(tokens.cell_ids, (0.0, 0.3, 0.75, 1.0), **arguments)
    result = mask_tokens(tokens, ratios, mask_value=-1, n_first=n_first, **arguments)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(masking_scgpt, "COMPILED", False)
        plain = mask_tokens(tokens, ratios, mask_value=-1, n_first=n_first, **arguments)
    for key in ("values", "labels"):
        assert getattr(plain, key).dtype == getattr(result, key).dtype == np.float32
        np.testing.assert_array_equal(getattr(plain, key), getattr(result, key))


@settings(deadline=None)
@given(words=st.lists(st.integers(1, 2**64 - 1) | st.integers(1, 9), min_size=1, max_size=40), share=st.floats(0, 1))
def test_find_threshold_selects_the_same_words_as_sorting(words: list[int], share: float) -> None:
    k = 1 + int(share * (len(words) - 1))
    all_words = np.array(words, np.uint64)
    np.testing.assert_array_equal(all_words <= find_threshold(all_words, k), all_words <= np.sort(all_words)[k - 1])


def test_a_cell_with_one_gene_has_none_masked() -> None:
    assert not _masked(_tokens([1, 1]), np.array([0.25, 0.75]), seed=0, epoch=0).any()
    assert _masked(_tokens([1]), np.array([1.0]), seed=0, epoch=0).tolist() == [False, True]


def test_the_mask_of_a_cell_does_not_depend_on_other_cells() -> None:
    ratios = np.full(6, 0.5)
    together = _masked(_tokens([20, 5, 31, 8, 60, 2], 100), ratios, seed=7, epoch=1)
    single = _masked(_tokens([31], 102), ratios[:1], seed=7, epoch=1)
    start = _tokens([20, 5]).indptr[-1]
    np.testing.assert_array_equal(together[start : start + 32], single)


def test_masks_change_with_seed_and_epoch() -> None:
    tokens, ratios = _tokens([400]), np.array([0.5])
    first = _masked(tokens, ratios, seed=0, epoch=0)
    for other in (_masked(tokens, ratios, seed=1, epoch=0), _masked(tokens, ratios, seed=0, epoch=1)):
        assert 60 < (first & other)[1:].sum() < 140  # 100 expected of independent halves


def test_every_gene_is_masked_equally_often() -> None:
    tokens, ratios = _tokens([40]), np.array([0.25])
    n_masked = sum(_masked(tokens, ratios, seed=0, epoch=epoch).astype(int) for epoch in range(2000))[1:]
    assert abs(n_masked - 500).max() < 4 * np.sqrt(2000 * 0.25 * 0.75)


def test_ratios_are_uniform_and_do_not_depend_on_other_cells() -> None:
    cells = np.arange(9000)
    ratios = sample_mask_ratios(cells, (0.25, 0.5, 0.75), seed=0, epoch=0)
    found, times = np.unique(ratios, return_counts=True)
    assert found.tolist() == [0.25, 0.5, 0.75]
    assert ((times - 3000.0) ** 2 / 3000).sum() < 13.8  # chi square, 2 degrees of freedom, 99.9 %
    np.testing.assert_array_equal(
        sample_mask_ratios(cells[100:200], (0.25, 0.5, 0.75), seed=0, epoch=0), ratios[100:200]
    )


def test_mask_tokens_replaces_values_and_keeps_them_as_labels() -> None:
    tokens = _tokens([4, 3])
    result = mask_tokens(tokens, np.array([0.5, 0.5]), seed=0, epoch=0, mask_value=-1.0)
    masked = result.values == -1
    assert result.labels is not None
    assert masked.sum() == 3
    np.testing.assert_array_equal(result.labels[masked], tokens.values[masked])
    np.testing.assert_array_equal(result.values[~masked], tokens.values[~masked])
    assert (result.labels[~masked] == IGNORE).all()
    assert tokens.labels is None  # the input is not changed


@pytest.mark.parametrize("ratios", [(), (0.5, 1.5), (-0.1,), (float("nan"),)])
def test_bad_ratios_raise(ratios: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"mask ratio, each in \[0, 1\]"):
        sample_mask_ratios(np.arange(3), ratios, seed=0, epoch=0)
