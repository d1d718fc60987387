"""How fast training goes: cells/s, tokens/s, share of the time spent waiting, and on a GPU model-FLOPs utilisation."""

import time
from collections.abc import Iterable

import torch

from scgpt_hf.model.configuration_scgpt import ScGPTConfig, training_flops_per_token
from scgpt_hf.pipeline.stream import Batch, lengths_of
from scgpt_hf.training.peak_flops import peak_flops


class Throughput:
    """Counts what went through one rank; ranks are in step, so all together do `world_size` times as much."""

    def __init__(self, config: ScGPTConfig, device: torch.device, world_size: int) -> None:
        """Start the clock."""
        self.config, self.world_size = config, world_size
        self.peak = peak_flops(device)
        self.restart(waited_s=0.0)

    def count(self, batches: Iterable[Batch]) -> None:
        """Add the cells and tokens of packed batches."""
        for batch in batches:
            lengths = lengths_of(batch).double()
            self.cells += len(lengths)
            self.tokens += int(lengths.sum())
            self.squares += float(lengths.square().sum())

    def since_last(self, waited_s: float) -> dict[str, float]:
        """Return the rates since the last call.

        Args:
            waited_s: seconds that the loader has made the trainer wait since the start of the run.
        """
        seconds = time.perf_counter() - self.started
        rates = {
            "cells_per_second": self.cells * self.world_size / seconds,
            "tokens_per_second": self.tokens * self.world_size / seconds,
            "waiting_share": (waited_s - self.waited_s) / seconds,
        }
        if self.peak and self.cells:
            flops = training_flops_per_token(self.config, self.squares / self.tokens) * self.tokens
            rates["mfu"] = flops / seconds / self.peak
        self.restart(waited_s)
        return rates

    def leave_out(self, seconds: float) -> None:
        """Do not count time that was spent on something else than training."""
        self.started += seconds

    def restart(self, waited_s: float) -> None:
        """Count from now on; `waited_s` as for `since_last`."""
        self.cells = self.tokens = 0
        self.squares = 0.0
        self.waited_s = waited_s
        self.started = time.perf_counter()
