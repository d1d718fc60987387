"""How a run is stopped from outside: the first SIGTERM or SIGINT asks, a second one insists."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

# A launcher passes on the Ctrl-C that the terminal has already sent to every process: that is one wish, not two.
_SAME_WISH_S = 1.0


class Interrupted(Exception):
    """A signal stopped the training, after a checkpoint.

    Attributes:
        exit_code: what a shell expects of a process that the signal ended: 143 for SIGTERM, 130 for SIGINT.
    """

    def __init__(self, number: int, step: int, checkpoint: object) -> None:
        """Say by which signal, after how many steps and where the checkpoint is."""
        self.exit_code = 128 + number
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step:,}; nothing is lost: {checkpoint} holds it, "
            "go on with --resume_from_checkpoint latest"
        )


class StopSignal:
    """Remembers a SIGTERM or SIGINT that comes while it is entered; a second one ends the process at once.

    Attributes:
        number: of the signal that came, 0 before.
    """

    def __init__(self) -> None:
        """Wait for nothing yet."""
        self.number = 0
        self._came_at = 0.0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Listen; only the main thread can."""
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {s: signal.signal(s, self._receive) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Listen no more; a signal that came too late to be obeyed is sent again."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
        if self.number and kind is None:
            signal.raise_signal(self.number)

    def check(self) -> None:
        """Do nothing until a signal has come; for those who wait for something else.

        Raises:
            InterruptedError: one has.
        """
        if self.number:
            raise InterruptedError(f"{signal.Signals(self.number).name} came while waiting")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._came_at = number, time.monotonic()
        elif time.monotonic() - self._came_at > _SAME_WISH_S:
            os._exit(128 + number)
