"""Plans of an epoch: properties that hold for any cells, sizes, seeds and numbers of ranks."""

import doctest
import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.schedule import epoch as epoch_module
from scgpt_hf.cells.schedule.epoch import EpochPlan, list_windows, plan_epoch, plan_validation, rank_columns

cell_sets = st.lists(st.integers(0, 400), min_size=1, max_size=150, unique=True).map(lambda ids: np.array(sorted(ids)))
plan_arguments = st.fixed_dictionaries(
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
    """The cells of all windows of a plan, shape (steps, batch_size)."""
    return np.concatenate([plan.window(index) for index in range(plan.n_windows)])


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(epoch_module).failed == 0


def test_the_example_of_the_module_docstring_is_right():
    plan = plan_epoch(np.arange(24), seed=2, epoch=0, batch_size=4, chunk_size=4, chunks_per_window=2, rank_groups=2)
    assert plan.chunk_starts.tolist() == [12, 20, 8, 16, 0, 4]
    assert [set(plan.window(index).flat) for index in range(3)] == [
        {*range(12, 16), *range(20, 24)},
        {*range(8, 12), *range(16, 20)},
        set(range(8)),
    ]
    assert plan.window(0).tolist() == [[14, 13, 22, 23], [12, 15, 21, 20]]


@law
@given(cell_ids=cell_sets, arguments=plan_arguments)
def test_an_epoch_visits_every_cell_at_most_once_and_drops_less_than_a_step(cell_ids, arguments):
    arguments["batch_size"] = min(arguments["batch_size"], len(cell_ids))
    plan = plan_epoch(cell_ids, **arguments)
    steps = all_steps(plan)
    assert steps.dtype == np.int64
    assert steps.shape == (plan.n_steps, arguments["batch_size"])
    assert len(np.unique(steps)) == steps.size == plan.n_steps * arguments["batch_size"]
    assert np.isin(steps, cell_ids).all()
    assert plan.n_dropped == len(cell_ids) - steps.size < arguments["batch_size"]


@law
@given(cell_ids=cell_sets, arguments=plan_arguments)
def test_a_window_depends_only_on_the_arguments_of_the_plan(cell_ids, arguments):
    arguments["batch_size"] = min(arguments["batch_size"], len(cell_ids))
    plan = plan_epoch(cell_ids, **arguments)
    windows = [plan.window(index) for index in range(plan.n_windows)]
    other = plan_epoch(cell_ids.copy(), **arguments)
    for index in reversed(range(other.n_windows)):
        np.testing.assert_array_equal(other.window(index), windows[index])


def shuffle_chunks_slowly(cell_ids: np.ndarray, *, seed: int, epoch: int, chunk_size: int) -> list[int]:
    """The cells with the chunks in shuffled order, laid end to end."""
    chunks = [
        [cell for cell in cell_ids if cell // chunk_size == chunk] for chunk in sorted(set(cell_ids // chunk_size))
    ]
    order = np.random.default_rng([seed, epoch]).permutation(len(chunks))
    return [cell for chunk in order for cell in chunks[chunk]]


@law
@given(cell_ids=cell_sets, arguments=plan_arguments)
def test_windows_and_rank_groups_are_consecutive_parts_of_the_shuffled_chunks(cell_ids, arguments):
    batch_size = arguments["batch_size"] = min(arguments["batch_size"], len(cell_ids))
    plan = plan_epoch(cell_ids, **arguments)
    cells = shuffle_chunks_slowly(cell_ids, **{name: arguments[name] for name in ("seed", "epoch", "chunk_size")})
    position = {cell: at for at, cell in enumerate(cells)}
    n_steps = max(1, arguments["chunks_per_window"] * arguments["chunk_size"] // batch_size)
    n_groups = arguments["rank_groups"]
    edges = [group * batch_size // n_groups for group in range(n_groups + 1)]
    for index in range(plan.n_windows):
        window = plan.window(index)
        is_last = index == plan.n_windows - 1
        assert len(window) == (plan.n_steps - index * n_steps if is_last else n_steps)
        end = len(cells) if is_last else (index + 1) * n_steps * batch_size
        assert all(index * n_steps * batch_size <= position[cell] < end for cell in window.flat)
        groups = [[position[cell] for cell in window[:, start:stop].flat] for start, stop in pairwise(edges)]
        groups = [group for group in groups if group]
        assert all(max(left) < min(right) for left, right in pairwise(groups))


@law
@given(cell_ids=cell_sets, arguments=plan_arguments, world_size=st.integers(1, 4))
def test_the_ranks_together_train_on_the_same_cells_for_every_world_size(cell_ids, arguments, world_size):
    arguments["batch_size"] = min(arguments["batch_size"], len(cell_ids) // world_size) * world_size
    if arguments["batch_size"] == 0:
        return
    plan = plan_epoch(cell_ids, **arguments)
    for index in range(plan.n_windows):
        ranks = [plan.steps(index, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {len(cells) for steps in ranks for cells in steps} == {arguments["batch_size"] // world_size}
        np.testing.assert_array_equal(np.hstack(ranks), plan.window(index))


def test_epochs_and_seeds_give_different_orders_and_different_dropped_cells():
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


def test_a_window_does_not_grow_when_a_filter_leaves_few_cells_of_each_chunk():
    plan = plan_epoch(np.arange(0, 2_000_000, 100), seed=0, epoch=0, batch_size=32, chunk_size=128, chunks_per_window=2)
    assert max(plan.window(index).size for index in range(plan.n_windows)) == 256


def entropy(donors: np.ndarray) -> float:
    """Shannon entropy of the donors of some cells, in nats."""
    share = np.unique(donors, return_counts=True)[1] / len(donors)
    return float(-(share * np.log(share)).sum())


def test_steps_mix_donors_that_are_stored_in_contiguous_runs():
    rng = np.random.default_rng(0)
    first_cells = np.sort(rng.choice(np.arange(1, 300_000), 99, replace=False))
    donor_of_cell = np.searchsorted(first_cells, np.arange(300_000), side="right")
    steps = all_steps(plan_epoch(np.arange(300_000), seed=0, epoch=0, batch_size=32))
    found = np.mean([entropy(donor_of_cell[cells]) for cells in steps[::20]])
    ideal = np.mean([entropy(rng.choice(donor_of_cell, 32, replace=False)) for _ in range(400)])
    assert found / ideal > 0.88


def test_the_columns_of_a_rank_need_only_its_share_of_the_chunks():
    plan = plan_epoch(np.arange(1 << 17), seed=0, epoch=0, batch_size=64)
    for index in range(plan.n_windows):
        chunks = [set(np.concatenate(plan.steps(index, rank=rank, world_size=4)) // 2048) for rank in range(4)]
        assert [len(own) for own in chunks] == [8, 8, 8, 8]
        assert len(set.union(*chunks)) == 32


def test_chunks_that_cross_the_edge_of_a_scan_are_found_once(monkeypatch):
    monkeypatch.setattr(epoch_module, "_IDS_PER_SCAN", 1000)
    cell_ids = np.flatnonzero(np.random.default_rng(0).random(40_000) < 0.3)
    plan = plan_epoch(cell_ids, seed=0, epoch=0, batch_size=10, chunk_size=64)
    assert len(plan.chunk_starts) == len(np.unique(cell_ids // 64))


@law
@given(
    cell_ids=cell_sets, batch_size=st.integers(1, 20), cells_per_window=st.integers(1, 60), world_size=st.integers(1, 4)
)
def test_validation_visits_every_cell_once_in_order_for_every_world_size(
    cell_ids, batch_size, cells_per_window, world_size
):
    plan = plan_validation(cell_ids, batch_size, cells_per_window=cells_per_window)
    steps = [cells for index in range(plan.n_windows) for cells in plan.steps(index)]
    np.testing.assert_array_equal(np.concatenate(steps), cell_ids)
    assert [len(cells) for cells in steps[:-1]] == [batch_size] * (plan.n_steps - 1)
    assert plan.n_dropped == 0
    for rank in range(world_size):
        windows = [plan.steps(index, rank=rank, world_size=world_size) for index in range(plan.n_windows)]
        of_rank = [cells.tolist() for window in windows for cells in window]
        assert of_rank == [cells.tolist() for cells in steps[rank::world_size]]


def test_windows_are_listed_with_steps_counted_through_all_plans():
    plans = [plan_validation(np.arange(50), 10, cells_per_window=20), plan_validation(np.arange(15), 5)]
    assert list_windows(plans) == [(0, 0, 0, 2), (0, 1, 2, 4), (0, 2, 4, 5), (1, 0, 5, 8)]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"cell_ids": np.array([1, 2, 2])}, "found 2 before 2"),
        ({"cell_ids": np.array([1, 5, 3])}, "found 5 before 3"),
        ({"cell_ids": np.arange(9.0)}, "found float64"),
        ({"cell_ids": np.arange(8).reshape(4, 2)}, r"shape \(4, 2\)"),
        ({"cell_ids": np.arange(1)}, "found 1 cells, expected at least the 2"),
        ({"batch_size": 0}, "batch_size >= 1, found 0"),
        ({"chunk_size": 0}, "chunk_size"),
        ({"chunks_per_window": -1}, "chunks_per_window"),
        ({"rank_groups": 0}, "rank_groups"),
        ({"seed": -1}, "seed"),
        ({"epoch": -1}, "epoch"),
    ],
)
def test_plan_epoch_rejects_invalid_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        plan_epoch(**{"cell_ids": np.arange(9), "seed": 0, "epoch": 0, "batch_size": 2, **arguments})


def test_plan_validation_rejects_invalid_arguments():
    with pytest.raises(ValueError, match="no cells to validate on"):
        plan_validation(np.zeros(0, np.int64), 2)
    with pytest.raises(ValueError, match="found 5 before 3"):
        plan_validation(np.array([5, 3]), 2)
    with pytest.raises(ValueError, match="cells_per_window"):
        plan_validation(np.arange(3), 2, cells_per_window=0)


def test_a_window_or_rank_out_of_range_raises():
    plan, validation = plan_epoch(np.arange(8), seed=0, epoch=0, batch_size=4), plan_validation(np.arange(8), 4)
    for missing in (1, -1):
        with pytest.raises(IndexError, match=re.escape(f"window in [0, 1), found {missing}")):
            plan.window(missing)
        with pytest.raises(IndexError, match=str(missing)):
            validation.steps(missing)
    with pytest.raises(ValueError, match=re.escape("rank in [0, 2), found 2")):
        validation.steps(0, rank=2, world_size=2)


def test_ranks_get_equal_columns_or_none():
    assert rank_columns(8, 1, 4) == slice(2, 4)
    with pytest.raises(ValueError, match="multiple of 4"):
        rank_columns(2, 0, 4)
    with pytest.raises(ValueError, match="multiple of 3"):
        plan_epoch(np.arange(8), seed=0, epoch=0, batch_size=4).steps(0, rank=0, world_size=3)
