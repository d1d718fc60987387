"""The pretraining trainer: reads the stream, logs each objective, validates on a stream, publishes checkpoints.

Fault tolerance is in its base class, `FaultTolerantTrainer`. Precision, gradient accumulation, clipping, trackers and
distributed training are those of `transformers.Trainer`.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, closing, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import HfApi
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy

from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.loader import StreamLoader
from scgpt_hf.pipeline.stream import Batch, lengths_of
from scgpt_hf.publishing.publish_run import check_repository, publish
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.baselines import Baselines
from scgpt_hf.training.fault_tolerance.checkpoints import checkpoint_at
from scgpt_hf.training.fault_tolerance.trainer import FaultTolerantTrainer
from scgpt_hf.training.library_trainer import copy_to
from scgpt_hf.training.optimization.averaging import WeightAverage
from scgpt_hf.training.optimization.optimizers import MUON, make_muon
from scgpt_hf.training.optimization.schedules import scheduler_arguments
from scgpt_hf.training.throughput import Throughput
from scgpt_hf.training.validation.cell_types import CellTypeScorer

logger = logging.getLogger(__name__)

# Objectives whose loss is a mean squared error in bins. Their validation metrics are named `<objective>_mse`.
_SQUARED_ERRORS = ("gep", "gepc", "gen")


class ScGPTTrainer(FaultTolerantTrainer):
    """Pretrains a model on a stream of batches.

    Call `train(resume_from_checkpoint=...)` as with `transformers.Trainer`. `FaultTolerantTrainer` lists what it
    raises.

    Attributes:
        weights: weight of each objective in the loss, without those of weight 0.
        terms: names of the means that validation computes: each objective and, for labels, the accuracy.
        average: moving average of the weights while `train` runs; None without `ema_decay`.
        baselines: errors of simple predictors, logged with every validation; None until they are measured.
        cell_types: scores the embedding of labelled cells at every validation; None without `eval_labels`.
    """

    def __init__(
        self,
        *,
        train_stream: Callable[[int], Iterable[Batch]],
        validation_stream: Callable[[], Iterable[Batch]],
        n_validation_steps: int,
        baselines: Baselines | None = None,
        cell_types: CellTypeScorer | None = None,
        **trainer_arguments: Any,
    ) -> None:
        """Create the trainer.

        Args:
            train_stream: returns the batches of this process from batch number n of the run on. One step takes as many
                batches as there are gradient accumulation steps.
            validation_stream: returns the validation batches of this process, the same ones at each call.
            n_validation_steps: number of validation batches of all processes together. Each process has its share,
                rounded up or down.
            baselines: logged with every validation.
            cell_types: see `ScGPTTrainer`.
            trainer_arguments: arguments of `FaultTolerantTrainer` and `transformers.Trainer`; at least schedule, model,
                args and processing_class.

        Raises:
            ValueError: the model is sharded, but there are fewer validation batches than processes, or a setting needs
                a model that is not sharded.
        """
        super().__init__(**trainer_arguments)
        config = trainer_arguments["model"].config
        self.weights: dict[str, float] = {name: weight for name, weight in config.loss_weights.items() if weight}
        self.terms = [*self.weights, *(["cls_accuracy"] if "cls" in self.weights else [])]
        self.validation_stream = pin_batches(validation_stream, self.args.device)
        self.n_validation_rounds = math.ceil(n_validation_steps / self.args.world_size)
        fewest = min(n_validation_steps, cell_types.n_batches) if cell_types else n_validation_steps
        if self.is_fsdp_enabled and fewest < self.args.world_size:
            raise ValueError(
                f"{self.args.world_size} processes share the model, so each needs a batch to validate, found "
                f"{fewest} batches; lower --per_device_eval_batch_size or hold out more cells"
            )
        if self.is_fsdp_enabled and (self.args.ema_decay is not None or self.args.optim == MUON):
            raise ValueError(
                "--ema_decay and --optim muon need complete weights on each process; do not shard the model"
            )
        self.baselines, self.cell_types = baselines, cell_types
        self.average: WeightAverage | None = None
        micro_batches = self.args.gradient_accumulation_steps
        train_stream = pin_batches(train_stream, self.args.device)
        epoch_ends = [end * micro_batches for end in self.schedule.epoch_ends]
        self.loader = StreamLoader(train_stream, epoch_ends, while_waiting=self.check_stop_signal)
        self.throughput = Throughput(config, self.args.device, self.args.world_size)
        self.add_callback(_StepCallback(self))

    # Training

    @contextmanager
    def training_context(self) -> Iterator[None]:
        """Handle signals while `train` runs, and stop the reading threads at its end, also after an error."""
        self.throughput.restart(self.loader.waited_s)
        with closing(self.loader), super().training_context(), self._averaging():
            yield

    @contextmanager
    def _averaging(self) -> Iterator[None]:
        """Average the weights while `train` runs, if `ema_decay` is set; the model then ends with the average."""
        if self.args.ema_decay is None:
            yield
            return
        self.average = WeightAverage(self.accelerator.unwrap_model(self.model), self.args.ema_decay)
        yield
        if not (self.args.load_best_model_at_end and self.state.best_model_checkpoint):  # which holds an average too
            self.average.apply()
        self.average = None

    def _with_average(self) -> AbstractContextManager[object]:
        """Return a context in which the model has the averaged weights, if they are averaged."""
        return nullcontext() if self.average is None else self.average.applied()

    def make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer | None:
        """Return Muon, if `optim` names it."""
        if self.args.optim != MUON:
            return None
        return make_muon(self.model, self.args, set(self.get_decay_parameter_names(self.model)))

    def scheduler_arguments(self, n_steps: int) -> Any:
        """Return the arguments of the learning rate schedule, with shares of the run as numbers of steps."""
        return scheduler_arguments(self.args, n_steps)

    def read_step(self, batches: Iterator[Batch], n_batches: int) -> list[Batch]:
        """Return the micro-batches of one step, and count them for the throughput."""
        # The step number determines the position in the data. The loader is elsewhere at the first step after a resume.
        consumed = self.state.global_step * self.args.gradient_accumulation_steps
        if self.loader.consumed != consumed:
            self.loader.seek(consumed)
        taken = super().read_step(batches, n_batches)
        if "gen" in self.weights:
            for batch in taken:
                batch["second_pass"] = self.state.global_step >= self.args.gen_after_steps
        self.throughput.count(taken)
        return taken

    def n_labels_of_step(self, batches: Sequence[Batch], device: torch.device) -> torch.Tensor:
        """Return the number of masked positions of a step, over its micro-batches and all processes.

        Losses are sums divided by this number. So the result does not depend on how the cells of a step are split: one
        process with 8 cells, two with 4, or 8 accumulated. The number of labelled cells, by which the objective "cls"
        divides, is counted with it and added to the batches.
        """
        keys = ["labels", *(["class_labels"] if "cls" in self.weights else [])]
        counts: torch.Tensor = self.accelerator.gather(count_labels(batches, keys, device)[None])
        n_masked, *n_labelled = counts.sum(0).unbind()
        for batch in batches if n_labelled else ():
            (batch["num_labelled_in_batch"],) = n_labelled
        return n_masked

    def process_loss(self, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        """Return the loss to backpropagate, and add the loss of each objective to the sums for the log."""
        self.losses.add(outputs.losses)
        return super().process_loss(loss, outputs)

    def learning_rate_factor(self, n_steps: int) -> Callable[[int], float] | None:
        """Return the schedule of `lr_decay_per_epoch`: warm-up, then a step down after each epoch.

        It is the schedule of scGPT's recipe, which uses a factor of 0.9.
        """
        decay = self.args.lr_decay_per_epoch
        if decay is None:
            return None
        n_warmup = self.args.get_warmup_steps(n_steps)

        def factor(step: int) -> float:
            warm_up = min(1.0, (step + 1) / max(n_warmup, 1))
            return float(warm_up * decay ** int(self.schedule.epochs_done(step)))

        return factor

    def rescaled_steps(self) -> Callable[[int], float] | None:
        """Return the steps of the first batch size with as many cells, if the batch size has changed.

        The learning rate then continues without a jump where a run resumes with another batch size.
        """
        return self.schedule.equivalent_steps if self.schedule.changes_batch_size else None

    def complete_log(self, logs: dict[str, float]) -> None:
        """Log the loss of each objective, their weighted sum and the throughput, over the steps since the last line."""
        if "loss" in logs and self.losses.sums:
            self.guard.check_recent_steps()
            sums = torch.stack([torch.as_tensor(value) for value in self.losses.sums.values()]).to(self.args.device)
            means = self.accelerator.reduce(sums, "sum") / max(float(self.losses.n_steps), 1.0)
            logs |= dict(zip(self.losses.sums, means.tolist(), strict=True))
            logs["loss"] = sum(weight * logs[name] for name, weight in self.weights.items() if name in logs)
            logs |= self.throughput.rates(self.loader.waited_s)
            self.throughput.restart(self.loader.waited_s)
            self.losses.reset()
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]  # of a skipped step; JSON has no NaN

    # Validation

    def validation_metrics(self) -> dict[str, float]:
        """Return the metrics of `validate`, and the seconds it took.

        Raises:
            FloatingPointError: the loss is not finite: the run has diverged.
        """
        started = time.perf_counter()
        with self._with_average():
            metrics = self.validate()
            if not math.isfinite(metrics["loss"]):
                raise FloatingPointError(
                    f"the validation loss at step {self.state.global_step:,} is {metrics['loss']}: the run has "
                    "diverged. Lower --learning_rate or lengthen --warmup_steps, and resume from an earlier checkpoint"
                )
            if self.cell_types is not None:
                metrics |= self.score_cell_types(self.cell_types)
        metrics["seconds"] = time.perf_counter() - started
        self.throughput.exclude(metrics["seconds"])
        return metrics

    @torch.inference_mode()
    def score_cell_types(self, scorer: CellTypeScorer) -> dict[str, float]:
        """Return the scores of the embedding of labelled validation cells, beside those of PCA.

        Raises:
            FloatingPointError: an embedding is not finite, or `metric_for_best_model` cannot be computed.
        """
        model = self.accelerator.unwrap_model(self.model)
        nowhere = torch.empty(0, dtype=torch.long, device=self.args.device)

        def embed(batch: Batch) -> torch.Tensor:
            inputs = self.to_model_inputs({key: value for key, value in batch.items() if key != "cell_ids"})
            with self.accelerator.autocast():  # the model with its heads: a sharded one cannot run its encoder alone
                vectors = model(**inputs, label_positions=nowhere).cell_embedding
            return torch.nn.functional.normalize(vectors.float(), dim=-1)

        model.eval()
        try:
            scores = scorer.score(embed, same_calls=self.is_fsdp_enabled)
        except ValueError as error:
            raise FloatingPointError(f"at step {self.state.global_step:,} {error}: the run has diverged") from error
        finally:
            model.train()
        wanted = (self.args.metric_for_best_model or "").removeprefix("eval_")
        if wanted in scorer.names and wanted not in scores:
            raise FloatingPointError(
                f"{wanted}, the metric_for_best_model, cannot be computed at step {self.state.global_step:,}: all "
                "cells may have the same embedding. Lower --learning_rate, and resume from an earlier checkpoint"
            )
        return scores

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Return the metrics of the model on the masked positions of all validation cells; see `metrics_from_sums`."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        losses_by_batch = []
        for batch, counts in self._validation_batches():
            with self.accelerator.autocast():
                outputs = model(**self.to_model_inputs(batch))
            if not counts:
                break
            losses_by_batch.append((*self._terms_of(batch, outputs), len(lengths_of(batch))))
        model.train()
        # Only now are the losses copied to the CPU: in the loop, each copy would make the host wait for the GPU.
        sums = torch.zeros(2 * len(self.terms) + 1, dtype=torch.float64)  # zeros on a process without a batch
        for means, n_terms, n_cells in losses_by_batch:
            weights = sums.new_tensor(n_terms)
            sums += torch.cat([means.cpu().double() * weights, weights, sums.new_tensor([n_cells])])
        return self.metrics_from_sums(over_ranks(sums, self.accelerator).tolist())

    def _terms_of(self, batch: Batch, outputs: Any) -> tuple[torch.Tensor, list[int]]:
        """Return each of `terms` of a validation batch, (terms,), and how many positions or cells it is a mean of."""
        means, n_cells, classes = dict(outputs.losses), len(lengths_of(batch)), batch.get("class_labels")
        n_masked = len(batch["label_ids" if "label_ids" in batch else "label_positions"])  # type: ignore[arg-type]
        # The losses of gene expression are means over masked positions, those of classes over labelled cells, and the
        # others over all cells.
        n_terms = {name: n_masked if name.startswith(("gep", "gen")) else n_cells for name in self.weights}
        if isinstance(classes, torch.Tensor):
            n_terms["cls"] = n_terms["cls_accuracy"] = int(classes.ne(int(IGNORE)).sum())
            means["cls_accuracy"] = accuracy(outputs.class_logits, copy_to(self.args.device, classes))
        return torch.stack([means[name].float() for name in self.terms]), [n_terms[name] for name in self.terms]

    def _validation_batches(self) -> Iterator[tuple[Batch, bool]]:
        """Yield the batches of this process, and whether each counts.

        The forward pass of a sharded model is a collective operation. So a process that has one batch less than others
        runs its last batch again, and that one does not count.
        """
        with closing(prefetch(self.validation_stream(), while_waiting=self.check_stop_signal)) as batches:
            for _ in range(self.n_validation_rounds):
                if taken := self.take_batches(batches, 1):
                    (batch,) = taken
                    yield batch, True
                elif self.is_fsdp_enabled:
                    yield batch, False

    def metrics_from_sums(self, sums: Sequence[float]) -> dict[str, float]:
        """Return the metrics of a validation.

        Args:
            sums: sums over all cells: for each of `terms` its sum, then for each the number of positions or cells that
                it is a mean of, then the number of cells. Shape (2 * terms + 1,).

        Returns:
            `loss`, the weighted sum of the objectives; the mean of each of `terms`; `cells`; and, if they are known,
            the baselines and `variance_explained`, 1 - MSE / MSE of the best constant.
        """
        n = len(self.terms)
        means = {name: sums[row] / max(sums[n + row], 1.0) for row, name in enumerate(self.terms)}
        metrics = {"loss": sum((weight * means[name] for name, weight in self.weights.items()), 0.0)}
        metrics |= {f"{name}_mse" if name in _SQUARED_ERRORS else name: mean for name, mean in means.items()}
        metrics["cells"] = sums[-1]
        if self.baselines is not None:
            metrics |= asdict(self.baselines)
            if "gep" in means:
                metrics["variance_explained"] = 1 - means["gep"] / self.baselines.constant_mse
        return metrics

    # Checkpoints and publishing

    def write_checkpoint(self, write_files: Callable[[Path | None], None]) -> None:
        """Save a checkpoint and, if the run is published, publish it in the background."""
        started = time.perf_counter()
        with self._with_average():
            super().write_checkpoint(write_files)
            if self.average is not None and self.background is not None:
                self.background.wait_for_copies()  # the weights are about to change
        self.throughput.exclude(time.perf_counter() - started)
        if self.args.push_to_hub:
            self._publish_checkpoint(checkpoint_at(self.folder, self.state.global_step))

    def save_process_state(self, checkpoint: Path) -> None:
        """Save what the base class saves, and the weights to continue from if the checkpoint's model is an average."""
        super().save_process_state(checkpoint)
        if self.average is not None and self.ranks.is_first:
            self.average.save_trained(checkpoint, self.write_later)

    def restore_weights(self, checkpoint: Path) -> None:
        """Restore the average, and the weights to continue from."""
        if self.average is not None:
            self.average.restore(checkpoint)

    def check_publishing(self) -> None:
        """Raise `HubError` unless the run can be published in the end; see `check_repository`."""
        check_repository(self.args.hub_model_id, **self._hub_arguments())

    def publish_run(self) -> str:
        """Publish the finished run and return its address.

        Raises:
            HubError: see `publish`.
        """
        return publish(self.args.output_dir, self.args.hub_model_id or "", **self._hub_arguments())

    def _publish_checkpoint(self, checkpoint: Path) -> None:
        """Publish a checkpoint in the background, unless the previous one is still being uploaded."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or self.is_uploading():
            return
        arguments = {**self._hub_arguments(), "weights": checkpoint.name}
        upload = HfApi().run_as_future(publish, self.args.output_dir, self.args.hub_model_id or "", **arguments)
        upload.add_done_callback(_log_failure)
        self.track_upload(upload)

    def _hub_arguments(self) -> dict[str, Any]:
        args = self.args
        return {"private": args.hub_private_repo, "token": args.hub_token, "revision": args.hub_revision}


def pin_batches(open_stream: Callable[..., Iterable[Batch]], device: torch.device) -> Callable[..., Iterable[Batch]]:
    """Wrap a function that opens a stream, so that the tensors of its batches are in page-locked memory.

    A copy to the GPU from ordinary memory waits until the GPU has finished all work queued before, and the kernels of
    the next step are launched late. The copy to page-locked memory is made by the thread that reads the stream. For
    devices other than CUDA, the function is returned unchanged.
    """
    if device.type != "cuda":
        return open_stream
    return lambda *position: _pin(open_stream(*position), device)


def _pin(batches: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    torch.cuda.set_device(device)  # CUDA's current device is set per thread; the default would be the first GPU
    for batch in batches:
        yield {key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}


def accuracy(logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
    """Return the share of the cells with a class whose class has the highest logit, or 0 if no cell has one.

    Args:
        logits: shape (cells, classes).
        classes: int64 class of each cell, `IGNORE` where unknown, shape (cells,).
    """
    known = classes != int(IGNORE)
    return ((logits.argmax(1) == classes) & known).sum() / known.sum().clamp(min=1)


def count_labels(batches: Sequence[Batch], keys: Sequence[str], device: torch.device) -> torch.Tensor:
    """Return the number of labels at each key in the batches of this process: float32, (keys,), on the device."""
    total = torch.zeros(len(keys))
    for batch in batches:
        total += torch.stack([torch.as_tensor(batch[key]).ne(IGNORE).sum() for key in keys])
    return copy_to(device, total.pin_memory() if device.type == "cuda" else total)


def over_ranks(sums: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Return the sums over all processes, on the CPU.

    They are moved to the device only to be exchanged, and not on a single process: Apple's GPUs have no float64.
    """
    if accelerator.num_processes == 1:
        return sums
    total: torch.Tensor = accelerator.reduce(sums.to(accelerator.device), "sum")
    return total.cpu()


def _log_failure(upload: "Future[str]") -> None:
    if error := upload.exception():
        logger.warning("a checkpoint could not be published; training continues: %s", error)


class _StepCallback(TrainerCallback):
    """Averages the weights after each step, sets `state.epoch` from the schedule, and logs the last steps of a run.

    The library computes the epoch as if all epochs had the same length, and leaves the steps after the last multiple of
    `logging_steps` out of the log.
    """

    def __init__(self, trainer: ScGPTTrainer) -> None:
        self.trainer = trainer

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        schedule, step = self.trainer.schedule, state.global_step
        if self.trainer.average is not None:
            self.trainer.average.update(step)
        state.epoch = schedule.epochs_done(step)
        control.should_log |= step == schedule.n_steps
