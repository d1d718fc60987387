"""Keeps what is not finite out of a model: a bad step changes nothing, is named, and ends the run when it recurs.

On a GPU nobody waits: the flag of a bad step stays on the device, where the optimiser reads it, and is looked at here
when the log is written.
"""

import logging
from collections.abc import Callable, Iterable

import torch

from scgpt_hf.cells.block import Int64Array

logger = logging.getLogger(__name__)

# fp16's scaler starts at 2^16 and skips steps while it halves its way to a scale that fits; those are no fault.
HALVINGS_OF_FP16 = 16


class NonFiniteGuard:
    """Skips the steps of one run whose loss or gradient is not finite."""

    def __init__(self, limit: int, cells: Callable[[int], Int64Array], *, tells: bool) -> None:
        """Watch from the first step on.

        Args:
            limit: bad steps in a row that end the run.
            cells: gives the ids of the cells that a step, counted from 0, trains on.
            tells: whether this process writes the log.
        """
        self.limit, self.cells, self.tells = limit, cells, tells
        self.in_a_row = 0
        self._unseen: list[tuple[int, torch.Tensor]] = []
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def remember(self, model: torch.nn.Module) -> None:
        """Keep the buffers as they are before a step: a batch norm changes its own in the forward pass."""
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def skip_if_bad(
        self, norm: torch.Tensor, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> torch.Tensor:
        """Make the optimiser's next step do nothing if the gradient is not finite; return whether, a bool tensor ().

        Args:
            norm: of the gradient, the same on all processes. Shape ().
            step: that is about to be done, counted from 0.
            model: the model, whose buffers are put back.
            optimizer: torch's own.

        Raises:
            FloatingPointError: see `review`.
        """
        bad = ~torch.isfinite(norm)
        for buffer, before in self._buffers:
            buffer.copy_(torch.where(bad, before, buffer))
        if getattr(optimizer, "_step_supports_amp_scaling", False):  # the fused ones read the flag on the device
            optimizer.found_inf = bad.float()  # type: ignore[attr-defined]
        elif bad:
            optimizer.zero_grad(set_to_none=True)  # a parameter without a gradient is left alone
        self._unseen.append((step, bad))
        if bad.device.type == "cpu":
            self.review()
        return bad

    def review(self) -> None:
        """Look at the steps since the last time, and name the bad ones.

        Raises:
            FloatingPointError: too many bad steps in a row.
        """
        flags = torch.stack([bad for _, bad in self._unseen]).tolist() if self._unseen else []
        unseen, self._unseen = self._unseen, []
        for (step, _), bad in zip(unseen, flags, strict=True):
            self.in_a_row = self.in_a_row + 1 if bad else 0
            if bad and self.tells:
                ids = self.cells(step).tolist()
                logger.warning("step %s is skipped: its loss or gradient is not finite; cell ids: %s", step + 1, ids)
            if self.in_a_row >= self.limit:
                raise FloatingPointError(
                    f"the loss or gradient of {self.in_a_row} steps in a row, up to step {step + 1:,}, is not finite "
                    "(their cells are in the log): the run has diverged; lower --learning_rate or lengthen "
                    "--warmup_steps and resume from an earlier checkpoint, or look at the cells"
                )


def propagate_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """Return a finite loss as it is; from one that is not, every gradient becomes NaN, so that all processes see it."""
    return loss * (1 + 0 * loss.detach())


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether every number of floating-point tensors is finite; of sharded ones, this process's part."""
    local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors]
    checks = [tensor.isfinite().all() for tensor in local if tensor.is_floating_point()]
    return not checks or bool(torch.stack([check.to(checks[0].device) for check in checks]).all())
