"""Pairs of perturbed and control cells: of one batch, keyed by (seed, epoch, cell), independent of everything else."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.perturbation.pairing import draw_cells, pair_controls, require_controls
from scgpt_hf.perturbation.pseudobulk import delta_of, halve, welch_t

BATCHES = np.array(list("aabbccabcabcabc"))
CONTROLS, PERTURBED = np.arange(6), np.arange(6, 15)


@settings(deadline=None)
@given(st.integers(0, 5), st.integers(0, 5), st.permutations(range(9)))
def test_a_pair_depends_on_its_cell_alone(seed: int, epoch: int, order: list[int]) -> None:
    pairs = pair_controls(PERTURBED, BATCHES, CONTROLS, seed=seed, epoch=epoch)
    assert (BATCHES[pairs] == BATCHES[PERTURBED]).all()
    assert np.isin(pairs, CONTROLS).all()
    shuffled = pair_controls(PERTURBED[order], BATCHES, CONTROLS[::-1], seed=seed, epoch=epoch)
    assert (shuffled == pairs[order]).all()
    alone = pair_controls(PERTURBED[3:4], BATCHES, CONTROLS, seed=seed, epoch=epoch)
    assert alone[0] == pairs[3]


def test_pairs_change_with_the_epoch_and_use_all_controls() -> None:
    batches = np.array(["a"] * 60)
    pairs = np.stack([pair_controls(np.arange(20, 60), batches, np.arange(20), seed=0, epoch=e) for e in range(30)])
    assert len({tuple(row) for row in pairs}) == 30
    assert set(pairs.ravel()) == set(range(20))


def test_a_batch_without_controls_raises() -> None:
    is_control = np.isin(np.arange(15), CONTROLS) & (BATCHES != "c")
    with pytest.raises(ValueError, match=r"1 of the 3 batches in replicate .*\(3\).*'c'.*batch_key"):
        require_controls(BATCHES[np.r_[0:4, 6:15, 13]], is_control[np.r_[0:4, 6:15, 13]], "replicate")
    with pytest.raises(ValueError, match="no control cell"):
        require_controls(BATCHES, np.zeros(15, bool), None)
    with pytest.raises(ValueError, match="batch 'c' has no control cell"):
        pair_controls(PERTURBED, BATCHES, CONTROLS[:4], seed=0, epoch=0)


def test_drawn_cells_are_repeated_only_if_there_are_too_few() -> None:
    cells = np.arange(100, 107)
    assert len(set(draw_cells(cells, 5, seed=0, epoch=0))) == 5
    many = draw_cells(cells, 20, seed=0, epoch=0)
    assert set(np.bincount(many - 100)) == {2, 3}


@settings(deadline=None)
@given(st.integers(0, 3))
def test_a_delta_is_taken_within_batches(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = csr_matrix(rng.random((15, 4)))
    dense, expected = values.toarray(), np.zeros(4)
    for cell in PERTURBED:  # the slow and obvious version
        same = CONTROLS[BATCHES[CONTROLS] == BATCHES[cell]]
        expected += (dense[cell] - dense[same].mean(0)) / len(PERTURBED)
    np.testing.assert_allclose(delta_of(values, BATCHES, PERTURBED, CONTROLS), expected)


@settings(deadline=None)
@given(st.integers(0, 50))
def test_halves_are_disjoint_and_balanced_by_batch(seed: int) -> None:
    one, other = halve(PERTURBED, BATCHES, seed)
    assert sorted([*one, *other]) == PERTURBED.tolist()
    for batch in "abc":
        assert abs((BATCHES[one] == batch).sum() - (BATCHES[other] == batch).sum()) <= 1


def test_welch_equals_scipy() -> None:
    from scipy.stats import ttest_ind

    values = csr_matrix(np.random.default_rng(0).random((15, 4)) * [1, 1, 1, 0])
    expected = ttest_ind(values.toarray()[PERTURBED], values.toarray()[CONTROLS], equal_var=False).statistic
    np.testing.assert_allclose(welch_t(values, PERTURBED, CONTROLS), np.nan_to_num(expected))
