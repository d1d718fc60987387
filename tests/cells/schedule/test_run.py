"""The schedule of a run: every cell once an epoch, however often the batch size changes; histories replay exactly."""

import doctest
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.schedule import run as run_module
from scgpt_hf.cells.schedule.epoch import plan_epoch, rank_columns
from scgpt_hf.cells.schedule.run import RunSchedule, plan_run, unvisited_cells

ORDER = {"seed": 3, "chunk_size": 16, "chunks_per_window": 2}
law = settings(deadline=None, max_examples=50)
cell_sets = st.lists(st.integers(0, 400), min_size=20, max_size=120, unique=True).map(lambda ids: np.array(sorted(ids)))
histories = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), max_size=4)


def all_steps(schedule: RunSchedule) -> list[np.ndarray]:
    """The cells of every step of a run."""
    return [schedule.cells(step) for step in range(schedule.n_steps)]


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(run_module).failed == 0


@law
@given(cell_ids=cell_sets, history=histories, batch_size=st.integers(1, 20))
def test_every_cell_is_visited_once_an_epoch_however_the_batch_size_changes(cell_ids, history, batch_size):
    schedule = plan_run(cell_ids, batch_size=batch_size, n_epochs=3, history=history, **ORDER)
    steps = all_steps(schedule)
    for start, stop in pairwise([0, *schedule.epoch_ends]):
        visited = np.concatenate(steps[start:stop])
        assert len(np.unique(visited)) == len(visited)
        # Less than one step is dropped, of the batch size that the epoch ended with; no size here exceeds 20.
        assert len(visited) > len(cell_ids) - 20
    sizes = [size for size, n in history for _ in range(n)]
    assert [len(step) for step in steps] == [*sizes, *[batch_size] * len(steps)][: len(steps)]


@law
@given(cell_ids=cell_sets, history=histories, batch_size=st.integers(1, 20), data=st.data())
def test_a_history_replays_the_same_steps(cell_ids, history, batch_size, data):
    schedule = plan_run(cell_ids, batch_size=batch_size, n_epochs=3, history=history, **ORDER)
    step = data.draw(st.integers(0, schedule.n_steps))
    size = data.draw(st.integers(1, 20))
    resumed = plan_run(cell_ids, batch_size=size, n_epochs=3, history=schedule.history(step), **ORDER)
    assert resumed.start_step == step
    for before, after in zip(all_steps(schedule)[:step], all_steps(resumed)[:step], strict=True):
        np.testing.assert_array_equal(before, after)


@law
@given(cell_ids=cell_sets, history=histories, batch_size=st.integers(1, 20), data=st.data())
def test_a_run_that_resumes_with_the_same_batch_size_is_not_planned_again(cell_ids, history, batch_size, data):
    schedule = plan_run(cell_ids, batch_size=batch_size, n_epochs=3, history=history, **ORDER)
    assume(schedule.start_step <= schedule.n_steps)  # a history may be longer than the run
    step = data.draw(st.integers(schedule.start_step, schedule.n_steps))
    resumed = plan_run(cell_ids, batch_size=batch_size, n_epochs=3, history=schedule.history(step), **ORDER)
    assert [segment.start for segment in resumed.segments] == [segment.start for segment in schedule.segments]
    np.testing.assert_array_equal(np.concatenate(all_steps(resumed)), np.concatenate(all_steps(schedule)))


@law
@given(cell_ids=cell_sets, batch_size=st.integers(1, 20), n_steps=st.integers(0, 100))
def test_unvisited_cells_are_those_in_no_earlier_step(cell_ids, batch_size, n_steps):
    plan = plan_epoch(cell_ids, epoch=0, batch_size=batch_size, **ORDER)
    n_steps = min(n_steps, plan.n_steps)
    steps = [step for index in range(plan.n_windows) for step in plan.window(index)][:n_steps]
    visited = {cell for step in steps for cell in step}
    assert unvisited_cells(plan, n_steps).tolist() == sorted(set(cell_ids.tolist()) - visited)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_a_resumed_run_trains_on_the_same_global_steps_with_any_number_of_processes(world_size):
    plans, _ = plan_run(np.arange(200), batch_size=12, n_epochs=2, history=[(12, 7)], **ORDER).plans_from(7)
    for index in range(plans[0].n_windows):
        ranks = [plans[0].steps(index, rank=rank, world_size=world_size) for rank in range(world_size)]
        for of_ranks, step in zip(zip(*ranks, strict=True), plans[0].window(index), strict=True):
            np.testing.assert_array_equal(np.concatenate(of_ranks), step)
    assert rank_columns(12, 0, world_size) == slice(0, 12 // world_size)


def test_plans_can_be_followed_from_the_middle_of_a_segment():
    schedule = plan_run(np.arange(200), batch_size=10, n_epochs=2, history=[(20, 4)], **ORDER)
    assert schedule.epoch_ends == [16, 36]
    for step in range(4, 36):
        plans, n_skipped = schedule.plans_from(step)
        index, row = divmod(n_skipped, plans[0].steps_per_window)
        np.testing.assert_array_equal(plans[0].window(index)[row], schedule.cells(step))
    assert [plan.epoch for plan in schedule.plans_from(4)[0]] == [0, 1]
    assert schedule.plans_from(36)[0][0].epoch == 1


def test_the_first_epoch_can_have_arguments_of_its_own():
    schedule = plan_run(
        np.arange(200), batch_size=10, n_epochs=2, first_epoch={"chunks_per_window": 5}, **{**ORDER, "rank_groups": 1}
    )
    assert [segment.plan.steps_per_window for segment in schedule.segments] == [8, 3]


def test_a_run_lasts_for_its_epochs_or_steps():
    cells = np.arange(95)
    assert plan_run(cells, batch_size=10, n_epochs=2.5, **ORDER).epoch_ends == [9, 18, 23]
    assert plan_run(cells, batch_size=10, n_epochs=2, max_steps=11, **ORDER).epoch_ends == [9, 11]
    with pytest.raises(ValueError, match="num_train_epochs or max_steps above 0, found 0"):
        plan_run(cells, batch_size=10, n_epochs=0, **ORDER)
    with pytest.raises(ValueError, match="95 cells"):
        plan_run(cells, batch_size=100, n_epochs=1, **ORDER)


def test_progress_is_counted_in_epochs_of_full_length():
    schedule = plan_run(np.arange(95), batch_size=10, n_epochs=2.5, **ORDER)
    assert [schedule.epochs_done(step) for step in (0, 3, 9, 18, 23)] == pytest.approx([0, 1 / 3, 1, 2, 2 + 5 / 9])


def test_a_change_of_the_batch_size_is_recorded():
    same = plan_run(np.arange(95), batch_size=10, n_epochs=2, history=[(10, 4)], **ORDER)
    assert not same.changes_batch_size
    assert same.equivalent_steps(12) == 12
    changed = plan_run(np.arange(95), batch_size=5, n_epochs=2, history=[(10, 4)], **ORDER)
    assert changed.changes_batch_size
    assert changed.epoch_ends == [15, 34]
    assert changed.history(20) == [(10, 4), (5, 16)]
    assert changed.history(3) == [(10, 3)]
    assert changed.equivalent_steps(20) == 4 + 16 / 2
