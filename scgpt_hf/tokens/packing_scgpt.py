"""Tokens of many cells end to end, and the two layouts in which a model reads them.

`pack` lays the cells of a batch in one row without padding (training); `pad` gives each cell a row (any other use);
`bucket` lengthens a packed row to one of few sizes, for a compiled model.
What the tokens are is decided in `tokenizing_scgpt`.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F

from .sampling_scgpt import COMPILED, compiled

IGNORE = -100.0  # in labels: nothing to predict here


@dataclass(frozen=True, eq=False)
class Tokens:
    """The tokens of many cells, end to end; `<cls>` is the first of each cell.

    Attributes:
        input_ids: vocabulary ids, int64 (tokens,).
        values: what the model reads beside each id, float32 (tokens,).
        labels: true values where hidden, `IGNORE` elsewhere, float32 (tokens,); None before masking.
        indptr: where each cell begins and ends, int64 (cells + 1,), from 0.
        cell_ids: which cell each one is, int64 (cells,).
    """

    input_ids: npt.NDArray[np.int64]
    values: npt.NDArray[np.float32]
    labels: npt.NDArray[np.float32] | None
    indptr: npt.NDArray[np.int64]
    cell_ids: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.cell_ids)

    def __getitem__(self, cells: slice) -> "Tokens":
        """Return consecutive cells as views: `tokens[2:5]`."""
        if not isinstance(cells, slice) or cells.step not in (None, 1):
            raise TypeError(f"tokens are sliced by consecutive cells, as in tokens[2:5]; found {cells!r}")
        first, last, _ = cells.indices(len(self))
        last = max(first, last)
        start, stop = self.indptr[first], self.indptr[last]
        labels = None if self.labels is None else self.labels[start:stop]
        indptr = self.indptr[first : last + 1] - start
        return Tokens(self.input_ids[start:stop], self.values[start:stop], labels, indptr, self.cell_ids[first:last])


def pack(tokens: Tokens) -> dict[str, Any]:
    """Return the cells in one row, with the marks that keep their attention apart.

    Returns:
        input_ids int64, values float32 and, if masked, labels float32 (1, tokens) and label_positions int64 (masked,),
        which index the flattened row; cu_seq_lens_q and cu_seq_lens_k int32 (cells + 1,); max_length_q and max_length_k
        int.
    """
    boundaries = torch.from_numpy(tokens.indptr.astype(np.int32))
    longest = int(np.diff(tokens.indptr).max(initial=0))
    batch: dict[str, Any] = {
        "input_ids": torch.from_numpy(tokens.input_ids[None]),
        "values": torch.from_numpy(tokens.values[None]),
        "cu_seq_lens_q": boundaries,
        "cu_seq_lens_k": boundaries,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    if tokens.labels is not None:
        batch["labels"] = torch.from_numpy(tokens.labels[None])
        batch["label_positions"] = torch.from_numpy(_find_labels(tokens.labels))
    return batch


def bucket(batch: dict[str, Any], *, pad_id: int, pad_value: float) -> dict[str, Any]:
    """Return a packed batch lengthened to one of few shapes, so that a compiled model meets few shapes.

    Padding follows the last cell; the model lets no cell see it. Added positions of labels point at the first token,
    a `<cls>`, which has no label, so losses and their divisors stay as they were.

    Args:
        batch: as `pack` returns it.
        pad_id: vocabulary id of `<pad>`.
        pad_value: value at padding.

    Returns:
        The same keys; tokens and label positions as `bucket_size` rounds them, the longest cell a multiple of 128.
    """
    n_tokens = batch["input_ids"].shape[1]
    tail = bucket_size(n_tokens) - n_tokens
    fillers = {"input_ids": pad_id, "values": pad_value, "labels": IGNORE}
    longer = {key: F.pad(batch[key], (0, tail), value=filler) for key, filler in fillers.items() if key in batch}
    if "label_positions" in batch:
        n_masked = len(batch["label_positions"])
        longer["label_positions"] = F.pad(batch["label_positions"], (0, bucket_size(n_masked) - n_masked))
    longest = 128 * math.ceil(
        max(batch["max_length_q"], tail) / 128
    )  # the attention kernel works on 128 tokens at once
    return {**batch, **longer, "max_length_q": longest, "max_length_k": longest}


def bucket_size(n: int) -> int:
    """Return `n` rounded up, by 1/16 at most, to a multiple of a power of two in [64, 512].

    The padding behind a row stays below 512 tokens, because its attention costs their square.
    """
    step = min(max(1 << max(n // 16, 1).bit_length() - 1, 64), 512)
    return step * max(math.ceil(n / step), 1)


def pad(tokens: Tokens, *, pad_id: int, pad_value: float) -> dict[str, Any]:
    """Return one row per cell, filled on the right to the longest.

    Returns:
        input_ids int64, values float32 and attention_mask bool (cells, tokens), true at real tokens; if masked, labels
        float32 (cells, tokens) and label_positions int64 (masked,), which index the flattened rows.
    """
    n_tokens = np.diff(tokens.indptr)
    real = np.arange(n_tokens.max(initial=0)) < n_tokens[:, None]  # (cells, tokens)

    def spread(flat: npt.NDArray[Any], filler: float) -> npt.NDArray[Any]:
        rows = np.full(real.shape, filler, flat.dtype)
        rows[real] = flat
        return rows

    batch = {
        "input_ids": torch.from_numpy(spread(tokens.input_ids, pad_id)),
        "values": torch.from_numpy(spread(tokens.values, pad_value)),
        "attention_mask": torch.from_numpy(real),
    }
    if tokens.labels is not None:
        labels = spread(tokens.labels, IGNORE)
        batch["labels"] = torch.from_numpy(labels)
        batch["label_positions"] = torch.from_numpy(_find_labels(labels.ravel()))
    return batch


def unpack(per_token: torch.Tensor, cu_seq_lens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Return what a model said about each token of a packed row, cell by cell.

    Args:
        per_token: any output of the model for a packed batch. Shape (1, tokens, ...).
        cu_seq_lens: the batch's boundaries. Shape (cells + 1,).

    Returns:
        One view per cell, shape (tokens of that cell, ...).
    """
    return torch.split(per_token[0, : int(cu_seq_lens[-1])], cu_seq_lens.diff().tolist())


def _find_labels(labels: npt.NDArray[np.float32]) -> npt.NDArray[np.int64]:
    """Return where there is something to predict, ascending; labels of shape (tokens,)."""
    if not COMPILED:
        return np.flatnonzero(labels != IGNORE)
    positions = np.empty(len(labels) + 1, np.int64)
    return positions[: _fill_positions(labels, IGNORE, positions)]


@compiled
def _fill_positions(labels: npt.NDArray[Any], ignore: float, positions: npt.NDArray[Any]) -> int:
    k = np.uint64(0)  # unsigned: no test for an index from the end
    for i in range(len(labels)):
        positions[k] = i  # overwritten by the next one unless k moves on
        k += np.uint64(labels[i] != ignore)
    return int(k)
