"""Threads for reading that never keep the interpreter from ending.

`concurrent.futures.ThreadPoolExecutor` waits at exit for every task that has begun, and a read from a store that has
fallen silent may take minutes. These threads are daemons: whoever stops waits a moment for them, then leaves. So does
the interpreter itself when it ends: a thread that comes back to it from C++ any later aborts the process.
"""

import atexit
import logging
import os
import queue
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Executor, Future
from contextlib import suppress
from functools import partial
from typing import Any, TypeAlias, TypeVar

logger = logging.getLogger(__name__)

JOIN_TIMEOUT_S = (
    5.0  # waited for a read in progress when its reader closes; a chunk of a local store takes less than one
)

PULSE_S = 0.5  # between two looks at whether waiting for an item still makes sense

NICENESS = 10  # of threads that prepare data: the training thread gets a core first, they get what is left

Item = TypeVar("Item")
Result = TypeVar("Result")

_Tasks: TypeAlias = "queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]"
_pools: "weakref.WeakSet[DaemonThreadPool]" = weakref.WeakSet()


class DaemonThreadPool(Executor):
    """An executor of daemon threads; they end when it is shut down or no longer used."""

    def __init__(self, n_threads: int, name: str) -> None:
        """Start the threads, named `name` and a number."""
        self._tasks: _Tasks = queue.SimpleQueue()
        self._threads = [_DaemonThread(self._tasks, f"{name}_{number}") for number in range(n_threads)]
        self._open, self._lock = True, threading.Lock()
        _pools.add(self)
        for thread in self._threads:
            thread.start()

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Have a thread call `fn`; see `concurrent.futures.Executor`.

        Raises:
            RuntimeError: the threads were shut down.
        """
        future: Future[Result] = Future()
        with self._lock:
            if not self._open:
                raise RuntimeError("the reading threads were shut down")
            self._tasks.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """End the threads: cancel what has not begun, and wait up to `JOIN_TIMEOUT_S` for what has."""
        with self._lock:
            self._open = False
            with suppress(queue.Empty):
                while cancel_futures:
                    if (task := self._tasks.get_nowait()) is not None:
                        task[0].cancel()
        self._end()
        if wait:
            join_within(self._threads, JOIN_TIMEOUT_S)

    def __del__(self) -> None:
        self._end()

    def _end(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)


def in_order(
    executor: Executor, tasks: Iterable[Callable[[], Result]], *, n_ahead: int
) -> Generator[Result, None, None]:
    """Yield the results of tasks in their order; up to `n_ahead` tasks more are begun before one is asked for.

    What a task raises is raised where its result was due; so is what `tasks` raises, a few results early.
    """
    pending: deque[Future[Result]] = deque()
    for task in tasks:
        pending.append(executor.submit(task))
        if len(pending) > n_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def prefetch(  # noqa: C901
    items: Iterable[Item], depth: int = 8, *, while_waiting: Callable[[], object] | None = None
) -> Generator[Item, None, None]:
    """Yield items in order while a background thread prepares the next `depth` of them.

    An error in the thread is raised here, where its item was due. Closing the generator stops the thread, and waits a
    moment for it: a read that hangs is left behind.

    Args:
        items: what is read, e.g. batches.
        depth: items that are ready at most.
        while_waiting: called every half second while an item is due and not ready; what it raises ends the wait.
    """
    ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def hand_over(item: object) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
            except queue.Full:
                continue
            return True
        return False

    def work() -> None:
        lower_priority()
        try:
            for item in items:
                if not hand_over(item):
                    return
            hand_over(None)
        except BaseException as error:  # noqa: BLE001 — nothing is swallowed: the consumer raises it
            hand_over(error)

    thread = threading.Thread(target=work, name="scgpt-read-ahead", daemon=True)
    thread.start()

    def receive() -> Any:
        while while_waiting is not None:
            try:
                return ready.get(timeout=PULSE_S)
            except queue.Empty:
                while_waiting()
        return ready.get()

    try:
        while (item := receive()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stopped.set()
        join_within([thread], JOIN_TIMEOUT_S)


def lower_priority() -> None:
    """Lower the priority of the calling thread, and of those it will start, where Linux sets it for each thread.

    Data is prepared ahead, so its threads can wait while the training thread is busy; when that waits for data, they
    have the cores to themselves.
    """
    if sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


def n_cores() -> int:
    """Return the cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join_within(threads: Sequence[threading.Thread], timeout_s: float) -> None:
    """Wait for threads to end, at most so long altogether; those that have not are named in the log and left."""
    until = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if busy := [thread.name for thread in threads if thread.is_alive()]:
        logger.warning(
            "%s did not end within %g s: a read hangs; it ends by itself or with the process", busy, timeout_s
        )


class _DaemonThread(threading.Thread):
    """Does tasks until it finds None among them."""

    def __init__(self, tasks: _Tasks, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.tasks = tasks

    def run(self) -> None:
        lower_priority()
        while (task := self.tasks.get()) is not None:
            future, call = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 — nothing is swallowed: who asks for the result gets it
                    future.set_exception(error)
            del task, future, call  # a thread that waits keeps nothing alive


@atexit.register
def _end_all() -> None:
    """End the threads of readers that nobody shut down, before the interpreter ends."""
    for pool in list(_pools):
        pool.shutdown(wait=False)
    join_within([thread for thread in threading.enumerate() if isinstance(thread, _DaemonThread)], JOIN_TIMEOUT_S)
