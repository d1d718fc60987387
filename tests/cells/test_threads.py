"""Daemon threads: results in order, errors where they are due, a lower priority only if enabled."""

import os
import sys
import threading
from collections.abc import Iterator

import pytest

from scgpt_hf.cells import threads
from scgpt_hf.cells.threads import NICENESS, DaemonThreadPool, in_order, n_cores, prefetch, set_background_priority


@pytest.fixture
def priority(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether the priority of background threads is lowered, for one test."""
    before = threads._background_priority.is_set()
    set_background_priority(request.param)
    yield request.param
    set_background_priority(before)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has a priority for each thread")
@pytest.mark.parametrize("priority", [False, True], indirect=True)
def test_only_background_threads_get_a_lower_priority_and_only_if_enabled(priority):
    def niceness() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = niceness()
    with DaemonThreadPool(2, "test-priority") as pool:
        found = [pool.submit(niceness).result(), *prefetch(niceness() for _ in range(1))]
    assert found == [max(NICENESS, before) if priority else before] * 2
    assert niceness() == before


def test_n_cores_is_the_number_of_cores_that_the_process_may_use():
    assert 1 <= n_cores() <= os.cpu_count()


@pytest.mark.parametrize("n_ahead", [0, 1, 3, 20])
def test_in_order_yields_in_order_and_starts_at_most_n_ahead_further_tasks(n_ahead):
    started = []

    def tasks():
        for number in range(10):
            started.append(number)
            yield lambda number=number: number * number

    with DaemonThreadPool(3, "test-in-order") as pool:
        for number, result in enumerate(in_order(pool, tasks(), n_ahead=n_ahead)):
            assert result == number * number
            assert len(started) == min(10, number + n_ahead + 1)


def test_in_order_raises_the_error_of_a_task_when_its_result_is_due():
    with DaemonThreadPool(2, "test-in-order") as pool:
        results = in_order(pool, [lambda: 1, lambda: 1 // 0, lambda: 3], n_ahead=2)
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)


@pytest.mark.parametrize("depth", [1, 3, 20])
def test_prefetch_yields_all_items_in_order_and_holds_at_most_depth_of_them(depth):
    started = []

    def items():
        for number in range(10):
            started.append(number)
            yield None if number == 5 else number

    for position, item in enumerate(prefetch(items(), depth)):
        assert item == (None if position == 5 else position)
        # the one in use, those in the queue, and one that waits for a place in it
        assert len(started) <= position + depth + 2


def test_prefetch_calls_while_waiting_until_an_item_is_ready_and_raises_its_error(monkeypatch):
    monkeypatch.setattr(threads, "WAITING_INTERVAL_S", 0.01)
    ready, released, calls, received = threading.Event(), threading.Event(), [], []

    def items():
        ready.wait(60)
        yield "item"
        released.wait(60)

    def callback():
        calls.append(len(calls))
        if received:
            raise InterruptedError("stop")
        if len(calls) == 3:
            ready.set()

    monkeypatch.setattr(threads, "JOIN_TIMEOUT_S", 0.05)
    batches = prefetch(items(), while_waiting=callback)
    received.append(next(batches))
    assert len(calls) >= 3
    with pytest.raises(InterruptedError):
        next(batches)
    released.set()


def test_a_pool_grows_but_does_not_shrink_and_not_after_its_shutdown():
    pool = DaemonThreadPool(1, "growing")
    barrier = threading.Barrier(3)
    pool.grow(3)
    assert list(pool.map(lambda _: barrier.wait(30) < 3, range(3))) == [True] * 3  # three threads meet
    pool.grow(2)
    assert len(pool) == 3
    pool.shutdown()
    pool.grow(5)
    assert len(pool) == 3
