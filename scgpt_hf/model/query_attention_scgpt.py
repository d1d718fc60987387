"""Attention of the generative objective: all tokens attend to the given tokens, and a query attends to itself too.

In generative training some genes of a cell are *given* with their values, and the others are *queries*, by name only.
No token may attend to a query but the query itself. A mask of tokens × tokens would say so and cost memory for the
square of the cell. Here the keys are the given tokens only, which ordinary attention kernels support, and the query's
own key is added afterwards. With the output o and the log-sum-exp l of the scores over the given keys, and the score
s of the query with itself,

    w = exp(s) / (exp(l) + exp(s)) = sigmoid(s − l),    result = (1 − w) o + w v.

That is exact: it is the softmax over the given keys and the query. The gradient needs no second formula for the given
keys. The backward pass of a kernel computes probabilities from l and the correction from o; with the merged result and
the merged log-sum-exp in their place, it returns the gradients of the merged attention.

Source: merging of partial softmax results, Milakov and Gimelshein 2018, arXiv:1805.02867; their backward pass, Dao et
al. 2022, arXiv:2205.14135, appendix B.
"""

# Tensor.split, autograd functions and operators have no types.
# mypy: disable-error-code="no-untyped-call, no-any-return"

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class GivenKeys(NamedTuple):
    """The given tokens of packed cells, to which all tokens of their cell attend.

    Attributes:
        queries: true at tokens that are queries, bool (tokens,).
        positions: position of each given token in the row of all tokens, int64 (keys,), ascending.
        offsets: int32 offsets of the cells in `positions`, as those of `Packing`, (cells + 2,).
        max_length: most given tokens of a cell, or any larger number.
    """

    queries: Tensor
    positions: Tensor
    offsets: Tensor
    max_length: int


class _Cells(NamedTuple):
    """Where packed cells begin and end, among all tokens and among the given ones.

    Attributes:
        offsets: int32 offsets of the cells, (cells + 1,).
        key_offsets: int32 offsets of their given tokens, (cells + 1,).
        max_length: length of the longest cell, or any larger number.
        max_keys: most given tokens of a cell, or any larger number.
    """

    offsets: Tensor
    key_offsets: Tensor
    max_length: int
    max_keys: int


def attend_to_given(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    given: GivenKeys,
    offsets: Tensor,
    max_length: int,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Compute attention of packed cells whose tokens attend to the given tokens, and queries to themselves too.

    Args:
        query: shape (1, heads, tokens, width).
        key: same shape.
        value: same shape.
        given: the given tokens of each cell; each cell has one, its `<cls>`.
        offsets: int32 offsets of the cells, (cells + 2,); see `attention_scgpt.Packing`.
        max_length: length of the longest cell, or any larger number.
        scaling: factor of the scores.
        dropout: share of attention probabilities to drop.

    Returns:
        Attended values, shaped like `query`.
    """
    keys, values = (states.index_select(2, given.positions) for states in (key, value))
    cells = _Cells(offsets, given.offsets, max_length, given.max_length)
    states = (query[0], keys[0], values[0], key[0], value[0])  # (heads, tokens or keys, width)
    if _has_kernel(query, dropout):
        return _MergedAttention.apply(*states, given.queries, cells, scaling)[None]
    # The lengths of the cells are data, over which a compiled graph cannot loop.
    if query.device.type == "cpu" and not torch.compiler.is_compiling():
        return _attend_per_cell(*states, given.queries, cells, scaling, dropout)[None]
    return _attend_padded(*states, given.queries, cells, scaling, dropout)[None]


def merge_self(attended: Tensor, log_sum: Tensor, self_score: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Add one key per token to finished attention, and return the result and its log-sum-exp.

    Args:
        attended: result of attention over other keys, (heads, tokens, width).
        log_sum: log-sum-exp of the scores over these keys, float32 (heads, tokens).
        self_score: score of each token with the added key, −inf where none is added, float32 (heads, tokens).
        value: value of the added key, (heads, tokens, width).
    """
    weight = torch.sigmoid(self_score - log_sum)[..., None]
    merged = attended.float() + weight * (value.float() - attended.float())
    return merged.to(attended.dtype), torch.logaddexp(log_sum, self_score)


def _has_kernel(query: Tensor, dropout: float) -> bool:
    """Return whether a kernel that returns the log-sum-exp supports these tensors."""
    if dropout:
        return False
    if query.device.type == "cuda":
        return query.dtype in (torch.float16, torch.bfloat16)
    # The backward pass of PyTorch's CPU kernel is slow in half precision; see `attention_scgpt`.
    return query.device.type == "cpu" and query.dtype == torch.float32 and not torch.compiler.is_compiling()


class _MergedAttention(torch.autograd.Function):
    """Attention over the given keys by a kernel, and the own key of queries; forward and backward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        keys: Tensor,
        values: Tensor,
        key: Tensor,
        value: Tensor,
        queries: Tensor,
        cells: _Cells,
        scaling: float,
    ) -> Tensor:
        score = _self_score(query, key, queries, scaling)
        kernel = _forward_cuda if query.is_cuda else _forward_cpu
        attended, log_sum, random_state = kernel(query, keys, values, cells, scaling)
        merged, log_sum = merge_self(attended, log_sum, score, value)
        ctx.save_for_backward(query, keys, values, key, value, merged, log_sum, score, *random_state)
        ctx.cells, ctx.scaling = cells, scaling
        return merged

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, keys, values, key, value, merged, log_sum, score, *random_state = ctx.saved_tensors
        gradient = gradient.contiguous()
        kernel = _backward_cuda if query.is_cuda else _backward_cpu
        of_query, of_keys, of_values = kernel(
            gradient, query, keys, values, merged, log_sum, random_state, ctx.cells, ctx.scaling
        )
        # The gradient of a softmax: probability × (its own term − the mean of all terms).
        weight = torch.exp(score - log_sum)[..., None]
        upstream = gradient.float()
        of_score = weight * (upstream * (value.float() - merged.float())).sum(-1, keepdim=True) * ctx.scaling
        of_query = of_query + (of_score * key.float()).to(query.dtype)
        of_key, of_value = (of_score * query.float()).to(key.dtype), (weight * upstream).to(value.dtype)
        return of_query, of_keys, of_values, of_key, of_value, None, None, None


def _self_score(query: Tensor, key: Tensor, queries: Tensor, scaling: float) -> Tensor:
    """Return the score of each query with itself, −inf at given tokens, float32 (heads, tokens)."""
    score = (query.float() * key.float()).sum(-1) * scaling
    return score.masked_fill(~queries, -torch.inf)


def _forward_cpu(
    query: Tensor, keys: Tensor, values: Tensor, cells: _Cells, scaling: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    results = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q[None], k[None], v[None], scale=scaling)
        for q, k, v in _split(cells, query, keys, values)
    ]
    attended = torch.cat([result[0][0] for result in results], dim=1)
    return attended, torch.cat([result[1][0] for result in results], dim=1), ()


def _backward_cpu(
    gradient: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    merged: Tensor,
    log_sum: Tensor,
    random_state: list[Tensor],
    cells: _Cells,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    parts = zip(
        _split(cells, query, keys, values), _split(cells, gradient, merged, log_sum, with_keys=False), strict=True
    )
    found = [
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            g[None], q[None], k[None], v[None], o[None], sums[None], 0.0, False, scale=scaling
        )
        for (q, k, v), (g, o, sums) in parts
    ]
    of_query, of_keys, of_values = (torch.cat([of[0] for of in cells_], dim=1) for cells_ in zip(*found, strict=True))
    return of_query, of_keys, of_values


def _forward_cuda(
    query: Tensor, keys: Tensor, values: Tensor, cells: _Cells, scaling: float
) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
    states = [x.transpose(0, 1) for x in (query, keys, values)]  # (tokens, heads, width)
    attended, log_sum, *random_state, _ = torch.ops.aten._flash_attention_forward(
        *states, *cells, 0.0, False, False, scale=scaling
    )
    return attended.transpose(0, 1), log_sum, tuple(random_state)


def _backward_cuda(
    gradient: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    merged: Tensor,
    log_sum: Tensor,
    random_state: list[Tensor],
    cells: _Cells,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    states = [x.transpose(0, 1).contiguous() for x in (gradient, query, keys, values, merged)]
    found = torch.ops.aten._flash_attention_backward(*states, log_sum, *cells, 0.0, False, *random_state, scale=scaling)
    of_query, of_keys, of_values = (of.transpose(0, 1) for of in found)
    return of_query, of_keys, of_values


def _attend_per_cell(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    cells: _Cells,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attend with explicit probabilities, cell by cell: the own key is one more column of scores."""
    score = _self_score(query, key, queries, scaling)
    own = _split(cells, score, value, with_keys=False)
    parts = zip(_split(cells, query, keys, values), own, strict=True)
    attended = [_attend_explicitly(q, k, v, s, itself, None, scaling, dropout) for (q, k, v), (s, itself) in parts]
    return torch.cat(attended, dim=1)


def _attend_padded(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Tensor,
    cells: _Cells,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attend with explicit probabilities in padded copies, for devices, dtypes and dropout that no kernel supports.

    All shapes follow from the numbers of cells and tokens, never from data, so `torch.compile` can trace it.
    """
    slots, key_slots = (
        _slots(states.shape[1], offsets, longest)
        for states, offsets, longest in (
            (query, cells.offsets, cells.max_length),
            (keys, cells.key_offsets, cells.max_keys),
        )
    )
    n_cells = len(cells.offsets) - 1

    def pad(states: Tensor, slots: Tensor, longest: int) -> Tensor:  # (cells, heads, longest, width)
        flat = states.transpose(0, 1)
        padded = flat.new_zeros(n_cells * longest, *flat.shape[1:]).index_copy(0, slots, flat)
        return padded.unflatten(0, (n_cells, longest)).transpose(1, 2)

    score = _self_score(query, key, queries, scaling)[..., None]
    q, s, itself = (pad(states, slots, cells.max_length) for states in (query, score, value))
    k, v = (pad(states, key_slots, cells.max_keys) for states in (keys, values))
    real = torch.arange(cells.max_keys, device=query.device) < cells.key_offsets.diff()[:, None]
    attended = _attend_explicitly(q, k, v, s[..., 0], itself, real[:, None, None, :], scaling, dropout)
    return attended.transpose(1, 2).flatten(0, 1).index_select(0, slots).transpose(0, 1)


def _attend_explicitly(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    self_score: Tensor,
    value: Tensor,
    real: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """Attend to keys and to one more key per token; `real` is true at keys that are no padding."""
    scores = ((query * scaling) @ keys.mT).float()
    if real is not None:
        scores = scores.masked_fill(~real, torch.finfo(scores.dtype).min)
    probabilities = torch.softmax(torch.cat([scores, self_score[..., None]], dim=-1), dim=-1)
    probabilities = F.dropout(probabilities, dropout).to(query.dtype)
    return probabilities[..., :-1] @ values + probabilities[..., -1:] * value


def _split(cells: _Cells, first: Tensor, *others: Tensor, with_keys: bool = True) -> list[tuple[Tensor, ...]]:
    """Return the states of each cell that has tokens: its tokens of `first`, and its keys of `others`.

    Args:
        cells: where the cells begin.
        first: shape (heads, tokens, …).
        others: shape (heads, keys, …), or (heads, tokens, …) if not `with_keys`.
        with_keys: whether `others` hold given tokens only.
    """
    lengths = cells.offsets.diff().tolist()
    other_lengths = cells.key_offsets.diff().tolist() if with_keys else lengths
    parts = zip(first.split(lengths, dim=1), *(x.split(other_lengths, dim=1) for x in others), strict=True)
    return [states for states, length in zip(parts, lengths, strict=True) if length]


def _slots(n_tokens: int, offsets: Tensor, longest: int) -> Tensor:
    """Return the position of each packed token in a padded copy, flattened, int64 (tokens,)."""
    tokens = torch.arange(n_tokens, device=offsets.device)
    cell = torch.bucketize(tokens, offsets[1:], right=True)
    return cell * longest + tokens - offsets[cell]
