"""Put a run together: plans and batches for the trainer, baselines for its validation, the files at its end."""

import json
import logging
import math
import os
import shutil
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict, replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import get_model_param_count

from scgpt_hf.cells.cache.reader import uniform_chunk_size
from scgpt_hf.cells.schedule.epoch import plan_epoch, plan_validation
from scgpt_hf.cells.schedule.run import RunSchedule, plan_run
from scgpt_hf.cells.source import CellSource
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.publishing.record import RunRecord
from scgpt_hf.publishing.run_summary import error_rows
from scgpt_hf.tokens.binning_scgpt import Ties
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.baselines import Baselines, baselines_from, sum_bins, sum_errors
from scgpt_hf.training.cache_dir import chunk_order, open_caching
from scgpt_hf.training.fault_tolerance.checkpoints import Manifest, manifest_of
from scgpt_hf.training.fault_tolerance.signals import StopSignal
from scgpt_hf.training.provenance import composition_of, training_of
from scgpt_hf.training.recipe import Selection, global_batch_size
from scgpt_hf.training.run_folder import (
    BEST_MODEL,
    CARD,
    METRICS,
    SUMMARY,
    MetricsFile,
    read_lines,
    require_space,
    write_json,
)
from scgpt_hf.training.settings import Settings, TrainingSettings
from scgpt_hf.training.trainer import ScGPTTrainer, over_ranks

logger = logging.getLogger(__name__)

# Training cells whose bins make the gene means: over so many, only the rarest genes move by more than 0.1 bin.
BASELINE_CELLS = 100_000
_CHECKPOINT_BYTES = 12  # per parameter: a weight and two moments of Adam, 4 bytes each
_PACKAGES = ("scgpt_hf", "torch", "transformers", "datasets", "accelerate", "tiledbsoma", "cellxgene-census")


class DataModule:
    """The batches of one rank, for training, for validation and for the baselines.

    Attributes:
        schedule: which cells each step of the run trains on.
        caching: writes the cells to `cache_dir` while the first epoch reads them; None without one.
        epoch: the plan of a first epoch with the present global batch.
        n_validation_steps: batches of all ranks in one validation.
    """

    def __init__(
        self,
        source: CellSource,
        selection: Selection,
        processor: ScGPTProcessor,
        settings: Settings,
        checkpoint: str | None = None,
    ) -> None:
        """Plan every epoch; nothing is read yet.

        Args:
            source: where the cells are read.
            selection: of cells and genes.
            processor: turns counts into tokens.
            settings: of the run.
            checkpoint: that the run goes on from.

        Raises:
            ValueError: fewer training cells than one global batch.
        """
        args, data = settings.training, settings.data
        self.source, self.processor, self.selection = source, processor, selection
        self.stream_config = StreamConfig(
            seed=args.seed,
            mask_ratios=tuple(data.mask_ratios),
            rank=args.process_index,
            world_size=args.world_size,
            micro_batches=args.gradient_accumulation_steps,
            padded=settings.model.cell_pooling != "cls" or settings.model.input_norm != "none",
            bucketed=args.torch_compile,
            categories=_categories(data.batch_key, selection.domains),
        )
        order: dict[str, Any] = {"seed": args.seed, "batch_size": global_batch_size(args)}
        first = chunk_order(source.chunk_size, data)
        cell_ids = selection.parts["train"]
        self.epoch = plan_epoch(cell_ids, epoch=0, **order, **first)
        past = manifest_of(Path(checkpoint)) if checkpoint else Manifest(0, args.world_size, [])
        self.caching = None if data.cache_dir is None else open_caching(source, selection, settings)
        later: dict[str, Any] = first if self.caching is None else chunk_order(uniform_chunk_size(len(cell_ids)), data)
        order |= {"n_epochs": args.num_train_epochs, "max_steps": args.max_steps, "history": past.history}
        self.schedule = plan_run(cell_ids, **order, first_epoch=first, **later)
        if checkpoint:
            logger.info("%s", format_resume(past, self.schedule, args))
        plan = plan_validation(selection.parts["validation"], args.per_device_eval_batch_size)
        self._validation_config = replace(self.stream_config, micro_batches=1, bucketed=False)
        self._validation = partial(stream_cells, self.caching or source, [plan], processor)
        self._validated = self._validation(self._validation_config)
        self.n_validation_steps = plan.n_steps

    def train(self, consumed: int) -> Any:
        """Return the training batches of this rank after the first `consumed`, a multiple of its micro-batches."""
        plans, step = self.schedule.plans_from(consumed // self.stream_config.micro_batches)
        source: CellSource = self.source
        if self.caching is not None:  # its first epoch is a stream of its own, at whose end all ranks make the cache
            first = [plan for plan in plans if plan.epoch == 0]
            source, plans = (self.caching, first) if first else (self.caching.finish(), plans)
        return stream_cells(source, plans, self.processor, self.stream_config, start_step=step)

    def validation(self, ties: Ties | None = None) -> Any:
        """Return the validation batches of this rank; masks and ties are the same every time.

        Args:
            ties: rule for ties that replaces the processor's.
        """
        return self._validated if ties is None else self._validation(replace(self._validation_config, ties=ties))

    def unmasked(self) -> Any:
        """Return training batches without masks, in the order of a first epoch."""
        stream_config = replace(self.stream_config, micro_batches=1, mask_ratios=None, bucketed=False)
        return stream_cells(self.caching or self.source, [self.epoch], self.processor, stream_config)


def format_resume(past: Manifest, schedule: RunSchedule, args: TrainingSettings) -> str:
    """Return where a run goes on, and what of its steps has changed."""
    said = f"resumed after step {past.step:,} of {schedule.n_steps:,} ({schedule.epochs_done(past.step):.2f} epochs)"
    if past.world_size != args.world_size:
        said += f"; on {args.world_size} processes instead of {past.world_size}, with new draws of dropout"
    before, now = (past.history[-1][0] if past.history else None), global_batch_size(args)
    if before not in {None, now}:
        said += (
            f"; steps of {now:,} cells instead of {before:,}: the cells that the epoch has left are planned anew, and "
            "the learning rate goes on by cells seen"
        )
    return said


def is_finished(folder: Path, schedule: RunSchedule) -> bool:
    """Return, and say, whether a run has done all its steps and left its model, summary and, last of all, card."""
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    done = summary.get("steps") if isinstance(summary, dict) else None
    told = (folder / BEST_MODEL).is_dir() and (folder / CARD).is_file()
    finished = isinstance(done, int) and done >= schedule.n_steps and told
    if finished:
        logger.info("%s is finished; nothing was changed. To train further, give more --num_train_epochs", folder)
    return finished


def measure_baselines(data_module: DataModule, accelerator: Accelerator) -> Baselines:
    """Return what simple predictors score on the validation masks, over all ranks; see `Baselines`."""
    processor = data_module.processor
    with closing(prefetch(data_module.unmasked())) as batches:
        wanted = islice(batches, math.ceil(BASELINE_CELLS / data_module.epoch.batch_size))
        bin_sums = sum_bins(wanted, processor.vocab_size)
    bin_sums[:, processor.tokenizer.all_special_ids] = 0
    low, high = processor.ties, processor.ties
    if processor.ties == "random":  # any other rule leaves no noise, and the floor is 0
        low, high = "lower", "upper"
    bin_sums = over_ranks(torch.from_numpy(bin_sums), accelerator).numpy()
    errors = sum_errors(data_module.validation(), data_module.validation(low), data_module.validation(high), bin_sums)
    return baselines_from(over_ranks(torch.from_numpy(errors), accelerator).numpy())


def make_trainer(
    data_module: DataModule,
    model: ScGPTForPreTraining,
    args: TrainingSettings,
    stop_signal: StopSignal | None = None,
) -> ScGPTTrainer:
    """Return the trainer of a run, metrics.jsonl included; it handles signals only if `stop_signal` is passed.

    Raises:
        OSError: the disk has no room for the checkpoints.
        ValueError: validation masks nothing, or does not measure what shall tell the best model.
    """
    schedule = data_module.schedule
    n_saves = (
        len(schedule.epoch_ends) if args.save_strategy == "epoch" else math.ceil(schedule.n_steps / args.save_steps)
    )
    n_checkpoints = min(args.save_total_limit or n_saves, n_saves) + 2  # one while it is written, and the best model
    require_space(Path(args.output_dir), n_checkpoints * _CHECKPOINT_BYTES * model.num_parameters())
    trainer = ScGPTTrainer(
        model=model,
        args=args,
        processing_class=data_module.processor,
        train_stream=data_module.train,
        schedule=schedule,
        validation_stream=data_module.validation,
        n_validation_steps=data_module.n_validation_steps,
        callbacks=[MetricsFile(Path(args.output_dir))],
        stop_signal=stop_signal,
    )
    trainer.baselines = measure_baselines(data_module, trainer.accelerator)
    _require_known_metric(trainer)
    return trainer


def _require_known_metric(trainer: ScGPTTrainer) -> None:
    """Raise unless validation measures what tells the best model; the library would look for it when it is due."""
    wanted = (trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    if wanted not in (known := trainer.metrics_of([0.0] * (2 * len(trainer.weights) + 1))):
        raise ValueError(f"metric_for_best_model is {wanted!r}; validation measures {', '.join(known)}")


class WhenItBegins(TrainerCallback):
    """Does something once nothing can refuse the run any more: model and optimiser are made, no step is done."""

    def __init__(self, do: Callable[[], object]) -> None:
        """Remember what to do."""
        self.do = do

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Do it."""
        self.do()


def save_best_model(trainer: ScGPTTrainer, folder: Path) -> None:
    """Write the best model and its processor to `folder/best_model`, whole or not at all."""
    beside, old = folder / f"{BEST_MODEL}.tmp", folder / f"{BEST_MODEL}.old"
    if trainer.is_world_process_zero():
        shutil.rmtree(beside, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    trainer.save_model(str(beside), _internal_call=True)  # without the library's own push
    if trainer.is_world_process_zero():
        (beside / "training_args.bin").unlink(missing_ok=True)  # a pickle; settings.yaml says the same
        if (folder / BEST_MODEL).exists():
            os.replace(folder / BEST_MODEL, old)
        os.replace(beside, folder / BEST_MODEL)
        shutil.rmtree(old, ignore_errors=True)


def whole_model(trainer: ScGPTTrainer, folder: Path) -> ScGPTForPreTraining:
    """Return the best model for one process to use alone: a sharded one would wait for the others, so it is read."""
    if not trainer.is_fsdp_enabled:
        return cast(ScGPTForPreTraining, trainer.model)
    model: torch.nn.Module = ScGPTForPreTraining.from_pretrained(folder / BEST_MODEL)
    return cast(ScGPTForPreTraining, model.to(trainer.args.device))


def summarize(trainer: ScGPTTrainer, data_module: DataModule) -> dict[str, Any]:
    """Return what a reader of the run wants to know first, and write it to summary.json; for the first process."""
    args, parts, donors = trainer.args, data_module.selection.parts, data_module.selection.n_donors
    history = trainer.state.log_history
    rates = [line["cells_per_second"] for line in history if "cells_per_second" in line]
    validations = [line for line in history if "eval_loss" in line]
    summary = {
        "model_parameters": get_model_param_count(trainer.model),  # type: ignore[no-untyped-call]
        "train_cells": len(parts["train"]),
        "validation_cells": len(parts["validation"]),
        "train_donors": donors["train"],
        "validation_donors": donors["validation"],
        "genes": len(data_module.selection.genes),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "global_batch_size": data_module.epoch.batch_size,
        "train_seconds": read_lines(Path(args.output_dir) / METRICS)[-1]["seconds"],
        **training_of(trainer),
        "cells_per_second": round(float(np.median(rates)), 1) if rates else None,
        "versions": {name: version(name) for name in _PACKAGES},
        "baselines": asdict(trainer.baselines) if trainer.baselines else None,
        "best": min(validations, key=lambda line: line["eval_loss"]) if validations else None,
        "composition": composition_of(data_module.source, parts),
        "data": data_module.source.describe(),
    }
    write_json(Path(args.output_dir) / SUMMARY, summary)
    return summary


def tell(summary: dict[str, Any], folder: Path) -> str:
    """Return the closing words of a run: what was learned, beside what it means, and where everything lies."""
    best, errors = summary["best"], error_rows(RunRecord(summary, SUMMARY))
    lines = [
        "Trained {model_parameters:,} parameters on {train_cells:,} cells of {train_donors} donors for "
        "{epochs:.3g} epochs ({steps:,} steps) in {train_seconds:.0f} s on {device}.".format(**summary),
    ]
    if best and summary["baselines"]:
        lines += [
            f"Best validation at step {best['step']:,}, "
            "{validation_cells:,} cells of {validation_donors} other donors, mean squared error in bins:".format(
                **summary
            ),
            *[f"  {row.name:38} {row.value:8.2f}" for row in errors if row.value is not None],
            f"  share of the variance explained        {best.get('eval_variance_explained', math.nan):8.1%}",
        ]
    lines += [f"Everything is in {folder}: {BEST_MODEL}/ README.md {METRICS} {SUMMARY} loss.png umap.png"]
    return "\n".join(line for line in lines if line)


def _categories(batch_key: str | None, domains: list[str]) -> dict[str, tuple[str, dict[str, int]]]:
    if batch_key is None:
        return {}
    return {"domain_ids": (batch_key, {domain: index for index, domain in enumerate(domains)})}
