"""Reading threads: they work in order, pass errors on, and give way to the training thread."""

import os
import sys
import threading

import pytest

from scgpt_hf.cells.threads import NICENESS, DaemonThreadPool, in_order, n_cores


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_reading_threads_give_way_and_leave_the_caller_its_priority():
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    with DaemonThreadPool(2, "test-reading") as pool:
        assert pool.submit(priority).result() == max(NICENESS, before)
    assert priority() == before


def test_n_cores_is_what_the_process_may_use():
    assert 1 <= n_cores() <= os.cpu_count()


@pytest.mark.parametrize("n_ahead", [0, 1, 3, 20])
def test_in_order_yields_in_order_and_begins_only_so_many_tasks_ahead(n_ahead):
    begun = []

    def tasks():
        for number in range(10):
            begun.append(number)
            yield lambda number=number: number * number

    with DaemonThreadPool(3, "test-in-order") as pool:
        for number, result in enumerate(in_order(pool, tasks(), n_ahead=n_ahead)):
            assert result == number * number
            assert len(begun) == min(10, number + n_ahead + 1)


def test_in_order_raises_what_a_task_raised_where_its_result_was_due():
    with DaemonThreadPool(2, "test-in-order") as pool:
        results = in_order(pool, [lambda: 1, lambda: 1 // 0, lambda: 3], n_ahead=2)
        assert next(results) == 1
        with pytest.raises(ZeroDivisionError):
            next(results)
