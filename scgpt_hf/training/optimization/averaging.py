"""An exponential moving average of the weights, which is validated and saved in place of the last weights.

A checkpoint holds the average as its model, so whatever loads the checkpoint gets the average: the best model at the
end, the Hub, or you. The weights that training continues from are in the subfolder `training_weights`.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TRAINING_WEIGHTS = "training_weights"  # a subfolder, because publishing takes all weights of the checkpoint's folder


class WeightAverage:
    """The moving average of the weights of a model during a run.

    After step t, every average moves by 1 - min(decay, (1 + t) / (10 + t)) of the way to the weight. The second term
    lets the average follow the first steps, whose weights are far from the final ones. Buffers, such as the statistics
    of a batch norm, are not averaged.

    Attributes:
        weights: the average of each weight by name.

    Source: the decay and its warm-up of `tf.train.ExponentialMovingAverage` (`num_updates`).
    """

    def __init__(self, model: torch.nn.Module, decay: float) -> None:
        """Start with the present weights.

        Args:
            model: the model that is trained. Its parameters must stay the same objects.
            decay: largest share of the average that a step keeps, in (0, 1).
        """
        self.parameters, self.decay = dict(model.named_parameters()), decay
        self.weights = self._copy()
        self._trained: dict[str, torch.Tensor] | None = None  # while the model holds the average

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Move the average towards the weights of the model.

        Args:
            step: number of steps that are done.
        """
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, weight in self.parameters.items():
            self.weights[name].lerp_(weight, 1 - decay)

    def apply(self) -> None:
        """Set the weights of the model to the average."""
        self._set(self.weights)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Set the weights of the model to the average, and back when the context ends."""
        self._trained = self._copy()
        self.apply()
        try:
            yield
        finally:
            self._set(self._trained)
            self._trained = None

    def save_trained(
        self, checkpoint: Path, write_later: Callable[[Any, Callable[[Any], object]], None] | None = None
    ) -> None:
        """Write the weights that training continues from, while the average is applied.

        Args:
            checkpoint: folder of the checkpoint.
            write_later: receives the weights, and the function that writes a copy of them; None writes them now.
        """
        assert self._trained is not None, "a checkpoint is written while the average is applied"
        folder = checkpoint / TRAINING_WEIGHTS
        folder.mkdir()

        def write(weights: dict[str, torch.Tensor]) -> None:
            save_file(weights, folder / "model.safetensors")

        if write_later is None:
            write(self._trained)
        else:
            write_later(self._trained, write)

    def restore(self, checkpoint: Path) -> None:
        """Continue from a checkpoint, whose average the model has loaded."""
        self.weights = self._copy()
        device = next(iter(self.weights.values())).device
        self._set(load_file(checkpoint / TRAINING_WEIGHTS / "model.safetensors", device=str(device)))

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().clone() for name, weight in self.parameters.items()}

    @torch.no_grad()
    def _set(self, weights: dict[str, torch.Tensor]) -> None:
        for name, weight in self.parameters.items():
            weight.copy_(weights[name])
