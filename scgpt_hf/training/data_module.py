"""The batches of a run: which cells each step trains on, and the streams that read them.

With `cache_dir` the first epoch reads the source and writes a cache, and the later epochs read the cache. Cells in a
cache can be read one by one, so later epochs are shuffled over all cells, not within windows of chunks. The order
depends on the settings alone, not on whether a complete cache existed when the run started.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import PartialState

from scgpt_hf.cells.block import CHUNK_SIZE, Int64Array
from scgpt_hf.cells.cache.reader import uniform_chunk_size
from scgpt_hf.cells.cache.write_through import CachingSource
from scgpt_hf.cells.schedule.epoch import EpochPlan, plan_epoch, plan_validation
from scgpt_hf.cells.schedule.run import History, RunSchedule, plan_run
from scgpt_hf.cells.schedule.tokens import CellTokens, count_tokens
from scgpt_hf.cells.selection.filters import recorded_genes_per_cell
from scgpt_hf.cells.source import CellSource
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.pipeline.stream import Batch, CellStream, StreamConfig, stream_cells
from scgpt_hf.tokens.binning_scgpt import Ties
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.fault_tolerance.checkpoints import Manifest, manifest_of
from scgpt_hf.training.selection import Selection
from scgpt_hf.training.settings import CHUNKS_PER_WINDOW, TrainingSettings

logger = logging.getLogger(__name__)


class DataModule:
    """The batches of one process, for training, for validation and for the baselines.

    Attributes:
        schedule: which cells each step of the run trains on.
        tokens: about how many tokens each training cell has; None if one process trains, or if obs does not record it.
        caching: writes the cells to `cache_dir` while the first epoch reads them; None without `cache_dir`.
        first_plan: the plan of a first epoch in natural order with the present global batch size.
        n_validation_steps: batches of one validation, over all processes.
        supervise_by: obs column of the labels that the run learns, if any.
    """

    def __init__(
        self,
        source: CellSource,
        selection: Selection,
        processor: ScGPTProcessor,
        config: ScGPTConfig,
        args: TrainingSettings,
        *,
        mask_ratios: Sequence[float],
        input_keep: Sequence[float] | None = None,
        view_keep: Sequence[float] = (),
        train_tokens: int | None = None,
        chunks_per_window: int = CHUNKS_PER_WINDOW,
        supervise_by: str | None = None,
        cache_dir: str | None = None,
        checkpoint: str | None = None,
    ) -> None:
        """Plan every epoch. Nothing is read yet.

        Args:
            source: source of the cells.
            selection: cells and genes of the run.
            processor: turns counts into tokens.
            config: config of the model. It determines whether batches are padded, whether masked genes are left out,
                and which domains they carry.
            args: seed, batch sizes, epochs and processes.
            mask_ratios: shares of a cell's genes to mask; one is drawn for each cell and epoch.
            input_keep: shares of a cell's counts that its training input keeps; likewise. None keeps all.
            view_keep: shares of a cell's counts that its second view keeps, with the objective "views"; likewise.
            train_tokens: most tokens per cell while training; None takes the number of the processor.
            chunks_per_window: chunks whose cells are shuffled together.
            supervise_by: obs column of the labels of the objective "cls", if any.
            cache_dir: folder of the cache to write and read, if any.
            checkpoint: folder of the checkpoint that the run resumes from, if any.

        Raises:
            ValueError: there are fewer training cells than one global batch has, or `cache_dir` holds a cache that does
                not fit the run.
        """
        self.source, self.processor, self.selection = source, processor, selection
        self.stream_config = StreamConfig(
            seed=args.seed,
            mask_ratios=tuple(mask_ratios),
            leave_out_masked=config.leave_out_masked,
            queries=config.objective == "generative",
            rank=args.process_index,
            world_size=args.world_size,
            micro_batches=args.gradient_accumulation_steps,
            padded=bool(config.padding_dependent_settings),
            bucketed=args.torch_compile,
            max_tokens=train_tokens,
            categories={} if config.batch_key is None else {"domain_ids": (config.batch_key, selection.domain_ids)},
            labels={} if supervise_by is None else {"class_labels": (supervise_by, selection.class_ids)},
            input_keep=None if input_keep is None else tuple(input_keep),
            view_keep=tuple(view_keep) if config.has_objective("views") else None,
            with_counts=config.has_objective("counts"),
        )
        self.supervise_by = supervise_by
        columns = [column for column in (config.batch_key, supervise_by) if column is not None]
        self.caching = None if cache_dir is None else self._open_cache(cache_dir, list(dict.fromkeys(columns)))
        past = manifest_of(Path(checkpoint)) if checkpoint else Manifest(0, args.world_size, [])
        self.tokens = self._count_tokens()
        self.first_plan, self.schedule = self._plan(args, chunks_per_window, past.history)
        if checkpoint:
            logger.info("%s", format_resume(past, self.schedule, args))
        self._eval_batch_size = args.per_device_eval_batch_size
        plan = plan_validation(selection.parts["validation"], self._eval_batch_size)
        self.n_validation_steps = plan.n_steps
        # Micro-batches, buckets, fewer tokens and thinned counts belong to training steps.
        self._validation_config = replace(
            self.stream_config, micro_batches=1, bucketed=False, max_tokens=None, input_keep=None
        )
        self._open_validation = partial(stream_cells, self.caching or source, [plan], processor)
        self._validation = self._open_validation(self._validation_config)

    def _plan(self, args: TrainingSettings, chunks_per_window: int, history: History) -> tuple[EpochPlan, RunSchedule]:
        """Return the plan of a first epoch in natural order, and the schedule of the run."""
        cell_ids = self.selection.parts["train"]
        first_epoch: dict[str, Any] = _shuffle_windows(self.source.chunk_size, chunks_per_window)
        later_epochs = first_epoch
        if self.caching is not None:
            later_epochs = _shuffle_windows(uniform_chunk_size(len(cell_ids)), chunks_per_window)
        steps: dict[str, Any] = {"seed": args.seed, "batch_size": args.global_batch_size, "tokens": self.tokens}
        schedule = plan_run(
            cell_ids,
            n_epochs=args.num_train_epochs,
            max_steps=args.max_steps,
            history=history,
            first_epoch=first_epoch,
            balance=self.selection.balance,
            **steps,
            **later_epochs,
        )
        return plan_epoch(cell_ids, epoch=0, **steps, **first_epoch), schedule

    def _count_tokens(self) -> CellTokens | None:
        """Return about how many tokens the training cells have, if several ranks share them and obs records it."""
        cell_ids = self.selection.parts["train"]
        n_genes = None
        if self.stream_config.world_size > 1:
            n_genes = recorded_genes_per_cell(self.source, cell_ids)
        if n_genes is None:
            return None
        return count_tokens(cell_ids, n_genes, self.stream_config.max_tokens or self.processor.max_tokens)

    def _open_cache(self, cache_dir: str, columns: list[str]) -> CachingSource:
        return CachingSource(
            self.source,
            cache_dir,
            np.sort(np.concatenate(list(self.selection.parts.values()))),
            columns=columns,
            job=(self.stream_config.rank, self.stream_config.world_size),
            barrier=PartialState().wait_for_everyone,
        )

    def train(self, consumed: int) -> Any:
        """Return the training batches of this process after the first `consumed`, a multiple of the micro-batches.

        With a cache, the stream ends after the first epoch. The next call then returns the later epochs: all processes
        have to finish the first epoch before they can complete the cache together.
        """
        plans, step = self.schedule.plans_from(consumed // self.stream_config.micro_batches)
        source: CellSource = self.source
        if self.caching is not None:
            first = [plan for plan in plans if plan.epoch == 0]
            source, plans = (self.caching, first) if first else (self.caching.finish(), plans)
        return stream_cells(source, plans, self.processor, self.stream_config, start_step=step)

    def validation(self, ties: Ties | None = None) -> Any:
        """Return the validation batches of this process. Masks and ties are the same every time.

        Args:
            ties: how to bin tied counts; by default as the processor does.
        """
        return self._validation if ties is None else self._open_validation(replace(self._validation_config, ties=ties))

    def labelled_batches(self, cell_ids: Int64Array) -> list[Batch]:
        """Return the batches of this process of validation cells to embed, as inference makes them, with `cell_ids`.

        Args:
            cell_ids: ids of all processes, ascending. Shape (cells,).
        """
        stream_config = replace(
            self._validation_config,
            mask_ratios=None,
            view_keep=None,
            with_counts=False,
            with_cell_ids=True,
            ties="midpoint",
            key_by="content",
        )
        plan = plan_validation(cell_ids, self._eval_batch_size)
        return list(CellStream(self.source, [plan], self.processor, stream_config).batches())

    def unmasked(self) -> Any:
        """Return training batches without masks, in the order of a first epoch."""
        only_tokens: dict[str, Any] = {"mask_ratios": None, "view_keep": None, "with_counts": False}
        stream_config = replace(self._validation_config, **only_tokens)
        return stream_cells(self.caching or self.source, [self.first_plan], self.processor, stream_config)


def format_resume(past: Manifest, schedule: RunSchedule, args: TrainingSettings) -> str:
    """Return the log line of a resumed run: the step it resumes after, and what has changed since.

    Args:
        past: metadata of the checkpoint.
        schedule: schedule of the run.
        args: the present settings.
    """
    line = f"resumed after step {past.step:,} of {schedule.n_steps:,} ({schedule.epochs_done(past.step):.2f} epochs)"
    if past.world_size != args.world_size:
        line += f"; {args.world_size} processes instead of {past.world_size}, so dropout draws other random numbers"
    batch_size = past.history[-1][0] if past.history else None
    if batch_size not in {None, args.global_batch_size}:
        line += (
            f"; steps of {args.global_batch_size:,} cells instead of {batch_size:,}: the remaining cells of the epoch "
            "are planned again, and the learning rate continues by the number of cells seen"
        )
    return line


def _shuffle_windows(chunk_size: int, chunks_per_window: int) -> dict[str, Any]:
    """Return the arguments of `plan_epoch` that make windows of the same number of cells for any size of chunk."""
    return {"chunk_size": chunk_size, "chunks_per_window": chunks_per_window * CHUNK_SIZE // chunk_size}
