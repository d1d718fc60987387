"""Record every operation of a training step without computing it: FLOPs, bytes, dependencies, live memory.

The step runs on fake tensors, which have shapes and no data, so the size of the model does not matter. Attention is
traced as the variable-length kernel, which the GPU runs, and precision as bf16 autocast.
"""

# torch's dispatch mode, registry of FLOPs and fake tensors are untyped.
# mypy: disable-error-code="no-untyped-call, no-any-return"

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from torch.utils.module_tracker import ModuleTracker
from transformers import AttentionInterface

from scgpt_hf.model.attention_scgpt import VARLEN, varlen_attention
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining

Phase = Literal["forward", "backward", "optimizer"]
_ATTENTION = "scgpt_estimate::attend"
# Operations that torch.compile does not fuse into its neighbors: library kernels, gathers with atomics, the optimizer.
_NOT_FUSED = (
    *("mm", "bmm", "attend", "embedding_dense_backward", "_embedding_bag", "index_copy", "index_add", "sort", "sum"),
    *("_foreach", "_fused"),
)
# Operations that start no kernel. Dropout on a CPU draws and scales its mask in separate operations; the kernel of
# a GPU does so on the way.
_NO_KERNEL = {f"aten::{name}" for name in (
    *("_unsafe_view", "detach", "alias", "lift_fresh", "reshape", "bernoulli_", "div_"),
    *("empty", "empty_like", "new_empty", "empty_strided", "new_empty_strided"),
)}  # fmt: skip


@dataclass
class Operation:
    """One operation of the step.

    Attributes:
        name: name of the ATen operation, such as "addmm".
        part: part of the model: "layers.3", "input", "heads", or "optimizer".
        phase: forward pass, backward pass, or clipping and optimizer.
        flops: floating-point operations of matrix products and attention; 0 for all others.
        reads: storage → bytes read.
        writes: storage → bytes written.
        n_tensors: length of the first list of tensors among the arguments; 1 without a list.
    """

    name: str
    part: str
    phase: Phase
    flops: float
    reads: dict[int, int]
    writes: dict[int, int]
    n_tensors: int = 1

    @property
    def n_bytes(self) -> int:
        """Bytes read and written."""
        return sum(self.reads.values()) + sum(self.writes.values())

    @property
    def is_fusable(self) -> bool:
        """True if torch.compile fuses the operation with its neighbors."""
        return not any(part in self.name for part in _NOT_FUSED)


@dataclass
class Trace:
    """The operations of a step, in order, and its memory.

    Attributes:
        operations: all operations that start a kernel; views do not.
        state_bytes: parameters, gradients and optimizer state.
        activation_bytes: what the forward pass keeps for the backward pass.
        peak_bytes: largest sum of all live tensors, the state included.
    """

    operations: list[Operation] = field(default_factory=list)
    state_bytes: int = 0
    activation_bytes: int = 0
    peak_bytes: int = 0

    @property
    def flops(self) -> float:
        """FLOPs of the step."""
        return sum(operation.flops for operation in self.operations)


@torch.library.custom_op(_ATTENTION, mutates_args=())
def _attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    raise NotImplementedError("this operation is only traced")


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return query.new_empty(query.shape)


@torch.library.custom_op(f"{_ATTENTION}_backward", mutates_args=())
def _attend_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> list[Tensor]:
    raise NotImplementedError("this operation is only traced")


@_attend_backward.register_fake
def _(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor) -> list[Tensor]:
    return [query.new_empty(query.shape) for _ in range(3)]


def _save(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


_attend.register_autograd(
    lambda ctx, gradient: tuple(_attend_backward(gradient, *ctx.saved_tensors)), setup_context=_save
)


def _traced_attention(_: Any, query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> Any:
    return _attend(query, key, value).transpose(1, 2), None


@contextmanager
def _attention_traced() -> Iterator[None]:
    """Replace the attention function of the package, which would compute per cell or in a padded copy here."""
    AttentionInterface.register(VARLEN, _traced_attention)
    try:
        yield
    finally:
        AttentionInterface.register(VARLEN, varlen_attention)


class _Recorder(TorchDispatchMode):
    """Appends each operation to a trace, and follows the storages that are alive."""

    def __init__(self, sum_of_squares: float) -> None:
        super().__init__()
        self.trace, self.modules = Trace(), ModuleTracker()
        self.phase: Phase = "forward"
        self.sum_of_squares = sum_of_squares
        self.ids: Any = weakref.WeakKeyDictionary()
        self.n_ids, self.live = 0, 0

    def storage_id(self, tensor: Tensor) -> int:
        """Return the number of a tensor's storage, and count the storage as alive if it is new."""
        storage = tensor.untyped_storage()
        if storage not in self.ids:
            self.ids[storage] = self.n_ids
            self.n_ids += 1
            size = storage.nbytes()
            self.live += size
            weakref.finalize(storage, self._release, size)
            self.trace.peak_bytes = max(self.trace.peak_bytes, self.live)
        return self.ids[storage]

    def _release(self, size: int) -> None:
        self.live -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        found = [tensor for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)]
        reads = {self.storage_id(tensor): _size(tensor) for tensor in found}
        out = func(*args, **kwargs)
        made = [tensor for tensor in tree_leaves(out) if isinstance(tensor, Tensor)]
        writes = {self.storage_id(tensor): _size(tensor) for tensor in made}
        starts_kernel = (made or func._schema.is_mutable) and func._schema.name not in _NO_KERNEL
        if starts_kernel and not func.is_view:
            if func._schema.is_mutable and not made:
                writes = reads  # such as _foreach_mul_
            name = func._schema.name.removeprefix("aten::")
            flops, n_tensors = self._flops(func, args, kwargs, out), len(args[0]) if isinstance(args[0], list) else 1
            operation = Operation(name, self._part(), self.phase, flops, reads, writes, n_tensors)
            self.trace.operations.append(operation)
        return out

    def _flops(self, func: Any, args: Any, kwargs: Any, out: Any) -> float:
        name = func._schema.name
        if name.startswith(_ATTENTION):
            width = args[1].shape[1] * args[1].shape[-1]  # heads x width of a head
            # Two products forward; five backward, because the kernel computes the scores again.
            return (10 if name.endswith("backward") else 4) * width * self.sum_of_squares
        count = flop_registry.get(func.overloadpacket)
        return float(count(*args, **kwargs, out_val=out)) if count else 0.0

    def _part(self) -> str:
        if self.phase == "optimizer":
            return "optimizer"
        names = [name.partition(".")[2] for name in self.modules.parents if "." in name]
        layers = [name.removeprefix("scgpt.") for name in names if name.startswith("scgpt.layers.")]
        if layers:
            return ".".join(layers[0].split(".")[:2])
        return "input" if any(name.startswith("scgpt") for name in names) else "heads"


def trace_step(
    config: ScGPTConfig,
    batch: Mapping[str, Any],
    sum_of_squares: float,
    *,
    scale: int = 1,
    bf16: bool = True,
    gradient_checkpointing: bool = False,
) -> Trace:
    """Trace forward pass, backward pass, clipping and fused AdamW.

    Args:
        config: config of the model.
        batch: a batch as the trainer passes it; only its shapes matter.
        sum_of_squares: sum of the squared lengths of its cells, on which the work of attention depends.
        scale: trace a batch of that many times the cells.
        bf16: use bf16 autocast.
        gradient_checkpointing: compute the layers again in the backward pass.

    Example:
        >>> from scgpt_hf.training.estimate.trace import trace_step
        >>> trace = trace_step(config, batch, sum_of_squares=32 * 120**2)  # doctest: +SKIP
        >>> trace.flops, len(trace.operations), trace.peak_bytes  # doctest: +SKIP
    """
    recorder = _Recorder(scale * sum_of_squares)
    with FakeTensorMode(), _attention_traced():
        config = type(config).from_dict(config.to_dict())
        model: Any = ScGPTForPreTraining._from_config(config, attn_implementation=VARLEN)
        model.train()
        if gradient_checkpointing:
            # Newer releases of transformers have another name for it, and warn about the old one.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        inputs = {key: _enlarge(value, scale) for key, value in batch.items() if key != "attention_mask"}
        optimizer = torch.optim.AdamW(model.parameters(), fused=True)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()  # creates the moments
        optimizer.zero_grad()
        with recorder, recorder.modules:
            before = sum(_size(parameter) for parameter in model.parameters())
            for tensor in [*model.parameters(), *tree_leaves([*optimizer.state.values()])]:
                recorder.storage_id(tensor)
            for value in inputs.values():
                if isinstance(value, Tensor):
                    recorder.storage_id(value)
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                loss = model(**inputs).loss
            recorder.trace.activation_bytes = recorder.live - 3 * before
            recorder.phase = "backward"
            loss.backward()
            del loss
            recorder.phase = "optimizer"
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0, foreach=True)
            optimizer.step()
    recorder.trace.state_bytes = 4 * before  # weights, gradients and two moments
    return recorder.trace


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _enlarge(value: Any, scale: int) -> Any:
    """Return a tensor of `scale` times the cells or tokens: longer if it is a packed row, else with more rows."""
    if not isinstance(value, Tensor) or not value.ndim:
        return torch.empty(value.shape, dtype=value.dtype) if isinstance(value, Tensor) else value
    axis = 1 if value.ndim == 2 and len(value) == 1 else 0
    shape = list(value.shape)
    extra = 1 if axis == 0 and value.dtype == torch.int32 else 0  # offsets have one entry more than cells
    shape[axis] = (shape[axis] - extra) * scale + extra
    return torch.empty(shape, dtype=value.dtype)
