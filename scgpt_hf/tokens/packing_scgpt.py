"""`Tokens`, the tokens of many cells, and the two layouts in which a model reads them.

Cells express different numbers of genes, so their tokens do not form a rectangle. Two cells of 3 and 5 tokens can be
laid out in two ways:

    pad     a a a . .      one row per cell, filled with `<pad>` to the longest: (cells, tokens)
            b b b b b
    pack    a a a b b b b b     all cells in one row, without padding: (1, tokens)

Packed batches carry the offsets of the cells (`cu_seq_lens_q`), and attention keeps the cells apart. The model returns
the same numbers for both layouts. Training packs, because padding would cost more than half of the work. `pad` is
simpler to use, and some settings need it (`ScGPTConfig.padding_dependent_settings`). `bucket` lengthens a packed batch
to one of few sizes, so that `torch.compile` does not recompile for every batch.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .sampling_scgpt import COMPILED, compiled

IGNORE = -100.0
"""The label of a token that is not masked: nothing is predicted there. -100 is PyTorch's usual `ignore_index`."""


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of many cells in flat arrays; the first token of each cell is `<cls>`.

    Attributes:
        input_ids: vocabulary id of each token, int64 (tokens,).
        values: value of each token, its bin for example, float32 (tokens,).
        labels: true value of each masked token, `IGNORE` elsewhere, float32 (tokens,); None before masking.
        indptr: offsets of the cells in these arrays, int64 (cells + 1,), starting at 0.
        cell_ids: id of each cell, int64 (cells,).
    """

    input_ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32] | None
    indptr: npt.NDArray[np.int64]
    cell_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        """Return the number of cells."""
        return len(self.cell_ids)

    def __getitem__(self, cells: slice) -> "Tokens":
        """Return consecutive cells, such as `tokens[2:5]`, as views.

        Raises:
            TypeError: `cells` is not a slice, or has a step.
        """
        if not isinstance(cells, slice) or cells.step not in (None, 1):
            raise TypeError(f"tokens can only be sliced by consecutive cells, as in tokens[2:5]; found {cells!r}")
        first, last, _ = cells.indices(len(self))
        last = max(first, last)
        start, stop = self.indptr[first], self.indptr[last]
        labels = None if self.labels is None else self.labels[start:stop]
        indptr = self.indptr[first : last + 1] - start
        return Tokens(self.input_ids[start:stop], self.values[start:stop], labels, indptr, self.cell_ids[first:last])


def pack(tokens: Tokens, *, queries: bool = False) -> dict[str, Any]:
    """Lay out all cells in one row without padding.

    Args:
        tokens: tokens of the cells.
        queries: masked genes are queries, for models with `objective="generative"`.

    Returns:
        The batch as keyword arguments of the model:

        - `input_ids` int64 and `values` float32, (1, tokens);
        - `cu_seq_lens_q` and `cu_seq_lens_k`, int32 (cells + 1,): offsets of the cells. The names are those of the
          library; queries and keys have the same offsets, because cells attend to themselves;
        - `max_length_q` and `max_length_k`, int: tokens of the longest cell;
        - if tokens are masked, `labels` float32 (1, tokens) and `label_positions` int64 (masked,), which index the row;
        - with `queries`, `queries` bool (1, tokens), true at masked genes, and `key_positions` int64 (keys,), the
          positions of the others. `cu_seq_lens_k` and `max_length_k` are then those of the others.
    """
    offsets = torch.from_numpy(tokens.indptr.astype(np.int32))
    longest = int(np.diff(tokens.indptr).max(initial=0))
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(tokens.input_ids[None]),
        "values": torch.from_numpy(tokens.values[None]),
        "cu_seq_lens_q": offsets,
        "cu_seq_lens_k": offsets,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if tokens.labels is not None:
        batch["labels"] = torch.from_numpy(tokens.labels[None])
        batch["label_positions"] = torch.from_numpy(_find_labels(tokens.labels))
    if queries:
        asked = _masked(tokens)
        n_keys_before = np.concatenate([[0], np.cumsum(~asked)])[tokens.indptr]
        batch |= {
            "queries": torch.from_numpy(asked[None]),
            "key_positions": torch.from_numpy(np.flatnonzero(~asked)),
            "cu_seq_lens_k": torch.from_numpy(n_keys_before.astype(np.int32)),
            "max_length_k": int(np.diff(n_keys_before).max(initial=0)),
        }
    return batch


def bucket(batch: dict[str, Any], *, pad_id: int, pad_value: float) -> dict[str, Any]:
    """Lengthen a packed batch to one of few shapes, so that a compiled model meets few shapes.

    The padding follows the last cell, and no cell attends to it. Added label positions point at the first token. It is
    a `<cls>` without a label, so losses and their divisors do not change.

    Args:
        batch: batch that `pack` has returned.
        pad_id: vocabulary id of `<pad>`.
        pad_value: value at padding.

    Returns:
        A batch with the same keys. `bucket_size` rounds the numbers of tokens, of label positions and of key
        positions; `max_length_q` and `max_length_k` become multiples of 128.
    """
    n_tokens = batch["input_ids"].shape[1]
    tail = bucket_size(n_tokens) - n_tokens
    fillers = {"input_ids": pad_id, "values": pad_value, "labels": IGNORE, "queries": False}
    longer = {key: F.pad(batch[key], (0, tail), value=filler) for key, filler in fillers.items() if key in batch}
    if "label_positions" in batch:
        n_masked = len(batch["label_positions"])
        longer["label_positions"] = F.pad(batch["label_positions"], (0, bucket_size(n_masked) - n_masked))
    # The attention kernel works on tiles of 128 tokens, so rounding up to them costs nothing. The tail counts as a
    # cell: the padding attends to itself.
    longest = 128 * math.ceil(max(batch["max_length_q"], tail) / 128)
    longer |= {"max_length_q": longest, "max_length_k": longest}
    if "key_positions" in batch:
        n_keys = len(batch["key_positions"])
        tail = bucket_size(n_keys + 1) - n_keys  # at least one, because the padding attends to it
        longer["key_positions"] = F.pad(batch["key_positions"], (0, tail), value=longer["input_ids"].shape[1] - 1)
        longer["max_length_k"] = 128 * math.ceil(max(batch["max_length_k"], tail) / 128)
    return {**batch, **longer}


def bucket_size(n: int) -> int:
    """Round `n` up to a multiple of a power of two in [64, 512] that is at most 1/16 of `n` where possible.

    Small steps waste little, and a step proportional to `n` keeps the number of sizes small. The largest step is 512,
    because the padding after the last cell attends to itself, which costs the square of its length.
    """
    step = min(max(1 << max(n // 16, 1).bit_length() - 1, 64), 512)
    return step * max(math.ceil(n / step), 1)


def pad(tokens: Tokens, *, pad_id: int, pad_value: float, queries: bool = False) -> dict[str, Any]:
    """Lay out each cell in a separate row, padded on the right to the longest cell.

    Args:
        tokens: tokens of the cells.
        pad_id: vocabulary id of `<pad>`.
        pad_value: value at padding.
        queries: masked genes are queries, for models with `objective="generative"`.

    Returns:
        The batch as keyword arguments of the model: `input_ids` int64, `values` float32 and `attention_mask` bool,
        each (cells, tokens), the mask true at real tokens; if tokens are masked, `labels` float32 (cells, tokens) and
        `label_positions` int64 (masked,), which index the flattened rows; with `queries`, `queries` bool (cells,
        tokens), true at masked genes.
    """
    n_tokens = np.diff(tokens.indptr)
    real = np.arange(n_tokens.max(initial=0)) < n_tokens[:, None]  # (cells, tokens)

    def to_rows(flat: npt.NDArray[Any], filler: float) -> npt.NDArray[Any]:
        rows = np.full(real.shape, filler, flat.dtype)
        rows[real] = flat
        return rows

    batch = {
        "input_ids": torch.from_numpy(to_rows(tokens.input_ids, pad_id)),
        "values": torch.from_numpy(to_rows(tokens.values, pad_value)),
        "attention_mask": torch.from_numpy(real),
    }
    if tokens.labels is not None:
        labels = to_rows(tokens.labels, IGNORE)
        batch["labels"] = torch.from_numpy(labels)
        batch["label_positions"] = torch.from_numpy(_find_labels(labels.ravel()))
    if queries:
        batch["queries"] = torch.from_numpy(to_rows(_masked(tokens), False))
    return batch


def unpack(per_token: torch.Tensor, cu_seq_lens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Split an output of the model for a packed batch into its cells.

    Args:
        per_token: any output with one entry per token. Shape (1, tokens, ...).
        cu_seq_lens: `cu_seq_lens_q` of the batch. Shape (cells + 1,).

    Returns:
        One view per cell, shape (tokens of that cell, ...). Padding that `bucket` added is left out.
    """
    return torch.split(per_token[0, : int(cu_seq_lens[-1])], cu_seq_lens.diff().tolist())


def _masked(tokens: Tokens) -> npt.NDArray[np.bool_]:
    """Return which tokens are masked, bool (tokens,).

    Raises:
        ValueError: the tokens have no labels.
    """
    if tokens.labels is None:
        raise ValueError("queries are masked genes, and no gene is masked; mask the tokens first, or leave queries out")
    masked: npt.NDArray[np.bool_] = tokens.labels != IGNORE
    return masked


def _find_labels(labels: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return the positions of the masked tokens, ascending; labels of shape (tokens,)."""
    if not COMPILED:
        return np.flatnonzero(labels != IGNORE)
    positions = np.empty(len(labels) + 1, np.int64)
    return positions[: _fill_positions(labels, IGNORE, positions)]


@compiled
def _fill_positions(labels: npt.NDArray[Any], ignore: float, positions: npt.NDArray[Any]) -> int:
    # Like `np.flatnonzero`, but without the temporary array of booleans.
    k = np.uint64(0)  # unsigned, so that numba does not test for negative indices
    for i in range(len(labels)):
        positions[k] = i  # overwritten by the next position unless k advances
        k += np.uint64(labels[i] != ignore)
    return int(k)
