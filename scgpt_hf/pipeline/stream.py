"""The corridor from cells to the model: the cells that a plan names in, packed batches out.

`stream_cells` decides nothing about cells (`cells/plan.py` does) nor tokens (`tokens/` does): it reads, tokenises,
masks and packs, one block ahead. `StreamLoader` hands the batches of each epoch to the trainer and knows how many were
consumed, which is all that an exact resume needs.
"""

import logging
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

import datasets
import numpy as np
import pandas as pd
import torch
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import CellBlock, Int64Array
from scgpt_hf.cells.schedule.epoch import Plan, list_windows
from scgpt_hf.cells.source import CellSource
from scgpt_hf.cells.threads import JOIN_TIMEOUT_S, DaemonThreadPool, in_order, n_cores, prefetch
from scgpt_hf.pipeline.genes import match_columns
from scgpt_hf.tokens.packing_scgpt import Tokens, bucket, pack, pad
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor | int]

# Cells tokenised together by one thread: enough for its overhead to vanish, few enough that their tokens stay in cache.
_TOKENIZED_TOGETHER = 512
_MOST_TOKENIZING = 4  # threads; one gives tens of thousands of cells per second


@dataclass(frozen=True)
class StreamConfig:
    """What a stream adds to the cells of its plan.

    Attributes:
        seed: of the run; ties, gene samples and masks follow from it, the epoch, the cell and the gene.
        mask_ratios: shares of the genes to hide, one drawn per cell; None for no labels.
        rank: of this process, in [0, world_size).
        world_size: number of processes.
        micro_batches: equal parts in which a rank takes its cells of one step (gradient accumulation).
        padded: pad the cells of a batch to one length, for the models whose pooling or norm counts padding.
        bucketed: lengthen packed batches to one of few shapes, for compiled models.
        categories: batch key → (obs column, class id of each of its values), e.g. {"domain_ids": ("assay", {"v2": 0})}.
    """

    seed: int
    mask_ratios: Sequence[float] | None = None
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    padded: bool = False
    bucketed: bool = False
    categories: Mapping[str, tuple[str, Mapping[str, int]]] = field(default_factory=dict)


def stream_cells(
    source: CellSource,
    plans: Sequence[Plan],
    processor: ScGPTProcessor,
    settings: StreamConfig,
    *,
    start_step: int = 0,
) -> datasets.IterableDataset:
    """Return the packed batches of all epochs, one shard for each (epoch, block).

    Args:
        source: where the cells are read.
        plans: one after the other; cells are sampled and masked by the number of the plan's epoch.
        processor: turns counts into tokens.
        settings: seed, masks and rank.
        start_step: global steps, counted from the first plan's first, that were trained on before.

    Returns:
        A dataset of dictionaries as `pack` makes them; with `micro_batches` M each step gives M of them. It can be
        iterated again and again, and `state_dict` resumes it. Cells without an expressed gene of the vocabulary are
        left out.

    Raises:
        ValueError: counts that are not raw, too few known genes, a value of a category without a class, a batch without
            any cell.
    """
    windows = list_windows(plans)
    shards = [(epoch, block, max(0, start_step - first)) for epoch, block, first, last in windows if last > start_step]
    if not shards:
        raise ValueError(f"nothing is left to read after step {start_step:,}; the plan has {windows[-1][3]:,} steps")
    blocks = _Blocks(source, plans, processor, settings, shards)
    return datasets.IterableDataset.from_generator(blocks.batches, gen_kwargs={"shards": list(range(len(shards)))})


def lengths_of(batch: Batch) -> torch.Tensor:
    """Return the tokens of each cell of a packed or padded batch, `<cls>` included. Shape (cells,)."""
    bounds, mask = batch.get("cu_seq_lens_q"), batch.get("attention_mask")
    assert isinstance(bounds, torch.Tensor) or isinstance(mask, torch.Tensor)
    return bounds.diff() if isinstance(bounds, torch.Tensor) else mask.sum(1)  # type: ignore[union-attr]


class StreamLoader:
    """The trainer's loader: one epoch's batches an iteration, from wherever the last one stopped.

    The stream under it runs on through the epochs, so the next epoch's first block is read while the model validates.

    Attributes:
        consumed: batches handed out since the start of the run; the trainer derives it from its step number.
        waited_s: seconds in which a batch was asked for and not ready.
    """

    def __init__(
        self,
        open_stream: Callable[[int], Iterable[Batch]],
        epoch_ends: Sequence[int],
        while_waiting: Callable[[], object] | None = None,
    ) -> None:
        """Prepare to read; nothing is opened before the first batch is asked for.

        Args:
            open_stream: gives the batches from number n on; all, or those of some epochs.
            epoch_ends: the number of batches handed out when each epoch ends, ascending.
            while_waiting: see `prefetch`.
        """
        self.open_stream = open_stream
        self.epoch_ends = epoch_ends
        self.while_waiting = while_waiting
        self.consumed = 0
        self.waited_s = 0.0
        self._batches: Generator[Batch, None, None] | None = None

    def __len__(self) -> int:
        """Return the batches of the longest epoch."""
        return max(end - begin for begin, end in pairwise([0, *self.epoch_ends]))

    def __iter__(self) -> Iterator[Batch]:
        """Yield what is left of the current epoch: all of it, unless it was resumed."""
        end = next((end for end in self.epoch_ends if end > self.consumed), self.consumed)
        while self.consumed < end:
            if self._batches is None:
                self._batches = self._open()
            asked = time.perf_counter()
            batch = next(self._batches, None)
            if batch is None:  # the stream went so far; another one goes on
                self._batches = self._open()
                batch = next(self._batches)
            self.waited_s += time.perf_counter() - asked
            self.consumed += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the position in the run: batches consumed, not batches read."""
        return {"consumed": self.consumed}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on after the batches that `state` counts."""
        self.close()
        self.consumed = state["consumed"]

    def _open(self) -> Generator[Batch, None, None]:
        return prefetch(self.open_stream(self.consumed), while_waiting=self.while_waiting)

    def close(self) -> None:
        """Stop the reading thread."""
        if self._batches is not None:
            self._batches.close()
            self._batches = None


class _Blocks:
    """Reads the blocks of a plan one ahead and cuts them into batches; the generator under `stream_cells`."""

    def __init__(
        self,
        source: CellSource,
        plans: Sequence[Plan],
        processor: ScGPTProcessor,
        settings: StreamConfig,
        shards: list[tuple[int, int, int]],
    ) -> None:
        self.source, self.plans, self.processor, self.settings, self.shards = source, plans, processor, settings, shards
        self.gene_ids, _ = match_columns(source.genes, processor)
        self.readers = DaemonThreadPool(
            2, "scgpt-read-block"
        )  # the next block begins where the last one's chunks run out
        self.n_tokenizing = min(_MOST_TOKENIZING, n_cores())
        self.tokenizers = DaemonThreadPool(self.n_tokenizing, "scgpt-tokenize")
        self.ahead: tuple[int, Future[tuple[list[Int64Array], CellBlock]] | None] = (0, None)

    def __getstate__(self) -> dict[str, Any]:
        # `datasets` names a generator by pickling it; the description says as much as gigabytes of ids would.
        return {"source": self.source.describe(), "settings": self.settings, "shards": self.shards[:1]}

    def batches(self, shards: list[int]) -> Iterator[Batch]:
        """Yield the batches of the numbered shards; `datasets` calls this once for each."""
        try:
            for shard in shards:
                yield from self._cut(*self._take(shard), epoch=self.plans[self.shards[shard][0]].epoch)
        except BaseException:  # or the stream was given up
            self._end_reading()
            raise

    def _end_reading(self) -> None:
        """Wait a moment for the block that is read ahead: whoever gives up a stream may close its source."""
        _, ahead = self.ahead
        self.ahead = (0, None)
        if ahead is not None and not ahead.cancel():
            wait([ahead], JOIN_TIMEOUT_S)

    def _take(self, shard: int) -> tuple[list[Int64Array], CellBlock]:
        """Return a shard that was read ahead, or read it now; then have the next one read.

        The next one is begun while this one still waits for its last chunks; but nothing may delay one that is read
        only now, as the first is.
        """
        expected, ahead = self.ahead
        if ahead is None or expected != shard:
            ahead = self.readers.submit(self._read, shard)
            self.ahead = (shard, ahead)
            ahead.result()
        following = shard + 1
        self.ahead = (following, self.readers.submit(self._read, following) if following < len(self.shards) else None)
        return ahead.result()

    def _read(self, shard: int) -> tuple[list[Int64Array], CellBlock]:
        """Return the steps of a shard as cell ids, and the block that holds them in that order."""
        epoch, index, first_step = self.shards[shard]
        s = self.settings
        steps = self.plans[epoch].steps(index, rank=s.rank, world_size=s.world_size)[first_step:]
        if not steps:
            return [], CellBlock.from_scipy(csr_matrix((0, len(self.gene_ids))), pd.DataFrame(), np.empty(0, np.int64))
        columns = sorted({column for column, _ in s.categories.values()})
        return steps, self.source.read(np.concatenate(steps), columns)

    def _cut(self, steps: list[Int64Array], block: CellBlock, epoch: int) -> Iterator[Batch]:
        """Yield the micro-batches of a block in order; some threads tokenise a few hundred cells each."""
        ends = np.cumsum([len(part) for step in steps for part in np.array_split(step, self.settings.micro_batches)])
        classes = {key: self._classes(block, key) for key in self.settings.categories}
        groups = (partial(self._tokenize, block, classes, edges, epoch) for edges in _group(ends, _TOKENIZED_TOGETHER))
        for batches in in_order(self.tokenizers, groups, n_ahead=self.n_tokenizing):
            yield from batches

    def _tokenize(self, block: CellBlock, classes: dict[str, Int64Array], edges: Int64Array, epoch: int) -> list[Batch]:
        """Return one batch for each pair of neighbouring edges, positions in the block."""
        s = self.settings
        cells = slice(edges[0], edges[-1])
        asked = block.cell_ids[cells]
        counts = block.take(np.arange(edges[0], edges[-1]))
        tokens = self.processor.tokenize(counts, self.gene_ids, cell_ids=asked, seed=s.seed, epoch=epoch)
        if s.mask_ratios is not None:
            tokens = self.processor.mask(tokens, seed=s.seed, epoch=epoch, ratios=s.mask_ratios)
        kept = np.ones(len(asked), np.bool_)
        if n_empty := len(asked) - len(tokens):
            logger.info("left out %d of %d cells: they express no gene of the vocabulary", n_empty, len(asked))
            kept = np.isin(asked, tokens.cell_ids)
        kept_before = np.concatenate([[0], np.cumsum(kept)])[edges - edges[0]]
        batches = []
        for start, stop in pairwise(kept_before.tolist()):
            if start == stop:
                raise ValueError(
                    f"no cell of a batch of epoch {epoch} expresses a gene of the vocabulary; first cell ids: "
                    f"{asked[:5].tolist()}; drop poor cells (min_genes), choose more genes or a larger batch"
                )
            ids = {key: torch.from_numpy(classes[key][cells][kept][start:stop]) for key in classes}
            batches.append({**self._join(tokens[start:stop]), **ids})
        return batches

    def _join(self, tokens: Tokens) -> Batch:
        pad_id, pad_value = self.processor.pad_id, self.processor.pad_value
        if self.settings.padded:
            return pad(tokens, pad_id=pad_id, pad_value=pad_value)
        batch = pack(tokens)
        return bucket(batch, pad_id=pad_id, pad_value=pad_value) if self.settings.bucketed else batch

    def _classes(self, block: CellBlock, key: str) -> Int64Array:
        """Return the class of each cell of the block by its obs value, shape (cells,)."""
        column, class_of_value = self.settings.categories[key]
        classes = block.obs[column].astype(str).map(class_of_value)
        if classes.isna().any():
            unknown = sorted(set(block.obs[column].astype(str)) - set(class_of_value))
            raise ValueError(
                f"obs column {column!r} holds {unknown[:5]}, which have no class in {key}; "
                f"known: {list(class_of_value)[:5]} …"
            )
        return np.asarray(classes, dtype=np.int64)


def _group(ends: Int64Array, n_together: int) -> Iterator[Int64Array]:
    """Yield the edges of neighbouring batches, up to `n_together` cells of them or a single one, from 0 to the end."""
    first = 0
    while first < ends[-1:].sum():
        together = ends[(ends > first) & (ends <= first + n_together)]
        if not len(together):
            together = ends[ends > first][:1]
        yield np.concatenate([[first], together])
        first = together[-1]
