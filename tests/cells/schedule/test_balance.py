"""Balanced epochs: expected draws by a formula, even draws within groups, the same steps for any number of ranks."""

import doctest
from itertools import pairwise

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.schedule import balance as balance_module
from scgpt_hf.cells.schedule.balance import REPEAT, balance_groups, plan_balanced, split_draws
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.schedule.run import plan_run

ORDER = {"seed": 3, "chunk_size": 16, "chunks_per_window": 2}
law = settings(deadline=None, max_examples=50)
sizes_of_groups = st.lists(st.integers(1, 60), min_size=2, max_size=5)


def labels_of(sizes: list[int], n_without: int = 0, seed: int = 0) -> pd.Series:
    """Cells with ids 7, 10, 13, … in random order of their groups g0, g1, …; some without a label."""
    names = np.repeat([*(f"g{group}" for group in range(len(sizes))), "unknown"], [*sizes, n_without])
    names = np.random.default_rng(seed).permutation(names)
    return pd.Series(names, index=np.arange(len(names)) * 3 + 7)


def times_drawn(draws: np.ndarray, labels: pd.Series) -> pd.Series:
    """Number of draws of each cell."""
    return pd.Series(draws % REPEAT).value_counts().reindex(labels.index, fill_value=0)


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(balance_module).failed == 0


@law
@given(sizes=sizes_of_groups, n_without=st.integers(0, 20), power=st.floats(0, 1), epoch=st.integers(0, 5))
def test_groups_are_drawn_by_the_formula_and_evenly_within(sizes, n_without, power, epoch):
    labels = labels_of(sizes, n_without)
    draws = balance_groups(labels, power).draw(seed=1, epoch=epoch)
    assert len(draws) == len(labels)
    assert (np.diff(draws) > 0).all()
    n = times_drawn(draws, labels)
    weights = [size ** (1 - power) for size in sizes]
    for group, size in enumerate(sizes):
        of_group = n[labels == f"g{group}"]
        assert abs(of_group.sum() - sum(sizes) * weights[group] / sum(weights)) < 1 + 1e-6
        assert of_group.max() - of_group.min() <= 1
        assert len(of_group) == size
    assert (n[labels == "unknown"] == 1).all()


def test_the_mean_over_epochs_is_the_expectation_of_groups_and_of_cells():
    labels = labels_of([40, 7, 3])
    balance = balance_groups(labels, 0.7)
    n = np.mean([times_drawn(balance.draw(seed=0, epoch=epoch), labels) for epoch in range(2000)], axis=0)
    for name, size, expected in zip(balance.names, balance.sizes, balance.expected_draws, strict=True):
        np.testing.assert_allclose(n[labels == name], expected / size, atol=0.06)
        assert n[labels == name].sum() == pytest.approx(expected, abs=0.05)


@law
@given(sizes=sizes_of_groups, power=st.floats(0, 1))
def test_all_draws_are_scheduled_once_with_other_ones_in_each_epoch(sizes, power):
    balance = balance_groups(labels_of(sizes), power)
    batch_size = min(8, len(balance.cell_ids))
    schedule = plan_run(balance.cell_ids, batch_size=batch_size, n_epochs=2, balance=balance, **ORDER)
    natural = plan_run(balance.cell_ids, batch_size=batch_size, n_epochs=2, **ORDER)
    assert schedule.epoch_ends == natural.epoch_ends
    for epoch, segment in enumerate(schedule.segments):
        planned = np.concatenate([segment.plan.window(index) for index in range(segment.plan.n_windows)]).ravel()
        assert len(np.unique(planned)) == len(planned)
        assert not set(planned.tolist()) - set(balance.draw(seed=3, epoch=epoch).tolist())
        assert len(planned) == len(balance.cell_ids) - segment.plan.n_dropped


def test_a_power_of_0_is_natural_order():
    balance = balance_groups(labels_of([50, 9, 4], 6), 0.0)
    plans = (
        plan_balanced(balance, epoch=2, batch_size=8, **ORDER),
        plan_epoch(balance.cell_ids, epoch=2, batch_size=8, **ORDER),
    )
    for index in range(plans[0].n_windows):
        np.testing.assert_array_equal(plans[0].window(index), plans[1].window(index))


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_resumed_run_trains_on_the_same_steps_with_any_number_of_ranks(world_size):
    balance = balance_groups(labels_of([150, 40, 5, 2]), 1.0)
    arguments = {"batch_size": 8, "n_epochs": 2, "balance": balance, **ORDER}
    uninterrupted = plan_run(balance.cell_ids, **arguments)
    plans, skipped = plan_run(balance.cell_ids, history=[(8, 7)], **arguments).plans_from(7)
    assert skipped == 7
    step = 0
    for plan in plans:
        for index in range(plan.n_windows):
            ranks = [plan.steps(index, rank=rank, world_size=world_size) for rank in range(world_size)]
            for of_ranks in zip(*ranks, strict=True):
                np.testing.assert_array_equal(np.concatenate(of_ranks) % REPEAT, uninterrupted.cells(step))
                step += 1
    assert step == uninterrupted.n_steps


def test_an_epoch_that_continues_with_another_batch_size_visits_the_remaining_draws():
    balance = balance_groups(labels_of([150, 40, 5, 2]), 1.0)
    schedule = plan_run(balance.cell_ids, batch_size=5, n_epochs=2, history=[(8, 7)], balance=balance, **ORDER)
    assert [segment.plan.epoch for segment in schedule.segments] == [0, 0, 1]
    for epoch, (start, stop) in enumerate(pairwise([0, *schedule.epoch_ends])):
        visited = np.concatenate([schedule.cells(step) for step in range(start, stop)])
        drawn = pd.Series(balance.draw(seed=3, epoch=epoch) % REPEAT).value_counts()
        missing = drawn.sub(pd.Series(visited).value_counts(), fill_value=0)
        assert missing.min() >= 0
        assert missing.sum() < 8


def test_repeats_of_a_cell_are_spread_over_the_epoch():
    balance = balance_groups(labels_of([4000, 20]), 1.0)
    plan = plan_balanced(balance, epoch=0, batch_size=8, **ORDER)
    rare = set(balance.cell_ids[balance.order[-20:]].tolist())
    shares = [np.isin(plan.window(index) % REPEAT, list(rare)).mean() for index in range(plan.n_windows)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.01)
    # If repeats stayed together, half of the windows would be full of them.
    assert np.mean(np.array(shares) > 0.9) < 0.1


def test_split_draws_reads_each_cell_once():
    cells, rows = split_draws(np.array([9, 4, REPEAT + 9, 5, 3 * REPEAT + 4]))
    assert cells.tolist() == [4, 5, 9]
    assert cells[rows].tolist() == [9, 4, 9, 5, 4]
    cells, rows = split_draws(np.array([9, 4, 5]))
    assert (cells.tolist(), rows.tolist()) == ([9, 4, 5], [0, 1, 2])


@pytest.mark.parametrize("values", [["T cell"] * 4, ["unknown", None, "T cell", ""]])
def test_fewer_than_two_groups_raise(values):
    with pytest.raises(ValueError, match=r"at least two groups.*\['T cell'\].*balance_by"):
        balance_groups(pd.Series(values), 0.5)


def test_an_epoch_is_drawn_when_it_is_read():
    """A run plans all its epochs in advance, and must not hold the draws of all of them."""
    balance = balance_groups(labels_of([900, 90, 10]), 0.5)
    n_drawn = balance_module._plan_draws.cache_info().misses
    plan = plan_run(balance.cell_ids, batch_size=8, n_epochs=1000, balance=balance, **ORDER).segments[700].plan
    assert balance_module._plan_draws.cache_info().misses == n_drawn
    for index in range(plan.n_windows):
        plan.window(index)
    assert balance_module._plan_draws.cache_info().misses == n_drawn + 1
    assert balance_module._plan_draws.cache_info().maxsize == 2
