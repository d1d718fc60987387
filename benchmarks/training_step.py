"""One training step, in the variants that the benchmarks compare."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class StepConfig:
    """How a training step is computed.

    Attributes:
        bf16: use bf16 autocast.
        fused: use the fused AdamW kernel, instead of PyTorch's default.
        compiled: mode of torch.compile ("default", "reduce-overhead", …); None for eager.
        bf16_residual: with bf16, let LayerNorms return bf16 as well, so that the residual stream moves half the bytes.
    """

    bf16: bool = False
    fused: bool = True
    compiled: str | None = None
    bf16_residual: bool = False


class TrainingStep:
    """A model and its optimizer. A step is forward, backward, clipping and AdamW; it never waits for the device."""

    def __init__(self, model: nn.Module, device: torch.device, config: StepConfig) -> None:
        """Move the model to the device, and compile it if the config says so."""
        self.device, self.config = device, config
        self.model = model.to(device).train()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True if config.fused else None)
        if config.bf16 and config.bf16_residual:
            for module in self.model.modules():
                if isinstance(module, nn.LayerNorm):
                    module.__class__ = _HalfNorm  # not a hook, which torch.compile ignores
        self.forward: Any = self.model
        if config.compiled is not None:
            self.forward = torch.compile(self.model, mode=config.compiled)

    def __call__(self, batch: Mapping[str, Any]) -> Tensor:
        """Train on a batch, and return its loss as a tensor on the device."""
        inputs = {key: self._to_device(value) for key, value in batch.items()}
        if self.config.compiled == "reduce-overhead":
            torch.compiler.cudagraph_mark_step_begin()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            loss: Tensor = self.forward(**inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def wait(self) -> None:
        """Wait until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _to_device(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.to(self.device, non_blocking=value.is_pinned())


def cells_per_second(step: TrainingStep, batches: Sequence[Mapping[str, Any]]) -> float:
    """Train on all batches, packed or padded, and return the speed in cells per second."""
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
