"""Daemon threads for reading: a thread pool, ordered results, and prefetching.

`concurrent.futures.ThreadPoolExecutor` waits at exit for every task that has started, and a read from a store that no
longer answers may take minutes. The threads here are daemons, so they never keep a process alive: closing a pool or a
prefetching generator waits at most `JOIN_TIMEOUT_S` for a read in progress.
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

# Seconds to wait for a read in progress when its reader closes. A chunk of a local store takes less than one.
JOIN_TIMEOUT_S = 5.0

WAITING_INTERVAL_S = 0.5  # between two calls of `while_waiting`

NICENESS = 10  # of background threads, if enabled: the training thread gets a core first

Item = TypeVar("Item")
Result = TypeVar("Result")

_Tasks: TypeAlias = "queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None]"
_pools: "weakref.WeakSet[DaemonThreadPool]" = weakref.WeakSet()
_background_priority = threading.Event()
_END = object()  # marks the end of the items of `prefetch`


class DaemonThreadPool(Executor):
    """An executor of daemon threads, which end when it is shut down or garbage-collected."""

    def __init__(self, n_threads: int, name: str) -> None:
        """Start the threads.

        Args:
            n_threads: number of threads.
            name: prefix of their names, followed by a number.
        """
        self._tasks: _Tasks = queue.SimpleQueue()
        self._name = name
        self._threads: list[threading.Thread] = []
        self._open, self._lock = True, threading.Lock()
        _pools.add(self)
        self.grow(n_threads)

    def __len__(self) -> int:
        """Return the number of threads."""
        return len(self._threads)

    def grow(self, n_threads: int) -> None:
        """Start further threads until there are `n_threads`; a pool does not shrink."""
        with self._lock:
            for number in range(len(self._threads), n_threads if self._open else 0):
                thread = _DaemonThread(self._tasks, f"{self._name}_{number}")
                self._threads.append(thread)
                thread.start()

    def submit(self, fn: Callable[..., Result], /, *args: Any, **kwargs: Any) -> Future[Result]:
        """Schedule a call of `fn`; see `concurrent.futures.Executor.submit`.

        Raises:
            RuntimeError: the pool is shut down.
        """
        future: Future[Result] = Future()
        with self._lock:
            if not self._open:
                raise RuntimeError("cannot submit a task: the thread pool is shut down")
            self._tasks.put((future, partial(fn, *args, **kwargs)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = True) -> None:
        """Cancel the tasks that have not started and end the threads.

        Args:
            wait: wait for tasks in progress, up to `JOIN_TIMEOUT_S` in total.
            cancel_futures: whether tasks that have not started are cancelled; otherwise the threads run them first.
        """
        with self._lock:
            self._open = False
            with suppress(queue.Empty):
                while cancel_futures:
                    if (task := self._tasks.get_nowait()) is not None:
                        task[0].cancel()
        self._end_threads()
        if wait:
            join_within(self._threads, JOIN_TIMEOUT_S)

    def __del__(self) -> None:
        self._end_threads()

    def _end_threads(self) -> None:
        for _ in self._threads:
            self._tasks.put(None)


def in_order(
    executor: Executor, tasks: Iterable[Callable[[], Result]], *, n_ahead: int
) -> Generator[Result, None, None]:
    """Yield the results of tasks in their order, with up to `n_ahead` further tasks in progress.

    An error of a task is raised when its result is due. An error of `tasks` itself is raised up to `n_ahead` results
    early.

    Args:
        executor: runs the tasks.
        tasks: functions without arguments; taken one by one, as results are consumed.
        n_ahead: tasks submitted beyond the one whose result is due.
    """
    pending: deque[Future[Result]] = deque()
    for task in tasks:
        pending.append(executor.submit(task))
        if len(pending) > n_ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def prefetch(
    items: Iterable[Item], depth: int = 8, *, while_waiting: Callable[[], object] | None = None
) -> Generator[Item, None, None]:
    """Yield items in order while a background thread prepares up to `depth` of them in advance.

    An error in the thread is raised when its item is due. Closing the generator stops the thread and waits up to
    `JOIN_TIMEOUT_S` for a read in progress.

    Args:
        items: an iterable that takes time, e.g. batches.
        depth: most items to hold ready.
        while_waiting: called every `WAITING_INTERVAL_S` while the next item is not ready, e.g. to check for a signal.
            What it raises ends the wait.

    Example:
        >>> list(prefetch(number**2 for number in range(4)))
        [0, 1, 4, 9]
    """
    prefetcher = _Prefetcher(items, depth)
    prefetcher.start()
    try:
        while (item := prefetcher.get(while_waiting)) is not _END:
            yield item
    finally:
        prefetcher.stop()


def set_background_priority(enabled: bool) -> None:
    """Set whether the threads of this module start with a lower CPU priority (niceness `NICENESS`), on Linux.

    Off by default, because niceness is a matter of the process, not of a library. The command line enables it: data
    are prepared in advance, so these threads can wait while the training thread computes, and have the cores to
    themselves while it waits for data. Threads that run already keep their priority.
    """
    if enabled:
        _background_priority.set()
    else:
        _background_priority.clear()


def n_cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def join_within(threads: Sequence[threading.Thread], timeout_s: float) -> None:
    """Wait for threads to end, at most `timeout_s` seconds in total; log those that are still running."""
    until = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, until - time.monotonic()))
    if busy := [thread.name for thread in threads if thread.is_alive()]:
        logger.warning(
            "the threads %s did not end within %g s because a read hangs; they end with it, or with the process",
            *(busy, timeout_s),
        )


class _Prefetcher(threading.Thread):
    """Puts items into a bounded queue."""

    def __init__(self, items: Iterable[Any], depth: int) -> None:
        super().__init__(name="scgpt-prefetch", daemon=True)
        self._items = items
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=depth)
        self._stopped = threading.Event()

    def run(self) -> None:
        _lower_priority()
        try:
            for item in self._items:
                if not self._put(item):
                    return
            self._put(_END)
        except BaseException as error:  # noqa: BLE001 — not swallowed: `get` raises it
            self._put(_Failure(error))

    def get(self, while_waiting: Callable[[], object] | None) -> Any:
        """Return the next item, or `_END`; raise what the thread raised."""
        while True:
            try:
                # without a callback nothing has to be done meanwhile, so the wait has no timeout
                item = self._ready.get(timeout=None if while_waiting is None else WAITING_INTERVAL_S)
            except queue.Empty:
                assert while_waiting is not None
                while_waiting()
                continue
            if isinstance(item, _Failure):
                raise item.error
            return item

    def stop(self) -> None:
        """End the thread; an item that is being prepared is dropped."""
        self._stopped.set()
        join_within([self], JOIN_TIMEOUT_S)

    def _put(self, item: object) -> bool:
        """Wait for a free place and put an item there; return False if stopped first."""
        while not self._stopped.is_set():
            # A queue cannot be closed (before Python 3.13), so a thread that waits for a place has to look up.
            with suppress(queue.Full):
                self._ready.put(item, timeout=0.1)
                return True
        return False


class _Failure:
    """An error on its way from the prefetching thread to its consumer."""

    def __init__(self, error: BaseException) -> None:
        self.error = error


class _DaemonThread(threading.Thread):
    """Runs tasks from a queue until it takes None from it."""

    def __init__(self, tasks: _Tasks, name: str) -> None:
        super().__init__(name=name, daemon=True)
        self.tasks = tasks

    def run(self) -> None:
        _lower_priority()
        while (task := self.tasks.get()) is not None:
            future, call = task
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # noqa: BLE001 — not swallowed: `Future.result` raises it
                    future.set_exception(error)
            # While the thread waits for its next task, it must not keep the result of the last one alive: blocks of
            # cells take hundreds of megabytes.
            del task, future, call


def _lower_priority() -> None:
    """Lower the priority of the calling thread, and of threads that it starts, if that is enabled."""
    # Only Linux has a niceness for each thread; elsewhere it would change the whole process.
    if _background_priority.is_set() and sys.platform == "linux":
        thread = threading.get_native_id()
        os.setpriority(os.PRIO_PROCESS, thread, max(NICENESS, os.getpriority(os.PRIO_PROCESS, thread)))


# A daemon thread that returns from C++ (TileDB, numba) to an interpreter that is shutting down aborts the process. So
# the threads of this module are ended first. The hook touches no other thread, and delays the exit only while one of
# ours is in the middle of a read, by at most `JOIN_TIMEOUT_S`.
@atexit.register
def _end_all() -> None:
    """End the threads of pools that were not shut down."""
    for pool in list(_pools):
        pool.shutdown(wait=False)
    join_within([thread for thread in threading.enumerate() if isinstance(thread, _DaemonThread)], JOIN_TIMEOUT_S)
