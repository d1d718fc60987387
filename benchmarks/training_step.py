"""One step of training, in the ways that benchmarks compare."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class How:
    """How a step is made.

    Attributes:
        bf16: bf16 autocast.
        fused: AdamW in one kernel; otherwise PyTorch's default.
        compiled: mode of torch.compile ("default", "reduce-overhead", …); None for eager.
        bf16_residual: with bf16, LayerNorms give bf16 too, so that the residual stream moves half the bytes.
    """

    bf16: bool = False
    fused: bool = True
    compiled: str | None = None
    bf16_residual: bool = False


class TrainingStep:
    """A model and its optimiser: forward, backward, clipping, AdamW. The host never waits for the device."""

    def __init__(self, model: nn.Module, device: torch.device, how: How) -> None:
        """Move the model to the device and compile it, if so."""
        self.device, self.how = device, how
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True if how.fused else None)
        if how.bf16 and how.bf16_residual:
            for module in self.model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.__class__ = _HalfNorm  # a hook would not do: the compiler does not look at hooks
        self.forward: Any = self.model
        if how.compiled is not None:
            self.forward = torch.compile(self.model, mode=how.compiled)

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Train on a batch and return its loss, on the device."""
        inputs = {key: self._to_device(value) for key, value in batch.items()}
        if self.how.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.how.bf16):
            loss: Tensor = self.forward(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(self) -> None:
        """Return once the device has done what it was asked for."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _to_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, non_blocking=value.is_pinned())


def cells_per_second(step: TrainingStep, batches: Sequence[Mapping[str, Any]]) -> float:
    """Return the speed of one pass over the batches, packed or padded."""
    step.wait()
    started = time.perf_counter()
    for batch in batches:
        step(batch)
    step.wait()
    n_cells = [len(batch.get("cu_seq_lens_q", batch["input_ids"])) - ("cu_seq_lens_q" in batch) for batch in batches]
    return sum(n_cells) / (time.perf_counter() - started)


class _HalfNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).to(torch.bfloat16)
