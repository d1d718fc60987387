"""The order of cells: laws of a plan, whatever the cells, sizes and ranks."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.schedule import epoch as plans
from scgpt_hf.cells.schedule.epoch import EpochPlan, plan_epoch, plan_validation, rank_columns

cell_sets = st.lists(st.integers(0, 400), min_size=1, max_size=150, unique=True).map(lambda ids: np.array(sorted(ids)))
sizes = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 20),
        "chunk_size": st.integers(1, 50),
        "chunks_per_window": st.integers(1, 5),
        "rank_groups": st.integers(1, 6),
        "seed": st.integers(0, 2**63),
        "epoch": st.integers(0, 9),
    }
)
law = settings(deadline=None, max_examples=60)


def all_steps(plan: EpochPlan) -> np.ndarray:
    return np.concatenate([plan.window(index) for index in range(plan.n_windows)])


@law
@given(cell_ids=cell_sets, sizes=sizes)
def test_an_epoch_visits_every_cell_at_most_once_and_drops_less_than_a_step(cell_ids, sizes):
    sizes["batch_size"] = min(sizes["batch_size"], len(cell_ids))
    plan = plan_epoch(cell_ids, **sizes)
    steps = all_steps(plan)
    assert steps.dtype == np.int64
    assert steps.shape == (plan.n_steps, sizes["batch_size"])
    assert len(np.unique(steps)) == steps.size == plan.n_steps * sizes["batch_size"]
    assert np.isin(steps, cell_ids).all()
    assert plan.n_dropped == len(cell_ids) - steps.size < sizes["batch_size"]


@law
@given(cell_ids=cell_sets, sizes=sizes)
def test_a_block_is_a_function_of_the_arguments_alone(cell_ids, sizes):
    sizes["batch_size"] = min(sizes["batch_size"], len(cell_ids))
    blocks = [plan_epoch(cell_ids, **sizes).window(i) for i in range(plan_epoch(cell_ids, **sizes).n_windows)]
    again = plan_epoch(cell_ids.copy(), **sizes)
    for index in reversed(range(again.n_windows)):
        np.testing.assert_array_equal(again.window(index), blocks[index])


def bands_laid_out_slowly(cell_ids, *, seed, epoch, chunk_size):
    chunks = [
        [cell for cell in cell_ids if cell // chunk_size == chunk] for chunk in sorted(set(cell_ids // chunk_size))
    ]
    order = np.random.default_rng([seed, epoch]).permutation(len(chunks))
    return [cell for chunk in order for cell in chunks[chunk]]


@law
@given(cell_ids=cell_sets, sizes=sizes)
def test_blocks_and_lanes_are_consecutive_parts_of_the_shuffled_bands(cell_ids, sizes):
    batch_size = sizes["batch_size"] = min(sizes["batch_size"], len(cell_ids))
    plan = plan_epoch(cell_ids, **sizes)
    windows = bands_laid_out_slowly(cell_ids, **{name: sizes[name] for name in ("seed", "epoch", "chunk_size")})
    position = {cell: at for at, cell in enumerate(windows)}
    length = max(1, sizes["chunks_per_window"] * sizes["chunk_size"] // batch_size)
    for index in range(plan.n_windows):
        block = plan.window(index)
        assert len(block) == (length if index < plan.n_windows - 1 else plan.n_steps - index * length)
        end = len(windows) if index == plan.n_windows - 1 else (index + 1) * length * batch_size
        assert all(index * length * batch_size <= position[cell] < end for cell in block.flat)
        edges = [rank_group * batch_size // sizes["rank_groups"] for rank_group in range(sizes["rank_groups"] + 1)]
        rank_groups = [[position[cell] for cell in block[:, a:b].flat] for a, b in pairwise(edges)]
        rank_groups = [rank_group for rank_group in rank_groups if rank_group]
        assert all(max(left) < min(right) for left, right in pairwise(rank_groups))


@law
@given(cell_ids=cell_sets, sizes=sizes, world_size=st.integers(1, 4))
def test_ranks_together_train_on_the_same_cells_for_every_world_size(cell_ids, sizes, world_size):
    sizes["batch_size"] = min(sizes["batch_size"], len(cell_ids) // world_size) * world_size
    if sizes["batch_size"] == 0:
        return
    plan = plan_epoch(cell_ids, **sizes)
    for index in range(plan.n_windows):
        ranks = [plan.steps(index, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {len(cells) for steps in ranks for cells in steps} == {sizes["batch_size"] // world_size}
        np.testing.assert_array_equal(np.hstack(ranks), plan.window(index))


def test_epochs_and_seeds_differ_and_so_do_the_dropped_cells():
    cell_ids = np.arange(1000)
    visited = [set(all_steps(plan_epoch(cell_ids, seed=7, epoch=epoch, batch_size=300)).flat) for epoch in range(5)]
    assert len({frozenset(set(range(1000)) - cells) for cells in visited}) == 5
    one, other = (all_steps(plan_epoch(cell_ids, seed=seed, epoch=0, batch_size=100)) for seed in (1, 2))
    assert (one != other).any()


def test_every_cell_is_dropped_equally_often():
    dropped = np.ones(70)
    for epoch in range(400):
        plan = plan_epoch(np.arange(70), seed=0, epoch=epoch, batch_size=20, chunk_size=8, chunks_per_window=3)
        dropped[all_steps(plan).ravel()] -= 1 / 400
    assert abs(dropped.mean() - 10 / 70) < 1e-9
    assert dropped.max() < 0.24
    assert dropped.min() > 0.06


def test_a_block_stays_bounded_when_a_filter_leaves_few_cells_of_each_band():
    plan = plan_epoch(np.arange(0, 2_000_000, 100), seed=0, epoch=0, batch_size=32, chunk_size=128, chunks_per_window=2)
    assert max(plan.window(index).size for index in range(plan.n_windows)) == 256


def entropy(donors: np.ndarray) -> float:
    share = np.unique(donors, return_counts=True)[1] / len(donors)
    return float(-(share * np.log(share)).sum())


def test_batches_mix_donors_that_lie_in_contiguous_runs():
    rng = np.random.default_rng(0)
    borders = np.sort(rng.choice(np.arange(1, 300_000), 99, replace=False))
    donor_of_cell = np.searchsorted(borders, np.arange(300_000), side="right")
    steps = all_steps(plan_epoch(np.arange(300_000), seed=0, epoch=0, batch_size=32))
    found = np.mean([entropy(donor_of_cell[cells]) for cells in steps[::20]])
    ideal = np.mean([entropy(rng.choice(donor_of_cell, 32, replace=False)) for _ in range(400)])
    assert found / ideal > 0.88


def test_columns_of_a_rank_touch_only_its_share_of_the_bands():
    plan = plan_epoch(np.arange(1 << 17), seed=0, epoch=0, batch_size=64)
    for index in range(plan.n_windows):
        chunks = [set(np.concatenate(plan.steps(index, rank=rank, world_size=4)) // 2048) for rank in range(4)]
        assert [len(mine) for mine in chunks] == [8, 8, 8, 8]
        assert len(set.union(*chunks)) == 32


def test_bands_are_found_across_scans(monkeypatch):
    monkeypatch.setattr(plans, "_SCANNED_TOGETHER", 1000)
    cell_ids = np.flatnonzero(np.random.default_rng(0).random(40_000) < 0.3)
    plan = plan_epoch(cell_ids, seed=0, epoch=0, batch_size=10, chunk_size=64)
    assert len(plan.chunk_starts) == len(np.unique(cell_ids // 64))


@law
@given(
    cell_ids=cell_sets, batch_size=st.integers(1, 20), cells_per_window=st.integers(1, 60), world_size=st.integers(1, 4)
)
def test_validation_visits_every_cell_once_in_order_whatever_the_ranks(
    cell_ids, batch_size, cells_per_window, world_size
):
    plan = plan_validation(cell_ids, batch_size, cells_per_window=cells_per_window)
    alone = [cells for index in range(plan.n_windows) for cells in plan.steps(index)]
    np.testing.assert_array_equal(np.concatenate(alone), cell_ids)
    assert [len(cells) for cells in alone[:-1]] == [batch_size] * (plan.n_steps - 1)
    assert plan.n_dropped == 0
    for rank in range(world_size):
        blocks = [plan.steps(index, rank=rank, world_size=world_size) for index in range(plan.n_windows)]
        mine = [cells.tolist() for block in blocks for cells in block]
        assert mine == [cells.tolist() for cells in alone[rank::world_size]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell_ids": np.array([1, 2, 2])}, "found 2 before 2"),
        ({"cell_ids": np.array([1, 5, 3])}, "found 5 before 3"),
        ({"cell_ids": np.arange(9.0)}, "found float64"),
        ({"cell_ids": np.arange(8).reshape(4, 2)}, r"shape \(4, 2\)"),
        ({"cell_ids": np.arange(1)}, "found 1 cells, expected at least the 2"),
        ({"batch_size": 0}, "batch_size >= 1, found 0"),
        ({"chunk_size": 0}, "chunk_size >= 1"),
        ({"chunks_per_window": -1}, "chunks_per_window >= 1"),
        ({"rank_groups": 0}, "rank_groups >= 1"),
        ({"seed": -1}, "seed >= 0"),
        ({"epoch": -1}, "epoch >= 0"),
    ],
)
def test_plan_epoch_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_epoch(**{"cell_ids": np.arange(9), "seed": 0, "epoch": 0, "batch_size": 2, **arguments})


def test_plan_validation_refuses():
    with pytest.raises(ValueError, match="no cells to validate on"):
        plan_validation(np.zeros(0, np.int64), 2)
    with pytest.raises(ValueError, match="found 5 before 3"):
        plan_validation(np.array([5, 3]), 2)
    with pytest.raises(ValueError, match="cells_per_window >= 1"):
        plan_validation(np.arange(3), 2, cells_per_window=0)


def test_blocks_and_ranks_that_do_not_exist_are_named():
    plan, validation = plan_epoch(np.arange(8), seed=0, epoch=0, batch_size=4), plan_validation(np.arange(8), 4)
    for missing in (1, -1):
        with pytest.raises(IndexError, match=re.escape(f"block in [0, 1), found {missing}")):
            plan.window(missing)
        with pytest.raises(IndexError, match=re.escape(f"block in [0, 1), found {missing}")):
            validation.steps(missing)
    with pytest.raises(ValueError, match="multiple of 3"):
        plan.steps(0, rank=0, world_size=3)
    with pytest.raises(ValueError, match=re.escape("rank in [0, 2), found 2")):
        validation.steps(0, rank=2, world_size=2)
    with pytest.raises(ValueError, match="multiple of 4"):
        rank_columns(2, 0, 4)
    assert rank_columns(8, 1, 4) == slice(2, 4)
