"""Attention within cells, with no token of one cell seeing another cell.

Adds `scgpt_varlen` to the library's attention functions, and is the model's default: for padded input it is SDPA, for
packed input it never builds a mask. `sdpa` and `eager` get the mask that `mask_for` builds for either layout.
"""

# Tensor.split has no types.
# mypy: disable-error-code="no-untyped-call"

from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.utils import logging

VARLEN = "scgpt_varlen"

logger = logging.get_logger(__name__)


class Packing(NamedTuple):
    """Where packed cells lie in the row of all tokens: boundaries, int32, and at least the length of the longest.

    Tokens behind the last cell belong to none: they make one more, often empty, so boundaries are (cells + 2,).
    """

    boundaries: Tensor
    max_length: int


def packing_of(
    input_ids: Tensor,
    padding: Tensor | None,
    boundaries: Tensor | None,
    same_boundaries: Tensor | None,
    longest: int | None,
    same_longest: int | None,
) -> Packing | None:
    """Return where packed cells lie, or None for padded input; what is neither is refused.

    Raises:
        ValueError: half of what packed input needs is missing, or it comes with padding or in more than one row.
    """
    if all(given is None for given in (boundaries, same_boundaries, longest, same_longest)):
        return None
    if boundaries is None or longest is None:
        raise ValueError(
            "packed input needs cu_seq_lens_q and max_length_q; pass both, or none of these for padded input"
        )
    if padding is not None or len(input_ids) != 1:
        raise ValueError(
            f"packed input is (1, tokens) without attention_mask; found input_ids {tuple(input_ids.shape)} with "
            f"{'an' if padding is not None else 'no'} attention_mask; leave cu_seq_lens_q out if the cells are padded"
        )
    if same_boundaries is not None and same_boundaries.shape != boundaries.shape:
        raise ValueError(
            f"cu_seq_lens_k {tuple(same_boundaries.shape)} differs from cu_seq_lens_q {tuple(boundaries.shape)}; "
            "cells attend to themselves, so pass the same tensor twice"
        )
    tail = boundaries.new_full((1,), input_ids.shape[1])
    return Packing(torch.cat([boundaries, tail]), longest)


def cell_boundaries(input_ids: Tensor, packed: Tensor | None) -> Tensor:
    """Return where each cell begins and ends in the flattened input, (cells + 1,): as packed, or by the shape."""
    if packed is not None:
        return packed
    cells, tokens = input_ids.shape
    return torch.arange(cells + 1, device=input_ids.device) * tokens


def cell_of(positions: Tensor, boundaries: Tensor) -> Tensor:
    """Return the cell each position of the flattened input belongs to, int64; behind the last, the number of cells."""
    return torch.bucketize(positions, boundaries[1:], right=True)


def mask_for(
    implementation: str | None, padding: Tensor | None, packing: Packing | None, hidden: Tensor
) -> Tensor | None:
    """Return which keys each query may see, bool, broadcastable to (cells, heads, queries, keys); None if all.

    Args:
        implementation: name of the attention function; `scgpt_varlen` needs no mask for packed input.
        padding: true (or 1) at real tokens, (cells, tokens); None if there is no padding.
        packing: where the cells lie, for packed input.
        hidden: embedded input, (cells, tokens, hidden), or (1, tokens, hidden) when packed.
    """
    if packing is None:
        return None if padding is None else padding.to(torch.bool)[:, None, None, :]
    if implementation == VARLEN:
        return None
    cell = cell_of(torch.arange(hidden.shape[1], device=hidden.device), packing.boundaries)
    return (cell[:, None] == cell)[None, None]  # (1, 1, tokens, tokens)


def eager_attention(
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
    """Return attended values, (cells, tokens, heads, width), and probabilities, (cells, heads, tokens, tokens)."""
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
    """Return the attended values, (cells, tokens, heads, width), each cell attending to itself alone.

    Args:
        module: the attention layer.
        query: (cells, heads, tokens, width), or (1, heads, tokens, width) when packed; `key` and `value` alike.
        key: see `query`.
        value: see `query`.
        attention_mask: as `mask_for` returns it; None when packed.
        scaling: factor of the scores.
        dropout: share of attention probabilities dropped.
        packing: where the cells lie, for packed input.
        output_attentions: whether probabilities were asked for, which only eager attention has.
    """
    if output_attentions:
        logger.warning_once(f"{VARLEN} attention returns no attentions; load with attn_implementation='eager' for them")
    if packing is None:
        attended = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout, scale=scaling)
    elif query.device.type == "cpu" and not torch.compiler.is_compiling():  # lengths are data, which no graph may see
        attended = _attend_per_cell(query, key, value, packing, scaling, dropout)
    elif query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and not dropout:
        attended = _attend_with_varlen_kernel(query, key, value, packing, scaling)
    else:
        attended = _attend_padded(query, key, value, packing, scaling, dropout)
    return attended.transpose(1, 2), None


def _attend_per_cell(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float, dropout: float
) -> Tensor:
    # A loop over cells, because on a CPU nothing exact is faster: forward and backward of 32 cells of about 130 tokens,
    # 4 layers of 128, takes 0.34 s so, 0.41 s in buckets of 4 cells, 0.70 s padded (one thread).
    lengths = [length for length in packing.boundaries.diff().tolist() if length]
    cells = zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True)
    attended = [F.scaled_dot_product_attention(q, k, v, None, dropout, scale=scaling) for q, k, v in cells]
    return torch.cat(attended, dim=2)


def _attend_with_varlen_kernel(query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float) -> Tensor:
    # Imported here: present from torch 2.10 on, and only a CUDA device has the kernel.
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = (states[0].transpose(0, 1) for states in (query, key, value))  # (tokens, heads, width)
    ends, longest = packing.boundaries, packing.max_length
    attended = varlen_attn(query, key, value, ends, ends, longest, longest, scale=scaling)
    return cast(Tensor, attended).transpose(0, 1)[None]


def _attend_padded(
    query: Tensor, key: Tensor, value: Tensor, packing: Packing, scaling: float, dropout: float
) -> Tensor:
    """Attend in a padded copy: for devices, dtypes and dropout that the variable-length kernel does not serve."""
    starts, n_cells = packing.boundaries[:-1], len(packing.boundaries) - 1
    tokens = torch.arange(query.shape[2], device=query.device)
    cell = cell_of(tokens, packing.boundaries)
    slots = cell * packing.max_length + tokens - starts[cell]  # where each token goes in the padded copy

    def pad(states: Tensor) -> Tensor:  # (cells, heads, longest, width)
        flat = states[0].transpose(0, 1)
        padded = flat.new_zeros(n_cells * packing.max_length, *flat.shape[1:]).index_copy(0, slots, flat)
        return padded.view(n_cells, packing.max_length, *flat.shape[1:]).transpose(1, 2)

    real = torch.arange(packing.max_length, device=query.device) < packing.boundaries.diff()[:, None]
    attended = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), real[:, None, None, :], dropout, scale=scaling
    )
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, slots).transpose(0, 1)[None]


AttentionInterface.register(VARLEN, varlen_attention)
