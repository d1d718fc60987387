"""Stop a run by a signal: the first one requests a checkpoint, a second one ends the process at once.

The signals are SIGTERM, of job schedulers that end a job; SIGUSR1, of those that announce the end (`sbatch --signal`);
and SIGINT, of Ctrl-C.

Signal handlers belong to the whole process, so a trainer installs none by itself. The command line passes it a
`StopSignal`, and so can you:

    trainer = ScGPTTrainer(..., stop_signal=StopSignal())
    try:
        trainer.train()
    except TrainingInterrupted as interruption:
        sys.exit(interruption.exit_code)
"""

import os
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from scgpt_hf.training.run_folder import SETTINGS

# Ctrl-C in a terminal reaches every process of the terminal, and a launcher forwards its own to its children. Two
# signals in such a short time are one request.
_SAME_REQUEST_S = 1.0


class TrainingInterrupted(Exception):
    """A signal stopped the training, after a checkpoint was saved.

    Attributes:
        exit_code: what a shell expects of a process that the signal ended: 143 for SIGTERM, 138 for SIGUSR1 (on Linux),
            130 for SIGINT. A job script that finds one of them can start the run again.
    """

    def __init__(self, number: int, step: int, checkpoint: Path) -> None:
        """Create the exception.

        Args:
            number: number of the signal.
            step: steps done.
            checkpoint: where the checkpoint is.
        """
        self.exit_code = 128 + number
        settings = checkpoint.parent / SETTINGS
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step:,}. Nothing is lost: {checkpoint} was saved; "
            f"continue with {f'{settings} ' if settings.is_file() else ''}--resume_from_checkpoint latest"
        )


class StopSignal:
    """Handles SIGTERM, SIGUSR1 and SIGINT while it is entered as a context manager, as the trainer does during `train`.

    The first signal is only recorded; the trainer looks at `number` between two steps. A second signal ends the process
    without cleaning up, for example when a step hangs.

    Attributes:
        number: number of the signal received, 0 if none.
    """

    def __init__(self) -> None:
        """Create it; no handler is installed yet."""
        self.number = 0
        self._received_at = 0.0
        self._previous_handlers: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "StopSignal":
        """Install the handlers. Does nothing outside the main thread, the only one that Python lets install any."""
        self.number = 0
        if threading.current_thread() is threading.main_thread():
            handled = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
            self._previous_handlers = {number: signal.signal(number, self._receive) for number in handled}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers, and send them a signal that nobody has acted on.

        Such a signal arrived after the last step, when the trainer no longer looked.
        """
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}
        if self.number and kind is None:
            signal.raise_signal(self.number)

    def check(self) -> None:
        """Raise if a signal was received; call it while you wait for something that may never come.

        Raises:
            InterruptedError: a signal was received.
        """
        if self.number:
            raise InterruptedError(f"{signal.Signals(self.number).name} was received while waiting")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._received_at = number, time.monotonic()
        elif time.monotonic() - self._received_at > _SAME_REQUEST_S:
            os._exit(128 + number)
