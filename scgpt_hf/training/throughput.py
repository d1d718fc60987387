"""Measure the speed of training: cells and tokens per second, share of time spent waiting, model-FLOPs utilization."""

import time
from collections.abc import Iterable

import torch

from scgpt_hf.model.configuration_scgpt import ScGPTConfig, training_flops_per_cell, training_flops_per_token
from scgpt_hf.pipeline.stream import Batch, lengths_of
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.estimate.devices import find_device


def peak_flops(device: torch.device) -> float | None:
    """Return the peak throughput of a GPU in FLOP/s (bf16), or None for a CPU or an unknown GPU."""
    if device.type != "cuda":
        return None
    found = find_device(torch.cuda.get_device_name(device))
    return None if found is None else found.flops


class Throughput:
    """Counts the cells and tokens of one process between two log lines.

    All processes take the same number of steps with the same number of cells, so the rates of all together are those of
    one process times `world_size`.
    """

    def __init__(self, config: ScGPTConfig, device: torch.device, world_size: int) -> None:
        """Create the counters and start the clock.

        Args:
            config: config of the model, from which its FLOPs per token and cell follow.
            device: that this process trains on.
            world_size: number of processes.
        """
        self.config, self.world_size = config, world_size
        self.peak = peak_flops(device)
        self.restart(waited_s=0.0)

    def count(self, batches: Iterable[Batch]) -> None:
        """Add the cells, tokens and masked genes of batches, with the tokens of second views."""
        for batch in batches:
            lengths = lengths_of(batch).double()
            self.n_cells += len(lengths)
            if "view_input_ids" in batch:
                lengths = torch.cat([lengths, lengths_of(batch, "view_").double()])
            self.n_tokens += int(lengths.sum())
            self.sum_of_squares += float(lengths.square().sum())
            self.n_masked += int(torch.as_tensor(batch["labels"]).ne(IGNORE).sum())

    def rates(self, waited_s: float) -> dict[str, float]:
        """Return the rates since the last call of `restart`: the values for a log line.

        Args:
            waited_s: seconds that the trainer has waited for batches since the start of the run.

        Returns:
            `cells_per_second` and `tokens_per_second` of all processes together, `waiting_share` in [0, 1], and on a
            known GPU `mfu`, the model-FLOPs utilization in [0, 1].
        """
        seconds = time.perf_counter() - self.started
        rates = {
            "cells_per_second": self.n_cells * self.world_size / seconds,
            "tokens_per_second": self.n_tokens * self.world_size / seconds,
            "waiting_share": (waited_s - self.waited_s) / seconds,
        }
        if self.peak and self.n_cells:
            # Attention costs a token as many FLOPs as its cell has tokens; the mean over tokens weights each cell by
            # its length.
            mean_length = self.sum_of_squares / self.n_tokens
            flops = training_flops_per_token(self.config, mean_length, self.n_masked / self.n_tokens) * self.n_tokens
            flops += training_flops_per_cell(self.config) * self.n_cells
            rates["mfu"] = flops / seconds / self.peak
        return rates

    def exclude(self, seconds: float) -> None:
        """Exclude time that was spent on something other than training, such as a validation."""
        self.started += seconds

    def restart(self, waited_s: float) -> None:
        """Set the counters to zero and restart the clock; `waited_s` as for `rates`."""
        self.n_cells = self.n_tokens = self.n_masked = 0
        self.sum_of_squares = 0.0
        self.waited_s = waited_s
        self.started = time.perf_counter()
