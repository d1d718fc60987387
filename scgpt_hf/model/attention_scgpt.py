"""Attention within cells: no token attends to a token of another cell.

Packed input has all cells in one row. The attention functions of the library would let the cells attend to each other,
because they ignore `cu_seq_lens_q`. This module therefore registers another function, `scgpt_varlen`, which is the
default of all models. For padded input it is `scaled_dot_product_attention` (SDPA). For packed input it computes
attention per cell, without a mask, in the fastest way that the device, the dtype and the dropout allow. The library's
`sdpa` and `eager` work too: `build_mask` builds a block-diagonal mask for them, which needs memory for the square of
the number of all tokens. `query_attention_scgpt` adds the queries of the generative objective.
"""

# Tensor.split has no types.
# mypy: disable-error-code="no-untyped-call"

from itertools import groupby
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import logging

from .query_attention_scgpt import GivenKeys, attend_to_given

VARLEN = "scgpt_varlen"

logger = logging.get_logger(__name__)


class Packing(NamedTuple):
    """The positions of packed cells in the row of all tokens.

    Attributes:
        offsets: int32 offsets of the cells, (cells + 2,). Padding after the last cell, which `bucket` adds, counts as
            one more cell, empty if there is no padding. It attends to itself and never to a cell.
        max_length: length of the longest cell or of the padding, or any larger number.
        given: the tokens to which all tokens of their cell attend, if others are queries.
    """

    offsets: Tensor
    max_length: int
    given: GivenKeys | None = None


def make_packing(
    input_ids: Tensor,
    attention_mask: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    max_length_q: int | None,
    max_length_k: int | None,
    queries: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Packing | None:
    """Return the positions of packed cells, or None for padded input.

    The arguments are those of `ScGPTModel.forward`.

    Raises:
        ValueError: an argument of packed input is missing, packed input has a mask or more than one row, or the
            arguments of queries are incomplete or have wrong shapes.
    """
    if queries is not None and queries.shape != input_ids.shape:
        raise ValueError(f"queries {tuple(queries.shape)} and input_ids {tuple(input_ids.shape)} differ in shape")
    if all(passed is None for passed in (cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k)):
        if key_positions is not None:
            raise ValueError("key_positions belong to packed input; leave them out if the cells are padded")
        return None
    if cu_seq_lens_q is None or max_length_q is None:
        raise ValueError(
            "packed input needs cu_seq_lens_q and max_length_q; pass both, or none of these for padded input"
        )
    if attention_mask is not None or len(input_ids) != 1:
        raise ValueError(
            f"packed input is (1, tokens) without attention_mask; found input_ids {tuple(input_ids.shape)} with "
            f"{'an' if attention_mask is not None else 'no'} attention_mask; omit cu_seq_lens_q if the cells are padded"
        )
    if cu_seq_lens_k is not None and cu_seq_lens_k.shape != cu_seq_lens_q.shape:
        raise ValueError(
            f"cu_seq_lens_k {tuple(cu_seq_lens_k.shape)} differs from cu_seq_lens_q {tuple(cu_seq_lens_q.shape)}; "
            "cells attend to themselves, so pass the same tensor twice"
        )
    offsets = _close(cu_seq_lens_q, input_ids.shape[1])
    if queries is None and key_positions is None:
        return Packing(offsets, max_length_q)
    if queries is None or key_positions is None or cu_seq_lens_k is None or max_length_k is None:
        raise ValueError(
            "packed input with queries needs queries, key_positions, cu_seq_lens_k and max_length_k; create them with "
            "pack(tokens, queries=True)"
        )
    given = GivenKeys(queries[0], key_positions, _close(cu_seq_lens_k, len(key_positions)), max_length_k)
    return Packing(offsets, max_length_q, given)


def _close(offsets: Tensor, end: int) -> Tensor:
    """Return the offsets with one more cell, which ends at `end`."""
    return torch.cat([offsets, offsets.new_full((1,), end)])


def cell_offsets(input_ids: Tensor, cu_seq_lens: Tensor | None) -> Tensor:
    """Return the offsets of the cells in the flattened input, (cells + 1,), for packed or padded input."""
    if cu_seq_lens is not None:
        return cu_seq_lens
    cells, tokens = input_ids.shape
    return torch.arange(cells + 1, device=input_ids.device) * tokens


def find_cells(positions: Tensor, offsets: Tensor) -> Tensor:
    """Return the number of the cell at each position of the flattened input, int64.

    Positions after the last cell get the number of cells.
    """
    return torch.bucketize(positions, offsets[1:], right=True)


def build_mask(
    implementation: str | None,
    attention_mask: Tensor | None,
    packing: Packing | None,
    hidden: Tensor,
    queries: Tensor | None = None,
) -> Tensor | None:
    """Return which keys each query may attend to, or None if it may attend to all.

    Args:
        implementation: name of the attention function. `scgpt_varlen` needs no mask for packed input.
        attention_mask: true (or 1) at real tokens, (cells, tokens); None if there is no padding.
        packing: positions of the cells, for packed input.
        hidden: embedded input, (cells, tokens, hidden), or (1, tokens, hidden) when packed.
        queries: true at tokens to which only they themselves attend, bool, (cells, tokens) or (1, tokens).

    Returns:
        A bool mask that can be broadcast to (cells, heads, queries, keys).
    """
    if packing is not None and implementation == VARLEN:
        return None
    allowed = None if attention_mask is None else attention_mask.to(torch.bool)[:, None, :]
    if packing is not None:
        cell = find_cells(torch.arange(hidden.shape[1], device=hidden.device), packing.offsets)
        allowed = (cell[:, None] == cell)[None]  # (1, tokens, tokens)
    if queries is not None:
        given = ~queries[:, None, :] if allowed is None else allowed & ~queries[:, None, :]
        allowed = given | torch.eye(hidden.shape[1], dtype=torch.bool, device=hidden.device)
    return None if allowed is None else allowed[:, None]


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Compute attention with explicit probabilities, which `output_attentions` needs.

    Returns:
        Attended values, (cells, tokens, heads, width), and probabilities, (cells, heads, tokens, tokens).
    """
    scores = query @ key.mT * scaling
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    packing: Packing | None = None,
    output_attentions: bool = False,
    **_: Any,
) -> tuple[Tensor, None]:
    """Compute attention within each cell, for packed or padded input.

    The signature is that of the library's attention functions.

    Args:
        module: the attention layer.
        query: (cells, heads, tokens, width), or (1, heads, tokens, width) when packed.
        key: same shape as `query`.
        value: same shape as `query`.
        attention_mask: mask that `build_mask` returns; None when packed.
        scaling: factor of the scores.
        dropout: share of attention probabilities to drop.
        packing: positions of the cells, for packed input.
        output_attentions: whether probabilities are requested. Only eager attention returns them, so this logs a
            warning.

    Returns:
        Attended values, (cells, tokens, heads, width), and None.
    """
    if output_attentions:
        logger.warning_once(f"{VARLEN} attention returns no attentions; load with attn_implementation='eager' for them")
    if packing is None:
        attended = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    elif packing.given is not None:
        attended = attend_to_given(
            query, key, value, packing.given, packing.offsets, packing.max_length, scaling, dropout
        )
    # The lengths of the cells are data, and a compiled graph cannot loop over data, so `torch.compile` takes the last
    # branch on a CPU.
    elif query.device.type == "cpu" and not torch.compiler.is_compiling():
        attended = _attend_per_cell(query, key, value, packing, scaling, dropout)
    elif query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        attended = _attend_with_varlen_kernel(query, key, value, packing, scaling)
    else:
        attended = _attend_padded(query, key, value, packing, scaling, dropout)
    return attended.transpose(1, 2), None


def _attend_per_cell(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float, dropout: float
) -> Tensor:
    lengths = [length for length in packing.offsets.diff().tolist() if length]
    if query.dtype == torch.bfloat16 and query.requires_grad and not dropout:
        return _attend_per_run(query, key, value, lengths, scaling)
    # A loop over cells, because nothing exact is faster on a CPU. Forward and backward of 32 cells of about 130 tokens,
    # 4 layers of width 128, one thread: 0.34 s with this loop, 0.41 s in groups of 4 cells, 0.70 s padded.
    cells = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [F.scaled_dot_product_attention(q, k, v, None, dropout, scale=scaling) for q, k, v in cells]
    return torch.cat(attended, dim=2)


def _attend_per_run(query: Tensor, key: Tensor, value: Tensor, lengths: list[int], scaling: float) -> Tensor:
    """Attend with explicit probabilities, runs of neighboring cells of one length at once; for training in bfloat16.

    The backward pass of PyTorch's CPU kernel is slow in bfloat16. Forward and backward of 64 cells, 4 heads of width
    32, one thread: 80 ms with the kernel, 35 ms here for 97 tokens per cell in runs of one cell, 15 ms in one run.
    """
    runs = [(length, len(list(cells))) for length, cells in groupby(lengths)]
    bounds = [length * n_cells for length, n_cells in runs]
    attended = []
    for (length, _), *states in zip(runs, *(x[0].split(bounds, dim=1) for x in (query, key, value)), strict=True):
        q, k, v = (x.unflatten(1, (-1, length)) for x in states)  # (heads, cells of the run, tokens, width)
        attended.append((torch.softmax((q * scaling) @ k.mT, dim=-1) @ v).flatten(1, 2))
    return torch.cat(attended, dim=1)[None]


def _attend_with_varlen_kernel(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
    # Imported here, because only CUDA devices have the kernel.
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, width)
    offsets, longest = packing.offsets, packing.max_length
    # Positional arguments, because their names differ between releases of torch.
    attended = varlen_attn(query, key, value, offsets, offsets, longest, longest, scale=scaling)
    return cast(Tensor, attended).transpose(0, 1)[None]


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float, dropout: float
) -> Tensor:
    """Attend in a padded copy, for devices, dtypes and dropout that the variable-length kernel does not support.

    All shapes follow from `max_length` and the number of cells, never from data, so `torch.compile` can trace it.
    """
    starts, n_cells = packing.offsets[:-1], len(packing.offsets) - 1
    tokens = torch.arange(query.shape[2], device=query.device)
    cell = find_cells(tokens, packing.offsets)
    slots = cell * packing.max_length + tokens - starts[cell]  # position of each token in the flattened padded copy

    def pad(states: Tensor) -> Tensor:  # (cells, heads, longest, width)
        flat = states[0].transpose(0, 1)
        padded = flat.new_zeros(n_cells * packing.max_length, *flat.shape[1:]).index_copy(0, slots, flat)
        return padded.view(n_cells, packing.max_length, *flat.shape[1:]).transpose(1, 2)

    real = torch.arange(packing.max_length, device=query.device) < packing.offsets.diff()[:, None]
    attended = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), real[:, None, None, :], dropout, scale=scaling
    )
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, slots).transpose(0, 1)[None]


AttentionInterface.register(VARLEN, varlen_attention)
