"""Steps are shared out between ranks by tokens: each cell once, in order, and nearly equal numbers of tokens."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.schedule.tokens import REPEAT, CellTokens, count_tokens, cut_steps


@given(
    tokens=st.lists(st.integers(1, 1201), min_size=1, max_size=60),
    world_size=st.integers(1, 8),
    least=st.integers(1, 4),
)
def test_each_rank_gets_its_share_up_to_half_a_cell_at_each_end_or_the_fewest_cells(tokens, world_size, least):
    least = min(least, len(tokens) // world_size)
    if least == 0:
        return
    (cuts,) = cut_steps(np.array([tokens]), world_size, least)
    assert cuts[0] == 0
    assert cuts[-1] == len(tokens)
    assert (np.diff(cuts) >= least).all()
    if (np.diff(cuts) > least).all():  # no cut was moved
        parts = [sum(tokens[start:stop]) for start, stop in pairwise(cuts)]
        assert max(abs(part - sum(tokens) / world_size) for part in parts) <= max(tokens) + 1


def test_every_rank_keeps_the_fewest_cells_even_if_one_cell_has_all_tokens():
    tokens = np.array([[0, 0, 0, 0, 9, 0, 0, 0], [9, 0, 0, 0, 0, 0, 0, 0], [0] * 8])
    assert np.diff(cut_steps(tokens, 4, 2)).tolist() == [[2, 2, 2, 2]] * 3


def test_tokens_are_counted_with_cls_up_to_the_most_and_looked_up_by_cell_or_draw():
    tokens = count_tokens(np.array([1, 3, 4]), np.array([10, 2000, 0]), 1201)
    assert tokens.of(np.array([[4, 3], [1 + 2 * REPEAT, 3 + REPEAT]])).tolist() == [[1, 1201], [11, 1201]]
    assert count_tokens(np.array([0]), np.array([10**6]), 10**6).by_id.tolist() == [65535]


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_a_step_has_the_same_cells_for_every_number_of_ranks_and_its_tokens_are_balanced(world_size):
    cell_ids = np.arange(0, 200_000, 2)
    # neighboring cells have similar numbers of genes, as those of one data set have
    rng = np.random.default_rng(0)
    n_genes = (500 * np.exp(np.repeat(rng.normal(0, 0.6, 50), 2000) + rng.normal(0, 0.3, 100_000))).astype(np.int64)
    order = {"seed": 1, "epoch": 2, "batch_size": 512}
    plan = plan_epoch(cell_ids, **order, tokens=count_tokens(cell_ids, n_genes, 1201))
    equal = plan_epoch(cell_ids, **order)
    window = equal.window(1)
    np.testing.assert_array_equal(plan.window(1), window)

    def imbalance(ranks):
        totals = np.array([[plan.tokens.of(step).sum(dtype=np.int64) for step in steps] for steps in ranks])
        return (totals.max(axis=0) / totals.mean(axis=0)).mean() - 1

    ranks, before = (
        [one.steps(1, rank=rank, world_size=world_size) for rank in range(world_size)] for one in (plan, equal)
    )
    for step, expected in enumerate(window):
        np.testing.assert_array_equal(np.concatenate([steps[step] for steps in ranks]), expected)
    assert imbalance(ranks) < 0.03
    assert imbalance(before) > 2 * imbalance(ranks)


def test_a_rank_has_a_cell_for_each_micro_batch():
    cell_ids = np.arange(4096)
    tokens = CellTokens(np.where(cell_ids < 2048, 1201, 1).astype(np.uint16))
    plan = plan_epoch(cell_ids, seed=0, epoch=0, batch_size=64, tokens=tokens)
    for rank in range(4):
        steps = plan.steps(0, rank=rank, world_size=4, micro_batches=16)
        assert {len(step) for step in steps} == {16}


@pytest.mark.parametrize("world_size", [8, 64, 512])
def test_the_chunks_that_a_rank_reads_do_not_grow_with_the_number_of_ranks(world_size):
    cell_ids = np.arange(world_size * 128 * 64 * 2)
    plan = plan_epoch(cell_ids, seed=0, epoch=0, batch_size=64 * world_size)
    for rank in (0, world_size // 2, world_size - 1):
        cells = np.concatenate(plan.steps(0, rank=rank, world_size=world_size))
        assert len(cells) == 64 * 128
        assert len(np.unique(cells // 2048)) <= 5
