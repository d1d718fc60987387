"""Skip training steps whose loss or gradient is not finite, log their cells, and stop the run if they recur.

One NaN in a gradient makes all weights NaN, and every later step and checkpoint useless. The guard works in three
places:

1. `propagate_nonfinite`, on the loss: a loss that is not finite makes every gradient NaN. The gradient norm, which is
   the same on all processes, then reveals it to all of them, although only one process had the bad cells.
2. `NonFiniteGuard.skip_if_nonfinite`, before the optimizer step: a norm that is not finite makes the step do nothing.
3. `NonFiniteGuard.check_recent_steps`, when a line is logged: it logs the skipped steps and counts them.

On a GPU, the host never waits for the first two: whether a step is skipped stays a tensor on the device, where fused
optimizers read it.
"""

import logging
from collections.abc import Callable, Iterable

import torch

from scgpt_hf.cells.block import Int64Array

logger = logging.getLogger(__name__)

# torch.amp.GradScaler starts with a scale of 2^16, halves it after each overflow and skips the step. Up to 16 skipped
# steps at the start of an fp16 run are normal. Source: torch.amp.GradScaler, init_scale=65536, backoff_factor=0.5.
FP16_SCALE_HALVINGS = 16


class NonFiniteGuard:
    """Skips the steps of a run whose loss or gradient is not finite."""

    def __init__(self, limit: int, cells: Callable[[int], Int64Array], *, log_skipped: bool) -> None:
        """Create the guard.

        Args:
            limit: number of consecutive skipped steps that stops the run.
            cells: returns the ids of the cells that a step, counted from 0, trains on.
            log_skipped: whether this process logs skipped steps; one of all processes should.
        """
        self.limit, self.cells, self.log_skipped = limit, cells, log_skipped
        self.n_consecutive = 0
        self._unchecked: list[tuple[int, torch.Tensor]] = []
        self._buffers: list[tuple[torch.Tensor, torch.Tensor]] = []

    def save_buffers(self, model: torch.nn.Module) -> None:
        """Copy the model's buffers before a step: a batch norm updates its statistics in the forward pass."""
        self._buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]

    def skip_if_nonfinite(
        self, norm: torch.Tensor, step: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer
    ) -> torch.Tensor:
        """Make the next optimizer step do nothing if the gradient is not finite.

        Args:
            norm: gradient norm, the same on all processes. Shape ().
            step: the step about to be done, counted from 0.
            model: the model. Its buffers are restored if the step is skipped.
            optimizer: the torch optimizer.

        Returns:
            Whether the step is skipped: bool, shape (), on the device.

        Raises:
            FloatingPointError: see `check_recent_steps`. Only on a CPU, where checking at once costs nothing.
        """
        nonfinite = ~torch.isfinite(norm)
        for buffer, before in self._buffers:
            buffer.copy_(torch.where(nonfinite, before, buffer))
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            # Fused optimizers read this flag on the device and skip their step if it is 1. GradScaler sets it, too.
            optimizer.found_inf = nonfinite.float()  # type: ignore[attr-defined]
        elif nonfinite:
            optimizer.zero_grad(set_to_none=True)  # optimizers leave parameters without a gradient unchanged
        self._unchecked.append((step, nonfinite))
        if nonfinite.device.type == "cpu":
            self.check_recent_steps()
        return nonfinite

    def check_recent_steps(self) -> None:
        """Log the steps that were skipped since the last call. On a GPU, this waits for the device.

        Raises:
            FloatingPointError: `limit` consecutive steps were skipped.
        """
        flags = torch.stack([skipped for _, skipped in self._unchecked]).tolist() if self._unchecked else []
        unchecked, self._unchecked = self._unchecked, []
        for (step, _), skipped in zip(unchecked, flags, strict=True):
            self.n_consecutive = self.n_consecutive + 1 if skipped else 0
            if skipped and self.log_skipped:
                cell_ids = self.cells(step).tolist()
                logger.warning(
                    "step %d was skipped: its loss or gradient is not finite; cell ids: %s", step + 1, cell_ids
                )
            if self.n_consecutive >= self.limit:
                raise FloatingPointError(
                    f"the loss or gradient of {self.n_consecutive} consecutive steps, up to step {step + 1:,}, is not "
                    "finite: the run has diverged. Lower --learning_rate or lengthen --warmup_steps and resume from an "
                    "earlier checkpoint, or inspect the cells, whose ids are in the log"
                )


def propagate_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """Return the loss unchanged; if it is not finite, its gradients become NaN for every parameter.

    The factor 1 + 0 * loss is exactly 1 for a finite loss, and NaN otherwise. Without it, an infinite loss may have
    finite gradients, and the step would not be skipped.
    """
    return loss * (1 + 0 * loss.detach())


def all_finite(tensors: Iterable[torch.Tensor]) -> bool:
    """Return whether all floating-point tensors contain only finite numbers.

    Of a sharded tensor, only the part of this process is checked.
    """
    local = [getattr(tensor, "to_local", lambda tensor=tensor: tensor)() for tensor in tensors]
    checks = [tensor.isfinite().all() for tensor in local if tensor.is_floating_point()]
    return not checks or bool(torch.stack([check.to(checks[0].device) for check in checks]).all())
