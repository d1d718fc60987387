"""Test the loader of the trainer, and the prefetching under it."""

import threading
import time

import pytest

from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.loader import StreamLoader


def numbers_from(start: int):
    return ({"number": number} for number in range(start, 100))


def test_prefetch_keeps_the_order_raises_errors_of_its_thread_and_stops_it():
    def broken():
        yield from ({"number": number} for number in range(20))
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(batch["number"] for batch in prefetch(broken(), depth=3))
    assert seen == list(range(20))

    others = set(threading.enumerate())
    endless = prefetch(iter(lambda: {"number": 0}, None), depth=2)
    next(endless)
    own = set(threading.enumerate()) - others
    assert own
    endless.close()
    assert not [thread for thread in own if thread.is_alive()]


def test_the_loader_counts_batches_that_were_consumed_not_those_that_were_read():
    loader = StreamLoader(numbers_from, epoch_ends=(10, 20, 30))
    assert [batch["number"] for batch in loader] == list(range(10))
    batches = iter(loader)
    assert [next(batches)["number"] for _ in range(3)] == [10, 11, 12]
    time.sleep(0.05)  # the background thread reads more
    assert loader.consumed == 13
    loader.close()


def test_a_loader_resumes_in_the_middle_of_an_epoch():
    loader = StreamLoader(numbers_from, epoch_ends=(10, 20, 30))
    loader.seek(13)
    assert [batch["number"] for batch in loader] == list(range(13, 20))
    assert [batch["number"] for batch in loader] == list(range(20, 30))
    assert not list(loader)
    loader.close()


def test_a_stream_that_covers_some_epochs_is_followed_by_another():
    opened = []

    def ten_more(start: int):
        opened.append(start)
        return ({"number": number} for number in range(start, start + 10))

    loader = StreamLoader(ten_more, epoch_ends=(10, 20))
    assert [batch["number"] for _ in range(2) for batch in loader] == list(range(20))
    assert opened == [0, 10]
    loader.close()


def test_the_length_is_that_of_the_longest_epoch():
    assert len(StreamLoader(numbers_from, epoch_ends=(10, 25, 30))) == 15
