"""Packed and padded layouts hold the same tokens, and `Tokens` slices by cells."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, bucket, bucket_size, pack, pad, unpack


def _tokens(n_tokens: list[int], labelled: bool = True) -> Tokens:
    rng = np.random.default_rng(len(n_tokens))
    total = sum(n_tokens)
    values = rng.integers(1, 51, total).astype(np.float32)
    labels = np.where(rng.random(total) < 0.4, values, np.float32(IGNORE)) if labelled else None
    indptr = np.cumsum([0, *n_tokens]).astype(np.int64)
    return Tokens(rng.integers(0, 99, total), values, labels, indptr, np.arange(len(n_tokens)) * 10)


LENGTHS = st.lists(st.integers(1, 9), max_size=8)


@settings(deadline=None)
@given(n_tokens=LENGTHS)
def test_padded_rows_contain_the_packed_cells(n_tokens: list[int]) -> None:
    tokens = _tokens(n_tokens)
    packed, padded = pack(tokens), pad(tokens, pad_id=77, pad_value=-2.0)
    real = padded["attention_mask"]
    for key in ("input_ids", "values", "labels"):
        assert packed[key].shape == (1, sum(n_tokens))
        assert torch.equal(padded[key][real], packed[key][0])
    assert (padded["input_ids"][~real] == 77).all()
    assert (padded["values"][~real] == -2).all()
    assert (padded["labels"][~real] == IGNORE).all()
    assert real.sum(1).tolist() == n_tokens
    assert torch.equal(real.int().cummin(1).values if n_tokens else real.int(), real.int())  # padded on the right


@settings(deadline=None)
@given(n_tokens=LENGTHS)
def test_label_positions_point_at_the_labels_in_both_layouts(n_tokens: list[int]) -> None:
    tokens = _tokens(n_tokens)
    for batch in (pack(tokens), pad(tokens, pad_id=0, pad_value=0)):
        at = batch["label_positions"]
        assert at.dtype == torch.int64
        assert torch.equal(batch["labels"].flatten()[at], torch.from_numpy(tokens.labels[tokens.labels != IGNORE]))


def test_pack_returns_the_offsets_of_the_cells() -> None:
    batch = pack(_tokens([3, 1, 5], labelled=False))
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == [0, 3, 4, 9]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert (batch["max_length_q"], batch["max_length_k"]) == (5, 5)
    assert type(batch["max_length_q"]) is int
    assert not {"labels", "label_positions"} & batch.keys()


def test_batches_have_the_documented_types() -> None:
    for batch in (pack(_tokens([2, 3])), pad(_tokens([2, 3]), pad_id=0, pad_value=0)):
        types = {"input_ids": torch.int64, "values": torch.float32, "labels": torch.float32}
        assert {key: batch[key].dtype for key in types} == types
    assert batch["attention_mask"].dtype == torch.bool


@settings(deadline=None)
@given(n_tokens=LENGTHS, ends=st.tuples(st.integers(-9, 9), st.integers(-9, 9)))
def test_slices_select_cells(n_tokens: list[int], ends: tuple[int, int]) -> None:
    tokens = _tokens(n_tokens)
    part = tokens[ends[0] : ends[1]]
    chosen = list(range(len(n_tokens)))[ends[0] : ends[1]]
    assert len(part) == len(chosen)
    assert part.cell_ids.tolist() == [10 * cell for cell in chosen]
    assert part.indptr[0] == 0
    for at, cell in enumerate(chosen):
        ours, whole = slice(*part.indptr[at : at + 2]), slice(*tokens.indptr[cell : cell + 2])
        for key in ("input_ids", "values", "labels"):
            np.testing.assert_array_equal(getattr(part, key)[ours], getattr(tokens, key)[whole])


@pytest.mark.parametrize("wrong", [3, slice(0, 4, 2), slice(3, 0, -1), "a"])
def test_other_indices_raise(wrong: object) -> None:
    with pytest.raises(TypeError, match="consecutive cells"):
        _tokens([1, 2, 3])[wrong]  # type: ignore[index]


def test_unpack_returns_the_tokens_of_each_cell() -> None:
    batch = pack(_tokens([3, 1, 2]))
    hidden = torch.arange(12.0).reshape(1, 6, 2)
    parts = unpack(hidden, batch["cu_seq_lens_q"])
    assert [len(part) for part in parts] == [3, 1, 2]
    assert torch.equal(torch.cat(parts), hidden[0])


@given(n=st.integers(0, 300_000))
def test_bucket_sizes_are_slightly_larger(n: int) -> None:
    size = bucket_size(n)
    assert n <= size < n + 512
    assert size <= max(n + max(n / 16, 63), 64)
    assert bucket_size(size) == size


def test_there_are_few_buckets() -> None:
    assert len({bucket_size(n) for n in range(4096)}) <= 48
    assert len({bucket_size(n) for n in range(60_000, 64_000)}) <= 9


@settings(deadline=None)
@given(n_tokens=st.lists(st.integers(1, 200), min_size=1, max_size=8), labelled=st.booleans())
def test_bucket_appends_padding_to_the_packed_row(n_tokens: list[int], labelled: bool) -> None:
    tokens = _tokens(n_tokens, labelled)
    if labelled:
        tokens.labels[0] = IGNORE  # `<cls>` is never masked
    packed = pack(tokens)
    longer = bucket(packed, pad_id=77, pad_value=-2.0)
    assert longer.keys() == packed.keys()
    end = sum(n_tokens)
    assert longer["input_ids"].shape == longer["values"].shape == (1, bucket_size(end))
    for key, filler in {"input_ids": 77, "values": -2.0, "labels": IGNORE}.items():
        if key in packed:
            assert torch.equal(longer[key][:, :end], packed[key])
            assert (longer[key][:, end:] == filler).all()
            assert longer[key].dtype == packed[key].dtype
    assert torch.equal(longer["cu_seq_lens_q"], packed["cu_seq_lens_q"])
    assert longer["max_length_q"] == longer["max_length_k"] >= max(*n_tokens, bucket_size(end) - end)
    if labelled:
        labels = longer["labels"].flatten()[longer["label_positions"]]
        assert torch.equal(labels[labels != IGNORE], packed["labels"].flatten()[packed["label_positions"]])
        assert len(labels) == bucket_size(len(packed["label_positions"]))


def test_unpack_drops_the_padding_of_bucket() -> None:
    batch = bucket(pack(_tokens([3, 1, 2])), pad_id=77, pad_value=-2.0)
    assert [part.tolist() for part in unpack(batch["input_ids"], batch["cu_seq_lens_q"])] == [
        part.tolist() for part in unpack(pack(_tokens([3, 1, 2]))["input_ids"], batch["cu_seq_lens_q"])
    ]
