"""Counter-based numbers equal SplitMix64, are uniform, and are independent across purposes, seeds, epochs and cells."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.tokens.randomness_scgpt import (
    MASKING,
    SAMPLING,
    TIES,
    cell_keys,
    mix_bits,
    random_words,
    to_uniform,
)
from scgpt_hf.tokens.sampling_scgpt import random_word

INT64 = st.integers(-(2**63), 2**63 - 1)


def _mix_bits_with_python(word: int) -> int:
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) % 2**64
    return word ^ (word >> 31)


def _numbers(seed: int = 0, epoch: int = 0, purpose: int = TIES, cell: int = 0, n_genes: int = 20_000) -> np.ndarray:
    keys = cell_keys(np.array([cell]), seed=seed, epoch=epoch, purpose=purpose)
    return to_uniform(random_words(keys, np.arange(n_genes)))


def test_random_words_are_the_outputs_of_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 1234567, as in its reference implementation
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert random_words(np.array([1234567], np.uint64), np.arange(4)).tolist() == expected


@given(words=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20))
def test_mix_bits_equals_python_integers(words: list[int]) -> None:
    assert mix_bits(np.array(words, np.uint64)).tolist() == [_mix_bits_with_python(word) for word in words]


@settings(deadline=None)
@given(seed=st.integers(0, 2**32 - 1), epoch=st.integers(0, 1000), cell=INT64, gene=st.integers(0, 2**31 - 2))
def test_compiled_numbers_equal_numpy_to_the_bit(seed: int, epoch: int, cell: int, gene: int) -> None:
    keys = cell_keys(np.array([cell]), seed=seed, epoch=epoch, purpose=MASKING)
    assert random_word(keys[0], gene) == random_words(keys, np.array([gene]))[0]


@given(cells=st.lists(INT64, min_size=2, max_size=30, unique=True), seed=st.integers(0, 2**32))
def test_different_cells_have_different_keys_in_any_order(cells: list[int], seed: int) -> None:
    keys = cell_keys(np.array(cells), seed=seed, epoch=0, purpose=TIES)
    assert len(set(keys.tolist())) == len(cells)
    assert cell_keys(np.array(cells[::-1]), seed=seed, epoch=0, purpose=TIES).tolist() == keys.tolist()[::-1]


def test_genes_of_a_cell_never_share_a_word() -> None:
    words = random_words(cell_keys(np.array([5]), seed=1, epoch=2, purpose=SAMPLING), np.arange(100_000))
    assert len(np.unique(words)) == 100_000


def test_numbers_are_uniform() -> None:
    numbers = np.concatenate([_numbers(cell=cell) for cell in range(5)])
    assert numbers.min() >= 0
    assert numbers.max() < 1
    observed, _ = np.histogram(numbers, 100, (0, 1))
    chi_square = ((observed - 1000.0) ** 2 / 1000).sum()
    assert 60 < chi_square < 145  # 99 degrees of freedom: 0.1 % to 99.9 %


@pytest.mark.parametrize(
    "other", [{"purpose": SAMPLING}, {"purpose": MASKING}, {"seed": 1}, {"epoch": 1}, {"cell": 1}, {"cell": -1}]
)
def test_numbers_are_unrelated_when_any_part_of_the_key_changes(other: dict[str, int]) -> None:
    ours, theirs = _numbers(), _numbers(**other)
    assert abs(np.corrcoef(ours, theirs)[0, 1]) < 4 / np.sqrt(len(ours))
    assert abs(np.corrcoef(ours[1:], theirs[:-1])[0, 1]) < 4 / np.sqrt(len(ours))
    assert not np.intersect1d(ours, theirs).size


def test_seed_and_epoch_are_not_interchangeable() -> None:
    assert not np.array_equal(_numbers(seed=1, epoch=2), _numbers(seed=2, epoch=1))
