"""Sum the training losses between two log lines, and keep the sums in checkpoints.

A log line shows the mean loss of the steps since the previous line. A checkpoint may be saved between two lines, so it
stores the sums: a resumed run then logs the same numbers as one that was never interrupted.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch


@dataclass
class LossAccumulator:
    """Losses that one process has summed since the last log line.

    The sums stay on the device, so adding to them does not make the host wait for the GPU.

    Attributes:
        sums: sum over completed steps by objective. Each loss is this process's share: shares add up over processes.
        n_steps: number of steps summed, without skipped ones; the same on all processes.
        step_losses: sum over the micro-batches of the current step by objective. Not saved.
    """

    sums: dict[str, torch.Tensor | float] = field(default_factory=dict)
    n_steps: torch.Tensor | float = 0.0
    step_losses: dict[str, torch.Tensor] = field(default_factory=dict)

    def start_step(self) -> None:
        """Start a new step."""
        self.step_losses = {}

    def add(self, losses: Mapping[str, torch.Tensor]) -> None:
        """Add the losses of a micro-batch, tensors of shape (), to the current step."""
        for name, loss in losses.items():
            self.step_losses[name] = self.step_losses.get(name, torch.zeros_like(loss)) + loss.detach()

    def end_step(self, skipped: torch.Tensor) -> None:
        """Add the current step to the sums, unless it was skipped.

        Args:
            skipped: whether the optimizer skipped the step, bool (), on the device.
        """
        for name, loss in self.step_losses.items():
            self.sums[name] = self.sums.get(name, 0.0) + loss.masked_fill(skipped, 0.0)
        self.n_steps = self.n_steps + (~skipped).float()

    def reset(self) -> None:
        """Forget the sums, after they were logged."""
        self.sums, self.n_steps = {}, 0.0


def losses_path(checkpoint: Path, rank: int) -> Path:
    """Return the file of a checkpoint that holds the sums of one process."""
    return checkpoint / f"losses_{rank}.json"


def save_losses(losses: LossAccumulator, path: Path) -> None:
    """Write the sums of one process."""
    sums = {name: float(value) for name, value in losses.sums.items()}
    path.write_text(json.dumps({"sums": sums, "n_steps": float(losses.n_steps)}), encoding="utf-8")


def load_losses(paths: Sequence[Path]) -> LossAccumulator:
    """Return the sums of the processes that wrote the files, added up.

    Raises:
        AttributeError, KeyError, TypeError, ValueError: a file does not contain such sums.
    """
    contents = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    sums: dict[str, torch.Tensor | float] = {}
    for content in contents:
        for name, value in content["sums"].items():
            sums[str(name)] = float(sums.get(name, 0.0)) + float(value)
    return LossAccumulator(sums, float(contents[0]["n_steps"]))
