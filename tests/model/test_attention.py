"""No token attends to another cell, on any code path; incomplete arguments of packed input raise."""

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from scgpt_hf.model.attention_scgpt import (
    VARLEN,
    Packing,
    _attend_padded,
    _attend_per_cell,
    build_mask,
    cell_offsets,
    eager_attention_forward,
    find_cells,
    make_packing,
    varlen_attention,
)

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def packing_for(lengths: list[int]) -> Packing:
    return Packing(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths))


@given(lengths=lengths, tail=st.integers(0, 3))
def test_padding_after_the_last_cell_counts_as_a_cell(lengths: list[int], tail: int) -> None:
    offsets, longest, _ = packing_for(lengths)
    packing = make_packing(torch.zeros(1, sum(lengths) + tail), None, offsets, offsets, longest, longest)
    assert packing is not None
    assert packing.offsets.diff().tolist() == [*lengths, tail]
    assert packing.offsets.dtype == torch.int32


@settings(deadline=None)
@given(lengths=lengths, seed=st.integers(0, 99))
def test_every_code_path_attends_within_each_cell_only(lengths: list[int], seed: int) -> None:
    packing, module = packing_for(lengths), nn.Module()
    random = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 4, generator=random)
    slow = torch.cat(
        [
            eager_attention_forward(module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, scaling=0.3)[0]
            for a, b in pairwise(packing.offsets.tolist())
        ],
        dim=1,
    )
    mask = build_mask("eager", None, packing, value[0].transpose(0, 1)[None, :, 0])
    assert build_mask(VARLEN, None, packing, query) is None
    for found in (
        eager_attention_forward(module, query, key, value, mask, scaling=0.3)[0],
        varlen_attention(module, query, key, value, None, scaling=0.3, packing=packing)[0],
        _attend_per_cell(query, key, value, packing, 0.3, 0.0).transpose(1, 2),
        _attend_padded(query, key, value, packing, 0.3, 0.0).transpose(1, 2),
    ):
        torch.testing.assert_close(found, slow)


@given(lengths=lengths)
def test_find_cells_returns_the_cell_of_each_position(lengths: list[int]) -> None:
    expected = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = find_cells(torch.arange(sum(lengths)), packing_for(lengths).offsets)
    assert torch.equal(found, expected)


def test_each_row_of_padded_input_is_a_cell() -> None:
    assert cell_offsets(torch.zeros(3, 4), None).tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("name", ["eager", VARLEN])
def test_padding_is_not_attended_to(name: str) -> None:
    attend = {"eager": eager_attention_forward, VARLEN: varlen_attention}[name]
    query, key, value = torch.randn(3, 1, 1, 4, 2, generator=torch.Generator().manual_seed(0))
    mask = build_mask(name, torch.tensor([[1, 1, 0, 0]]), None, query)
    found = attend(nn.Module(), query, key, value, mask, scaling=1.0)[0]
    shorter = attend(nn.Module(), query, key[:, :, :2], value[:, :, :2], None, scaling=1.0)[0]
    torch.testing.assert_close(found, shorter)


OFFSETS = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"cu_seq_lens_q": OFFSETS}, "max_length_q"),
        ({"max_length_q": 3}, "cu_seq_lens_q"),
        ({"cu_seq_lens_k": OFFSETS, "max_length_k": 3}, "cu_seq_lens_q"),
        ({"cu_seq_lens_q": OFFSETS, "max_length_q": 3, "attention_mask": torch.ones(1, 5)}, "with an attention_mask"),
        ({"cu_seq_lens_q": OFFSETS, "max_length_q": 3, "input_ids": torch.zeros(2, 5)}, r"input_ids \(2, 5\)"),
        ({"cu_seq_lens_q": OFFSETS, "max_length_q": 3, "cu_seq_lens_k": OFFSETS[:2]}, "same tensor twice"),
    ],
)
def test_incomplete_or_mixed_layouts_raise(layout: dict[str, Any], message: str) -> None:
    nothing = dict.fromkeys(("attention_mask", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"))
    with pytest.raises(ValueError, match=message):
        make_packing(**{"input_ids": torch.zeros(1, 5), **nothing, **layout})


def test_padded_input_has_no_packing() -> None:
    assert make_packing(torch.zeros(2, 5), torch.ones(2, 5), None, None, None, None) is None


@pytest.mark.parametrize("lengths", [[5, 5, 5], [3, 120, 1, 57], [4, 4, 9, 9, 9, 4]])
def test_bfloat16_training_on_a_cpu_attends_within_each_cell_only(lengths: list[int]) -> None:
    packing = packing_for(lengths)
    exact = torch.randn(3, 1, 2, sum(lengths), 16, dtype=torch.bfloat16).float().requires_grad_()
    rounded = exact.detach().bfloat16().requires_grad_()
    expected, found = (_attend_per_cell(*states, packing, 0.25, 0.0) for states in (exact, rounded))
    torch.testing.assert_close(found.float(), expected, atol=2e-2, rtol=2e-2)
    weights = torch.randn_like(expected)
    for attended in (expected, found):
        (attended.float() * weights).sum().backward()
    torch.testing.assert_close(rounded.grad.float(), exact.grad, atol=5e-2, rtol=5e-2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_attends_within_each_cell_only(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    lengths = [3, 120, 1, 57]
    packing = packing_for(lengths)
    states = torch.randn(3, 1, 2, sum(lengths), 16)
    expected = _attend_per_cell(*states, packing, 0.25, 0.0).transpose(1, 2)
    on_gpu = Packing(packing.offsets.cuda(), packing.max_length)
    found, _ = varlen_attention(nn.Module(), *states.cuda().to(dtype), None, scaling=0.25, packing=on_gpu)
    torch.testing.assert_close(found.float().cpu(), expected, atol=2e-2, rtol=2e-2)
