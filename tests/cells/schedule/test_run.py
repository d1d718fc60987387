"""The schedule of a run: every cell once an epoch, however often the global batch changes, or the same steps if not."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.schedule.epoch import plan_epoch, rank_columns
from scgpt_hf.cells.schedule.run import cells_left, plan_run

ORDER = {"seed": 3, "chunk_size": 16, "chunks_per_window": 2}
law = settings(deadline=None, max_examples=50)
cell_sets = st.lists(st.integers(0, 400), min_size=20, max_size=120, unique=True).map(lambda ids: np.array(sorted(ids)))
histories = st.lists(st.tuples(st.integers(1, 20), st.integers(0, 30)), max_size=4)


def steps_of(schedule):
    return [schedule.cells(step) for step in range(schedule.n_steps)]


@law
@given(cell_ids=cell_sets, history=histories, batch_size=st.integers(1, 20))
def test_every_cell_is_trained_on_once_an_epoch_whatever_changed(cell_ids, history, batch_size):
    schedule = plan_run(cell_ids, batch_size=batch_size, n_epochs=3, history=history, **ORDER)
    steps = steps_of(schedule)
    for first, last in pairwise([0, *schedule.epoch_ends]):
        visited = np.concatenate(steps[first:last])
        assert len(np.unique(visited)) == len(visited)
        assert len(visited) > len(cell_ids) - 20  # what fills no step of the size it ended with
    sizes = [size for size, n in history for _ in range(n)]
    assert [len(step) for step in steps] == [*sizes, *[batch_size] * len(steps)][: len(steps)]


@law
@given(cell_ids=cell_sets, history=histories, batch_size=st.integers(1, 20), data=st.data())
def test_what_was_trained_before_stays_when_a_run_resumes_again(cell_ids, history, batch_size, data):
    schedule = plan_run(cell_ids, batch_size=batch_size, n_epochs=3, history=history, **ORDER)
    step = data.draw(st.integers(0, schedule.n_steps))
    size = data.draw(st.integers(1, 20))
    resumed = plan_run(cell_ids, batch_size=size, n_epochs=3, history=schedule.history(step), **ORDER)
    assert resumed.start == step
    for before, after in zip(steps_of(schedule)[:step], steps_of(resumed)[:step], strict=True):
        np.testing.assert_array_equal(before, after)
    same = plan_run(cell_ids, batch_size=batch_size, n_epochs=3, history=schedule.history(step), **ORDER)
    if step >= schedule.start:
        assert [segment.first for segment in same.segments] == [segment.first for segment in schedule.segments]
        np.testing.assert_array_equal(np.concatenate(steps_of(same)), np.concatenate(steps_of(schedule)))


@law
@given(cell_ids=cell_sets, batch_size=st.integers(1, 20), n_steps=st.integers(0, 100))
def test_what_is_left_of_an_epoch_is_what_was_not_visited(cell_ids, batch_size, n_steps):
    plan = plan_epoch(cell_ids, epoch=0, batch_size=batch_size, **ORDER)
    n_steps = min(n_steps, plan.n_steps)
    rows = [row for index in range(plan.n_windows) for row in plan.window(index)][:n_steps]
    assert cells_left(plan, n_steps).tolist() == sorted(set(cell_ids.tolist()) - {cell for row in rows for cell in row})


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_share_the_steps_of_a_resumed_run(world_size):
    """12 cells a step on 4 processes, then as many on any other number: the same cells in every global step."""
    schedule = plan_run(np.arange(200), batch_size=12, n_epochs=2, history=[(12, 7)], **ORDER)
    plan = schedule.plan_at(7)
    for index in range(plan.n_windows):
        ranks = [plan.steps(index, rank=rank, world_size=world_size) for rank in range(world_size)]
        for step, whole in zip(zip(*ranks, strict=True), plan.window(index), strict=True):
            np.testing.assert_array_equal(np.concatenate(step), whole)
    assert rank_columns(12, 0, world_size) == slice(0, 12 // world_size)


def test_plans_go_on_in_the_middle_of_a_leg():
    schedule = plan_run(np.arange(200), batch_size=10, n_epochs=2, history=[(20, 4)], **ORDER)
    assert schedule.epoch_ends == [16, 36]
    assert schedule.longest_epoch == 20
    for step in range(4, 36):
        plans, offset = schedule.plans_from(step)
        index, row = divmod(offset, plans[0].steps_per_window)
        np.testing.assert_array_equal(plans[0].window(index)[row], schedule.cells(step))
    assert [plan.epoch for plan in schedule.plans_from(4)[0]] == [0, 1]
    assert schedule.plans_from(36)[0][0].epoch == 1


def test_length_in_epochs_or_steps():
    cells = np.arange(95)
    assert plan_run(cells, batch_size=10, n_epochs=2.5, **ORDER).epoch_ends == [9, 18, 23]
    assert plan_run(cells, batch_size=10, n_epochs=2, max_steps=11, **ORDER).epoch_ends == [9, 11]
    schedule = plan_run(cells, batch_size=10, n_epochs=2.5, **ORDER)
    assert [schedule.epochs_done(step) for step in (0, 3, 9, 18, 23)] == pytest.approx([0, 1 / 3, 1, 2, 2 + 5 / 9])
    changed = plan_run(cells, batch_size=5, n_epochs=2, history=[(10, 4)], **ORDER)
    assert changed.epoch_ends == [15, 34]
    assert changed.history(20) == [(10, 4), (5, 16)]
    assert changed.history(3) == [(10, 3)]
    with pytest.raises(ValueError, match="num_train_epochs or max_steps above 0, found 0"):
        plan_run(cells, batch_size=10, n_epochs=0, **ORDER)
    with pytest.raises(ValueError, match="found 95 cells"):
        plan_run(cells, batch_size=100, n_epochs=1, **ORDER)
