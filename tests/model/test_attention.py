"""No token sees another cell, whichever path computes attention; half a layout is refused."""

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
    cell_boundaries,
    cell_of,
    eager_attention,
    mask_for,
    packing_of,
    varlen_attention,
)

lengths = st.lists(st.integers(1, 9), min_size=1, max_size=6)


def packing_for(lengths: list[int]) -> Packing:
    return Packing(torch.tensor([0, *lengths]).cumsum(0).to(torch.int32), max(lengths))


@given(lengths=lengths, tail=st.integers(0, 3))
def test_tokens_behind_the_last_cell_are_one_more(lengths: list[int], tail: int) -> None:
    boundaries, longest = packing_for(lengths)
    packing = packing_of(torch.zeros(1, sum(lengths) + tail), None, boundaries, boundaries, longest, longest)
    assert packing is not None
    assert packing.boundaries.diff().tolist() == [*lengths, tail]
    assert packing.boundaries.dtype == torch.int32


@settings(deadline=None)
@given(lengths=lengths, seed=st.integers(0, 99))
def test_every_path_attends_within_each_cell_alone(lengths: list[int], seed: int) -> None:
    packing, module = packing_for(lengths), nn.Module()
    random = torch.Generator().manual_seed(seed)
    query, key, value = torch.randn(3, 1, 2, sum(lengths), 4, generator=random)
    slow = torch.cat(
        [
            eager_attention(module, query[:, :, a:b], key[:, :, a:b], value[:, :, a:b], None, scaling=0.3)[0]
            for a, b in pairwise(packing.boundaries.tolist())
        ],
        dim=1,
    )
    mask = mask_for("eager", None, packing, value[0].transpose(0, 1)[None, :, 0])
    assert mask_for(VARLEN, None, packing, query) is None
    for found in (
        eager_attention(module, query, key, value, mask, scaling=0.3)[0],
        varlen_attention(module, query, key, value, None, scaling=0.3, packing=packing)[0],
        _attend_per_cell(query, key, value, packing, 0.3, 0.0).transpose(1, 2),
        _attend_padded(query, key, value, packing, 0.3, 0.0).transpose(1, 2),
    ):
        torch.testing.assert_close(found, slow)


@given(lengths=lengths)
def test_cell_of_counts_cells(lengths: list[int]) -> None:
    expected = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    found = cell_of(torch.arange(sum(lengths)), packing_for(lengths).boundaries)
    assert torch.equal(found, expected)


def test_padded_cells_begin_at_every_row() -> None:
    assert cell_boundaries(torch.zeros(3, 4), None).tolist() == [0, 4, 8, 12]


@pytest.mark.parametrize("name", ["eager", VARLEN])
def test_padding_mask_hides_keys(name: str) -> None:
    attend = {"eager": eager_attention, VARLEN: varlen_attention}[name]
    query, key, value = torch.randn(3, 1, 1, 4, 2, generator=torch.Generator().manual_seed(0))
    mask = mask_for(name, torch.tensor([[1, 1, 0, 0]]), None, query)
    found = attend(nn.Module(), query, key, value, mask, scaling=1.0)[0]
    shorter = attend(nn.Module(), query, key[:, :, :2], value[:, :, :2], None, scaling=1.0)[0]
    torch.testing.assert_close(found, shorter)


BOUNDARIES = torch.tensor([0, 2, 5], dtype=torch.int32)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"boundaries": BOUNDARIES}, "max_length_q"),
        ({"longest": 3}, "cu_seq_lens_q"),
        ({"same_boundaries": BOUNDARIES, "same_longest": 3}, "cu_seq_lens_q"),
        ({"boundaries": BOUNDARIES, "longest": 3, "padding": torch.ones(1, 5)}, "with an attention_mask"),
        ({"boundaries": BOUNDARIES, "longest": 3, "input_ids": torch.zeros(2, 5)}, r"input_ids \(2, 5\)"),
        ({"boundaries": BOUNDARIES, "longest": 3, "same_boundaries": BOUNDARIES[:2]}, "same tensor twice"),
    ],
)
def test_half_a_layout_is_refused(layout: dict[str, Any], message: str) -> None:
    nothing = dict.fromkeys(("padding", "boundaries", "same_boundaries", "longest", "same_longest"))
    with pytest.raises(ValueError, match=message):
        packing_of(**{"input_ids": torch.zeros(1, 5), **nothing, **layout})


def test_padded_input_has_no_packing() -> None:
    assert packing_of(torch.zeros(2, 5), torch.ones(2, 5), None, None, None, None) is None


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_kernel_attends_within_each_cell_alone(dtype: torch.dtype) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    lengths = [3, 120, 1, 57]
    packing = packing_for(lengths)
    states = torch.randn(3, 1, 2, sum(lengths), 16)
    expected = _attend_per_cell(*states, packing, 0.25, 0.0).transpose(1, 2)
    on_gpu = Packing(packing.boundaries.cuda(), packing.max_length)
    found, _ = varlen_attention(nn.Module(), *states.cuda().to(dtype), None, scaling=0.25, packing=on_gpu)
    torch.testing.assert_close(found.float().cpu(), expected, atol=2e-2, rtol=2e-2)
