"""The loader that a trainer iterates over: the batches of one epoch per iteration, from a stream over all epochs.

It counts the batches that were consumed. An exact resume needs nothing else.
"""

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from itertools import pairwise

from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.stream import Batch


class StreamLoader:
    """Yields the batches of one epoch in each iteration, from where the last iteration stopped.

    The underlying stream continues across epochs, so the first window of the next epoch is read while the model
    validates.

    Attributes:
        consumed: batches returned since the start of the run, without those that were read ahead. The trainer derives
            it from its step number.
        waited_s: seconds that the consumer waited for batches that were not ready.
    """

    def __init__(
        self,
        open_stream: Callable[[int], Iterable[Batch]],
        epoch_ends: Sequence[int],
        while_waiting: Callable[[], object] | None = None,
    ) -> None:
        """Store the arguments; the first iteration opens the stream.

        Args:
            open_stream: returns the batches of the run from a given number on. They may end after some epochs; the
                loader then opens the stream again for the next ones.
            epoch_ends: number of batches returned when each epoch ends, ascending.
            while_waiting: see `prefetch`.
        """
        self.open_stream = open_stream
        self.epoch_ends = epoch_ends
        self.while_waiting = while_waiting
        self.consumed = 0
        self.waited_s = 0.0
        self._batches: Generator[Batch, None, None] | None = None

    def __len__(self) -> int:
        """Return the number of batches of the longest epoch."""
        return max(end - begin for begin, end in pairwise([0, *self.epoch_ends]))

    def __iter__(self) -> Iterator[Batch]:
        """Yield the rest of the current epoch, which is all of it unless training was resumed in the middle."""
        end = next((end for end in self.epoch_ends if end > self.consumed), self.consumed)
        while self.consumed < end:
            if self._batches is None:
                self._batches = self._open()
            started = time.perf_counter()
            batch = next(self._batches, None)
            if batch is None:  # the stream covered some epochs only; the next ones may read another source
                self._batches = self._open()
                batch = next(self._batches)
            self.waited_s += time.perf_counter() - started
            self.consumed += 1
            yield batch

    def seek(self, n_batches: int) -> None:
        """Continue after the first `n_batches` of the run, as if these had been returned."""
        self.close()
        self.consumed = n_batches

    def close(self) -> None:
        """Stop the background thread that reads ahead."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None

    def _open(self) -> Generator[Batch, None, None]:
        return prefetch(self.open_stream(self.consumed), while_waiting=self.while_waiting)
