"""Write the large files of a checkpoint in a thread, while training goes on."""

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from scgpt_hf.training.fault_tolerance.host_copy import HostCopy, tensors_in


class BackgroundSave:
    """Writes one checkpoint at a time in a thread.

    Call `warm_up` once, early in the run. A checkpoint is saved in this order: `defer` for each large file, `start`,
    `wait_for_copies` before the tensors change, and `wait` before the next checkpoint. A thread suffices, because
    `torch.save`, safetensors 0.8, hashing and fsync let other threads run. It is not a daemon: a process that ends
    because of an error completes its checkpoint.
    """

    def __init__(self, device: torch.device) -> None:
        """Create it; no thread runs yet.

        Args:
            device: device of the model.
        """
        self._copies = HostCopy(device)
        self._copied = threading.Event()
        self._writes: list[tuple[Callable[[Any], object], Any]] = []
        self._thread: threading.Thread | None = None
        self._problem: Exception | None = None

    @property
    def failed(self) -> bool:
        """Return whether the thread has ended with an error, which `wait` will return."""
        return self._problem is not None

    def defer(self, state: Any, write: Callable[[Any], object]) -> None:
        """Call `write` with a copy of a state, in the thread; or now with the state itself, if memory is short."""
        copy = self._copies.add(state)
        if copy is None:
            write(state)
        else:
            self._writes.append((write, copy))

    def start(self, check: Callable[[list[torch.Tensor]], object], finish: Callable[[], object]) -> None:
        """Start the thread: it copies, checks, writes what was deferred, and calls `finish`.

        Args:
            check: is called with the tensors before they are written; an error that it raises is that of the thread.
            finish: completes the checkpoint.
        """
        writes, self._writes = self._writes, []

        def work() -> None:
            try:
                self._copies.fill()
            finally:
                self._copied.set()
            check([tensor for _, state in writes for tensor in tensors_in(state)])
            for write, state in writes:
                write(state)
            finish()

        self._copied.clear()
        self._start_thread(work)

    def warm_up(self, states: Iterable[Any]) -> None:
        """Copy states in the thread and forget them, so that the first checkpoint finds memory that was used before.

        Args:
            states: as they will be passed to `defer`, in the same order. They may change meanwhile.
        """
        if all(self._copies.add(state) is not None for state in states):
            self._copied.set()
            self._start_thread(self._copies.fill)

    def _start_thread(self, work: Callable[[], object]) -> None:
        def run() -> None:
            try:
                work()
            except Exception as error:  # noqa: BLE001 — `wait` returns it to the training loop
                self._problem = error

        self._thread = threading.Thread(target=run, name="scgpt-checkpoint")
        self._thread.start()

    def wait_for_copies(self) -> None:
        """Wait until the tensors may change."""
        if self._thread is not None:
            self._copied.wait()

    def wait(self) -> Exception | None:
        """Wait until the thread has ended, and return its error."""
        if self._thread is not None:
            self._thread.join()
        problem, self._problem, self._thread = self._problem, None, None
        self._copies.clear()
        self._writes = []
        return problem
