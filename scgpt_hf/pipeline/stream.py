"""The pipeline from cells to batches: read the cells that plans name, tokenize them, and make batches of tensors.

Training, validation, embedding, annotation and expression prediction all read through `CellStream`; what differs
between them is a `StreamConfig`. The module decides neither which cells are read (`cells/schedule`) nor what their
tokens are (`tokens`). A stream works in six steps:

1. **List the windows** (`_list_tasks`). A plan cuts its cells into shuffle windows of many steps each. One `WindowTask`
   stands for one window, or for the rest of it when training resumes in the middle.
2. **Read the next windows ahead** (`_take_window`). One thread reads a window from the source in a single call, in the
   order of its steps, while the window before it is tokenized. More are read ahead only if one does not keep the
   threads of the source busy. So memory holds two windows, or `CellSource.cells_at_once`, however large the source.
3. **Cut the window into micro-batches** (`_tokenize_window`). A step of a rank is one batch, or several with gradient
   accumulation. Neighboring batches, together about 512 cells, are one unit of work for a thread.
4. **Tokenize and mask in threads** (`_tokenize_batches`). Random numbers depend on the seed, the epoch, the cell and
   the gene only, so the result does not depend on the number of threads, ranks or batches. Cells that express no gene
   of the vocabulary have no tokens and are dropped, skipped or refused.
5. **Pack or pad** (`make_batch`). The tokens of a batch become tensors: one packed row, or one padded row per cell.
6. **Yield.** Batches come out in the order of the plan. `stream_cells` wraps them as a `datasets.IterableDataset`;
   `prefetch` prepares a few of them in the background; `StreamLoader` feeds them to a trainer, one epoch at a time.
"""

import logging
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any, Literal, NamedTuple, TypeVar

import datasets
import numpy as np
import torch

from scgpt_hf.cells.block import CellBlock, Int64Array
from scgpt_hf.cells.missing import fill_missing, has_value
from scgpt_hf.cells.schedule.balance import split_draws
from scgpt_hf.cells.schedule.epoch import Plan, list_windows
from scgpt_hf.cells.source import CellSource
from scgpt_hf.cells.threads import JOIN_TIMEOUT_S, DaemonThreadPool, in_order, n_cores
from scgpt_hf.pipeline.genes import GeneMatch, match_source_genes
from scgpt_hf.tokens.binning_scgpt import Ties
from scgpt_hf.tokens.counts_scgpt import SparseCounts
from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens, bucket, bucket_size, pack, pad
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.targets_scgpt import CountTargets, gather_count_targets, leave_out_masked

logger = logging.getLogger(__name__)

Batch = dict[str, torch.Tensor | int]
Result = TypeVar("Result")

# Cells that one thread tokenizes together: enough to make its overhead vanish, few enough for its tokens to stay in the
# CPU's cache.
_CELLS_PER_TASK = 512
# One thread tokenizes tens of thousands of cells per second, so more than a few would only take cores from the model.
_MAX_TOKENIZING_THREADS = 4


@dataclass(frozen=True)
class StreamConfig:
    """How a stream turns the cells of its plans into batches.

    Attributes:
        seed: seed of ties, gene sampling and masks, which depend on it, the epoch, the cell and the gene.
        mask_ratios: shares of the genes to mask; one is drawn per cell. None masks nothing and adds no labels.
        rank: number of this process, in [0, world_size).
        world_size: number of processes.
        micro_batches: number of equal parts into which a rank divides its cells of one step (gradient accumulation).
        padded: pad the cells of a batch to one length, for models whose pooling or norm counts padding.
        bucketed: lengthen packed batches to one of few shapes, for compiled models.
        categories: batch key → (obs column, class id of each of its values), e.g. {"domain_ids": ("assay", {"v2": 0})}.
        labels: batch key → the same for labels that a cell may lack. A cell with no value, or one that has no class,
            gets −100.
        ties: how to bin genes with equal counts; None takes the rule of the processor.
        max_tokens: most tokens per cell; None takes the number of the processor.
        key_by: what the random numbers of a cell depend on. "cell_id" draws again in each epoch and suits training.
            "content" hashes the genes and counts of the cell, so that its tokens do not change when a file is cut or
            reordered and its row numbers change; inference uses it.
        empty_cells: what to do with cells that express no gene of the vocabulary. "drop" leaves them out, and raises if
            a batch has no cell left, because every rank needs a batch in every step. "skip" leaves out such batches
            too. "raise" raises an error that lists the cells.
        with_cell_ids: add `cell_ids` to each batch, int64 (cells,): which cells it holds.
        input_keep: thin the counts that become tokens: shares to keep, of which one is drawn per cell. Targets of the
            objective "counts" are not thinned. None keeps all.
        view_keep: add a second view of each cell for the objective "views": shares of its counts that the view keeps,
            of which one is drawn per cell. None adds no view.
        with_counts: add the raw counts of all known genes of each cell, the targets of the objective "counts".
        leave_out_masked: leave masked genes out of the tokens, for models with `ScGPTConfig.leave_out_masked`.
        queries: make masked genes queries, for models with the objective "generative".
    """

    seed: int
    mask_ratios: Sequence[float] | None = None
    rank: int = 0
    world_size: int = 1
    micro_batches: int = 1
    padded: bool = False
    bucketed: bool = False
    categories: Mapping[str, tuple[str, Mapping[str, int]]] = field(default_factory=dict)
    labels: Mapping[str, tuple[str, Mapping[str, int]]] = field(default_factory=dict)
    ties: Ties | None = None
    max_tokens: int | None = None
    key_by: Literal["cell_id", "content"] = "cell_id"
    empty_cells: Literal["drop", "skip", "raise"] = "drop"
    with_cell_ids: bool = False
    input_keep: Sequence[float] | None = None
    view_keep: Sequence[float] | None = None
    with_counts: bool = False
    leave_out_masked: bool = False
    queries: bool = False


class WindowTask(NamedTuple):
    """One shuffle window to read.

    Attributes:
        plan: index of the plan in the stream's list of plans.
        window: index of the window in the plan.
        n_done: steps at the start of the window that were trained before; they are not read.
    """

    plan: int
    window: int
    n_done: int


@dataclass(frozen=True, eq=False)
class _Window:
    """A window that was read.

    Attributes:
        steps: cells of this rank in each step, as ids; each int64 (cells of the step,).
        draws: the steps end to end, int64 (draws,). A draw is a cell or, in a balanced epoch, a repeat of it.
        rows: row of the block that holds the cell of each draw, int64 (draws,).
        block: the cells of all steps.
        categories: batch key → class id of each cell of the block, int64 (cells,).
        epoch: epoch of the plan.
        batch_size: cells of a global step of the plan.
    """

    steps: list[Int64Array]
    draws: Int64Array
    rows: Int64Array
    block: CellBlock
    categories: dict[str, Int64Array]
    epoch: int
    batch_size: int


@dataclass(frozen=True, eq=False)
class TokenizedCells:
    """The cells of one micro-batch, tokenized and not yet turned into tensors.

    Attributes:
        tokens: tokens of the cells that express a gene of the vocabulary, masked if the config says so.
        block: the window that the cells were read with.
        rows: position of each of these cells in `block`, int64 (cells,).
        categories: batch key → class id of each of these cells, int64 (cells,).
        targets: raw counts of these cells, if the config asks for them.
        view: tokens of their second view, if the config asks for it.
        n_cells_of_step: cells of the global step, over all ranks and micro-batches.
    """

    tokens: Tokens
    block: CellBlock
    rows: Int64Array
    categories: dict[str, Int64Array]
    targets: CountTargets | None = None
    view: Tokens | None = None
    n_cells_of_step: int = 0

    @property
    def cell_ids(self) -> Int64Array:
        """Ids of these cells, int64 (cells,)."""
        return self.block.cell_ids[self.rows]


def stream_cells(
    source: CellSource,
    plans: Sequence[Plan],
    processor: ScGPTProcessor,
    config: StreamConfig,
    *,
    start_step: int = 0,
) -> datasets.IterableDataset:
    """Stream the batches of the plans as a `datasets.IterableDataset`, with one shard per shuffle window.

    Args:
        source: source of the cells.
        plans: plans to follow one after the other; the epoch of a plan enters its random numbers.
        processor: turns counts into tokens.
        config: how batches are made.
        start_step: number of global steps, counted from the start of the first plan, that were trained before.

    Returns:
        A dataset of dictionaries of tensors, as `pack` and `pad` describe them, one for each micro-batch of each step.
        It can be iterated repeatedly, and its `state_dict` resumes it.

    Raises:
        ValueError: no step is left after `start_step`; too few genes of the source are in the vocabulary. While
            iterating: counts are not raw, a value of a category has no class, a batch has no cell left.

    Example:
        >>> from scgpt_hf.cells.schedule.epoch import plan_validation
        >>> plan = plan_validation(source.obs().index.to_numpy(), batch_size=64)
        >>> batches = stream_cells(source, [plan], processor, StreamConfig(seed=0, mask_ratios=(0.25, 0.5, 0.75)))
        >>> next(iter(batches))["input_ids"].shape
        torch.Size([1, ...])
    """
    stream = CellStream(source, plans, processor, config, start_step=start_step)
    # `datasets` treats each item of a list in `gen_kwargs` as one shard, and its `state_dict` counts finished shards.
    tasks = {"task_numbers": list(range(len(stream.tasks)))}
    return datasets.IterableDataset.from_generator(stream.batches_of, gen_kwargs=tasks)


class CellStream:
    """Reads the windows of plans ahead and makes batches of them; see the steps in the module's docstring.

    Iterate over one method at a time: all share the windows that are read ahead.
    """

    def __init__(
        self,
        source: CellSource,
        plans: Sequence[Plan],
        processor: ScGPTProcessor,
        config: StreamConfig,
        *,
        start_step: int = 0,
        gene_match: GeneMatch | None = None,
    ) -> None:
        """List the windows and match the genes; nothing is read yet.

        Args:
            source: see `stream_cells`.
            plans: see `stream_cells`.
            processor: see `stream_cells`.
            config: see `stream_cells`.
            start_step: see `stream_cells`.
            gene_match: what `match_source_genes` returns, for callers that have called it; by default it is called.

        Raises:
            ValueError: see `stream_cells`.
        """
        self.source, self.plans, self.processor, self.config = source, plans, processor, config
        self.tasks = _list_tasks(plans, start_step)
        self.gene_ids = (gene_match or match_source_genes(source.genes, processor)).gene_ids
        self._readers = DaemonThreadPool(1, "scgpt-read-window")
        self._reads: dict[int, Future[_Window | None]] = {}  # of the current window and those ahead, by task number
        self._n_ahead = 1
        self._n_tokenizing = min(_MAX_TOKENIZING_THREADS, n_cores())
        self._tokenizers = DaemonThreadPool(self._n_tokenizing, "scgpt-tokenize")

    def __getstate__(self) -> dict[str, Any]:
        # `IterableDataset.from_generator` pickles the generator to derive the dataset's cache name from its bytes. A
        # stream holds thread pools, which cannot be pickled, and plans with the ids of up to 160 million cells, whose
        # pickle would take gigabytes. This short description serves as the name; nothing unpickles it, because our
        # loaders use threads and not worker processes.
        return {"source": self.source.describe(), "config": self.config, "tasks": self.tasks[:1]}

    def batches(self) -> Generator[Batch, None, None]:
        """Yield the batches of all windows in order."""
        return self.batches_of(range(len(self.tasks)))

    def batches_of(self, task_numbers: Sequence[int]) -> Generator[Batch, None, None]:
        """Yield the batches of some windows; `datasets` calls this once for each window."""
        return self._run(task_numbers, partial(make_batch, processor=self.processor, config=self.config))

    def tokenized(self) -> Generator[TokenizedCells, None, None]:
        """Yield the tokens of all micro-batches in order, for callers that make several batches from the same cells."""
        return self._run(range(len(self.tasks)), lambda cells: cells)

    def _run(
        self, task_numbers: Sequence[int], make_result: Callable[[TokenizedCells], Result]
    ) -> Generator[Result, None, None]:
        """Yield what `make_result` returns for each micro-batch; the tokenizing threads call it."""
        try:
            for number in task_numbers:
                if (window := self._take_window(number)) is not None:
                    yield from self._tokenize_window(window, make_result)
        except BaseException:  # an error, or the consumer closed the generator
            self._stop_reading()
            raise

    def _stop_reading(self) -> None:
        """Cancel the reads ahead, or wait a moment for them: the consumer may close the source next."""
        reads, self._reads = self._reads, {}
        wait([future for future in reads.values() if not future.cancel()], JOIN_TIMEOUT_S)

    def _take_window(self, number: int) -> _Window | None:
        """Return the window of a task, which may have been read ahead, and start to read the next ones.

        The next read starts while this one waits for its last chunks. Only the first window is read without
        competition, because the consumer waits for it.
        """
        if number not in self._reads:
            self._stop_reading()
            self._start_reading(number)
            self._reads[number].result()
        for following in range(number + 1, min(number + 1 + self._n_ahead, len(self.tasks))):
            self._start_reading(following)
        window = self._reads.pop(number).result()
        if window is not None:
            self._n_ahead = max(1, -(-self.source.cells_at_once // len(window.draws)))
        return window

    def _start_reading(self, number: int) -> None:
        """Start to read the window of a task, unless that has started."""
        if number not in self._reads:
            self._readers.grow(len(self._reads) + 1)
            self._reads[number] = self._readers.submit(self._read, number)

    def _read(self, number: int) -> _Window | None:
        """Read the window of a task; None if no step of it falls to this rank."""
        task, config = self.tasks[number], self.config
        plan = self.plans[task.plan]
        ranks: dict[str, int] = {"rank": config.rank, "world_size": config.world_size}
        steps = plan.steps(task.window, **ranks, micro_batches=config.micro_batches)[task.n_done :]
        if not steps:
            return None
        columns = sorted({column for column, _ in (*config.categories.values(), *config.labels.values())})
        draws = np.concatenate(steps)
        cells, rows = split_draws(draws)
        block = self.source.read(cells, columns)
        categories = {key: self._class_ids(block, key) for key in config.categories}
        categories |= {key: _label_ids(block, *named) for key, named in config.labels.items()}
        return _Window(steps, draws, rows, block, categories, plan.epoch, plan.batch_size)

    def _tokenize_window(self, window: _Window, make_result: Callable[[TokenizedCells], Result]) -> Iterator[Result]:
        """Yield the results of the micro-batches of a window in order."""
        parts = [part for step in window.steps for part in np.array_split(step, self.config.micro_batches)]
        ends = np.cumsum([len(part) for part in parts])
        groups = _group_batches(ends, _CELLS_PER_TASK)
        tasks = (partial(self._tokenize_batches, window, bounds, make_result) for bounds in groups)
        for results in in_order(self._tokenizers, tasks, n_ahead=self._n_tokenizing):
            yield from results

    def _tokenize_batches(
        self, window: _Window, bounds: Int64Array, make_result: Callable[[TokenizedCells], Result]
    ) -> list[Result]:
        """Tokenize neighboring micro-batches.

        Args:
            window: the window that holds them.
            bounds: position in the window at which the first one starts, and at which each of them ends.
            make_result: see `_run`.

        Returns:
            One result for each micro-batch that has a cell left.
        """
        config, block, epoch = self.config, window.block, window.epoch
        positions = np.arange(bounds[0], bounds[-1])
        draws, rows = window.draws[positions], window.rows[positions]
        counts, cell_ids = block.take(rows), block.cell_ids[rows]
        tokens = self.processor.tokenize(
            self._thin(counts, draws, epoch),
            self.gene_ids,
            cell_ids=draws if config.key_by == "cell_id" else None,
            seed=config.seed,
            epoch=epoch,
            ties=config.ties,
            max_tokens=config.max_tokens,
        )
        if config.mask_ratios is not None:
            tokens = self.processor.mask(tokens, seed=config.seed, epoch=epoch, ratios=config.mask_ratios)
        view = self._tokenize_view(counts, draws, epoch)
        targets = None
        if config.with_counts:
            targets = gather_count_targets(self.processor.sum_repeated_genes(counts, self.gene_ids), self.gene_ids)
        if len(tokens) < len(rows):  # counted only now, because most sources have no such cell
            kept = self.processor.count_known(counts, self.gene_ids) > 0
            self._report_empty(cell_ids, kept)
            positions, rows = positions[kept], rows[kept]
            targets = None if targets is None else targets.keep(kept)
        results = []
        for start, stop in pairwise(np.searchsorted(positions, bounds).tolist()):
            if start < stop:
                batch_rows = rows[start:stop]
                classes = {key: ids[batch_rows] for key, ids in window.categories.items()}
                counted = None if targets is None else targets[start:stop]
                seen = None if view is None else view[start:stop]
                cells = TokenizedCells(tokens[start:stop], block, batch_rows, classes, counted, seen, window.batch_size)
                results.append(make_result(cells))
            elif config.empty_cells != "skip":
                raise ValueError(
                    f"no cell of a batch of epoch {epoch} expresses a gene of the vocabulary; first cell ids: "
                    f"{cell_ids[:5].tolist()}; drop cells with few genes (min_genes), choose more genes "
                    "or a larger batch"
                )
        return results

    def _thin(self, counts: SparseCounts, cell_ids: Int64Array, epoch: int) -> SparseCounts:
        """Return the counts that become tokens: thinned, if the config asks for it."""
        config = self.config
        if config.input_keep is None:
            return counts
        keys: Any = {"cell_ids": cell_ids, "seed": config.seed, "epoch": epoch}
        return self.processor.thin(counts, self.gene_ids, keep=config.input_keep, **keys)

    def _tokenize_view(self, counts: SparseCounts, cell_ids: Int64Array, epoch: int) -> Tokens | None:
        """Return the tokens of a second view of the cells that `tokenize` keeps, if the config asks for one."""
        config = self.config
        if config.view_keep is None:
            return None
        options: Any = {"seed": config.seed, "epoch": epoch, "max_tokens": config.max_tokens}
        return self.processor.tokenize_view(counts, self.gene_ids, cell_ids=cell_ids, keep=config.view_keep, **options)

    def _report_empty(self, cell_ids: Int64Array, kept: Any) -> None:
        """Log or refuse the cells that have no tokens; `kept` is false for these, bool (cells,)."""
        empty = cell_ids[~kept]
        if self.config.empty_cells == "raise":
            raise ValueError(
                f"{len(empty):,} of the cells {cell_ids.min():,} to {cell_ids.max():,} express no gene of the "
                f"vocabulary, first ids: {empty[:5].tolist()}; leave them out, or, where the function has that "
                "argument, pass empty='nan' to get rows of NaN"
            )
        logger.info("left out %d of %d cells: they express no gene of the vocabulary", len(empty), len(cell_ids))

    def _class_ids(self, block: CellBlock, key: str) -> Int64Array:
        """Return the class id of each cell of the block, from its value in the obs column of a category. (cells,)."""
        column, id_of_value = self.config.categories[key]
        values = fill_missing(block.obs[column])
        known = has_value(block.obs[column])
        ids = values.where(known).map(id_of_value)
        if n_missing := int((~known).sum()):
            raise ValueError(
                f"{n_missing:,} of the cells {block.cell_ids.min():,} to {block.cell_ids.max():,} have no value in "
                f"obs[{column!r}]; leave these cells out"
            )
        if ids.isna().any():
            unknown = sorted(set(values) - set(id_of_value))
            what = "experimental batches" if key == "domain_ids" else f"values ({key})"
            raise ValueError(
                f"obs[{column!r}] has {what} that the model was not trained on: {unknown[:5]}; it was trained on "
                f"{list(id_of_value)[:10]}; leave these cells out, or train the model on them too"
            )
        return np.asarray(ids, dtype=np.int64)


def _label_ids(block: CellBlock, column: str, id_of_label: Mapping[str, int]) -> Int64Array:
    """Return the class id of each cell of the block, and −100 for a cell without a label. Shape (cells,)."""
    ids = fill_missing(block.obs[column]).map(id_of_label)
    return np.asarray(ids.where(has_value(block.obs[column])).fillna(int(IGNORE)), dtype=np.int64)


def make_batch(cells: TokenizedCells, *, processor: ScGPTProcessor, config: StreamConfig) -> Batch:
    """Make tensors of a micro-batch: tokens as `pack` or `pad` lays them out, class ids and, if wanted, cell ids."""
    tokens, masked = cells.tokens, None
    if config.leave_out_masked and tokens.labels is not None:
        tokens, masked = leave_out_masked(tokens)
    batch = _lay_out(tokens, processor, config)
    if masked is not None:
        batch |= masked.as_batch(bucket_size(len(masked.ids)) if config.bucketed else None)
    if cells.view is not None:
        batch |= {f"view_{key}": value for key, value in _lay_out(cells.view, processor, config).items()}
        batch["num_cells_in_batch"] = cells.n_cells_of_step
    batch |= {key: torch.from_numpy(ids) for key, ids in cells.categories.items()}
    if cells.targets is not None:
        n_entries = bucket_size(len(cells.targets.ids)) if config.bucketed else None
        batch |= cells.targets.as_batch(n_entries) | {"num_cells_in_batch": cells.n_cells_of_step}
    if config.with_cell_ids:
        batch["cell_ids"] = torch.from_numpy(cells.cell_ids)
    return batch


def _lay_out(tokens: Tokens, processor: ScGPTProcessor, config: StreamConfig) -> Batch:
    """Return tokens as tensors: padded, packed, or packed and lengthened to one of few shapes."""
    padding: Any = {"pad_id": processor.pad_id, "pad_value": processor.pad_value}
    queries = config.queries and tokens.labels is not None
    if config.padded:
        return pad(tokens, **padding, queries=queries)
    packed = pack(tokens, queries=queries)
    return bucket(packed, **padding) if config.bucketed else packed


def lengths_of(batch: Batch, prefix: str = "") -> torch.Tensor:
    """Return the number of tokens of each cell of a packed or padded batch, with `<cls>`. Shape (cells,).

    Args:
        batch: the batch.
        prefix: "view_" for the second views of the cells.
    """
    cu_seq_lens, mask = batch.get(f"{prefix}cu_seq_lens_q"), batch.get(f"{prefix}attention_mask")
    assert isinstance(cu_seq_lens, torch.Tensor) or isinstance(mask, torch.Tensor)
    return cu_seq_lens.diff() if isinstance(cu_seq_lens, torch.Tensor) else mask.sum(1)  # type: ignore[union-attr]


def _list_tasks(plans: Sequence[Plan], start_step: int) -> list[WindowTask]:
    """Return the windows of the plans from a global step on.

    Raises:
        ValueError: the plans have no step left.
    """
    windows = list_windows(plans)
    tasks = [
        WindowTask(plan, index, max(0, start_step - first)) for plan, index, first, end in windows if end > start_step
    ]
    if not tasks:
        raise ValueError(f"nothing is left to read after step {start_step:,}; the plans have {windows[-1][3]:,} steps")
    return tasks


def _group_batches(ends: Int64Array, n_cells: int) -> Iterator[Int64Array]:
    """Yield groups of neighboring batches as bounds, rows of a block, that together cover the block.

    Args:
        ends: row at which each batch ends, ascending. Shape (batches,).
        n_cells: most cells of a group, unless a single batch has more.

    Yields:
        The row at which the first batch of the group starts, and the rows at which its batches end.
    """
    first = 0
    while first < ends[-1:].sum():
        together = ends[(ends > first) & (ends <= first + n_cells)]
        if not len(together):
            together = ends[ends > first][:1]
        yield np.concatenate([[first], together])
        first = together[-1]
