"""Reading threads: they work in order, pass errors on, and give way to the training thread."""

import os
import sys
import threading

import pytest

from scgpt_hf.cells.threads import NICENESS, ReadingThreads, n_cores


@pytest.mark.skipif(sys.platform != "linux", reason="threads have priorities of their own on Linux only")
def test_reading_threads_give_way_and_leave_the_caller_its_priority():
    def priority() -> int:
        return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())

    before = priority()
    with ReadingThreads(2, "test-reading") as pool:
        assert pool.submit(priority).result() == max(NICENESS, before)
    assert priority() == before


def test_n_cores_is_what_the_process_may_use():
    assert 1 <= n_cores() <= os.cpu_count()
