"""The trainer of pretraining: reads our stream, names the losses, validates on a stream, tells the throughput.

How it survives what happens to long runs is in `resilient.py`; everything else (precision, accumulation, clipping,
trackers, processes) is the library's own.
"""

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from huggingface_hub import HfApi
from torch.optim.lr_scheduler import LambdaLR
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import HubStrategy
from transformers.utils.hub import PushInProgress

from scgpt_hf.cells.schedule.run import RunSchedule
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.loader import StreamLoader
from scgpt_hf.pipeline.stream import Batch, lengths_of
from scgpt_hf.publishing.publish_run import check_repository, publish
from scgpt_hf.training.baselines import Baselines
from scgpt_hf.training.fault_tolerance.checkpoints import checkpoint_at
from scgpt_hf.training.fault_tolerance.trainer import FaultTolerantTrainer, Window
from scgpt_hf.training.pin_memory import count_labels, pin_batches, to_device
from scgpt_hf.training.throughput import Throughput

logger = logging.getLogger(__name__)

# Objectives that are squared errors in bins; the log calls them so.
_SQUARED_ERRORS = ("gep", "gepc")


class ScGPTTrainer(FaultTolerantTrainer):
    """Pretrains on a stream of packed batches."""

    def __init__(
        self,
        *,
        train_stream: Callable[[int], Iterable[Batch]],
        validation_stream: Callable[[], Iterable[Batch]],
        n_validation_steps: int,
        baselines: Baselines | None = None,
        **trainer_arguments: Any,
    ) -> None:
        """Wire the data_module into the trainer.

        Args:
            train_stream: batches of this rank from number n of the run on; a step takes one per accumulation step.
            validation_stream: batches of this rank, the same every time.
            n_validation_steps: batches of all ranks together; every rank has its share of them or one less.
            baselines: logged beside every validation.
            trainer_arguments: of `FaultTolerantTrainer` and `transformers.Trainer`; at least schedule, model, args and
                processing_class.

        Raises:
            ValueError: a process has nothing to validate, and the model is sharded, so that all must take part.
        """
        super().__init__(**trainer_arguments, eval_dataset=_Placeholder())
        config = trainer_arguments["model"].config
        self.weights: dict[str, float] = {name: weight for name, weight in config.loss_weights.items() if weight}
        self.validation_stream = pin_batches(validation_stream, self.args.device)
        self.n_validation_rounds = math.ceil(n_validation_steps / self.args.world_size)
        if self.is_fsdp_enabled and n_validation_steps < self.args.world_size:
            raise ValueError(
                f"{self.args.world_size} processes share the model and need a batch each to validate, found "
                f"{n_validation_steps}; lower --per_device_eval_batch_size or hold out more cells"
            )
        self.baselines = baselines
        micro_batches = self.args.gradient_accumulation_steps
        train_stream = pin_batches(train_stream, self.args.device)
        epoch_ends = [end * micro_batches for end in self.schedule.epoch_ends]
        self.loader = StreamLoader(train_stream, epoch_ends, while_waiting=self.check_stop_signal)
        self.throughput = Throughput(config, self.args.device, self.args.world_size)
        self.add_callback(_TrueEpoch(self.schedule))

    def get_train_dataloader(self) -> StreamLoader:  # type: ignore[override]
        """Return the loader, which stands where the last step left it."""
        return self.loader

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """Train as `FaultTolerantTrainer.train`, and stop the reading threads whatever happens."""
        self.throughput.restart(self.loader.waited_s)
        try:
            return super().train(*arguments, **keywords)
        finally:
            self.loader.close()

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """Return the micro-batches of one step, and the number of masked positions of all of them on all ranks.

        Losses are sums divided by that number: 1 x 8 = 2 x 4 = accumulation.
        """
        consumed = self.state.global_step * self.args.gradient_accumulation_steps
        if self.loader.consumed != consumed:
            self.loader.load_state_dict({"consumed": consumed})
        batches, n_masked = super().get_batch_samples(epoch_iterator, num_batches, device)
        self.throughput.count(batches)
        return batches, n_masked

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor:
        n_masked: torch.Tensor = self.accelerator.gather(count_labels(batch_samples, device))
        return n_masked.sum()  # as the library counts, whose copy to the GPU waits for it

    def _prepare_input(self, data: Any) -> Any:
        return super()._prepare_input(to_device(data, self.args.device) if isinstance(data, torch.Tensor) else data)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss, and keep this micro-batch's share of each objective for the log."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        for name, share in outputs.losses.items():
            self.step_shares[name] = self.step_shares.get(name, torch.zeros_like(share)) + share.detach()
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log; the training loss by its objectives, over the good steps since the last time, and the throughput."""
        if "loss" in logs and self.window.sums:
            self.guard.review()
            shares = torch.stack([torch.as_tensor(value) for value in self.window.sums.values()]).to(self.args.device)
            means = self.accelerator.reduce(shares, "sum") / max(float(self.window.n_good), 1.0)
            logs |= dict(zip(self.window.sums, means.tolist(), strict=True))
            logs["loss"] = sum(weight * logs[name] for name, weight in self.weights.items())
            logs |= self.throughput.since_last(self.loader.waited_s)
            self.window = Window()
        if not math.isfinite(logs.get("grad_norm", 0.0)):
            del logs["grad_norm"]  # of a step that was skipped
        super().log(logs, start_time)

    def create_scheduler(
        self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None
    ) -> torch.optim.lr_scheduler.LRScheduler:
        """Return the schedule; with `lr_decay_per_epoch`, warm-up, then a step down after each epoch (seed recipe).

        Where the global batch has changed, it goes by steps of the first size, so that it does not jump.
        """
        decay, schedule = self.args.lr_decay_per_epoch, self.schedule
        if decay is None:
            scheduler = super().create_scheduler(math.ceil(schedule.equivalent_steps(num_training_steps)), optimizer)
            if schedule.changes_batch_size and isinstance(scheduler, LambdaLR):
                scheduler.lr_lambdas = [_compose(factor, schedule.equivalent_steps) for factor in scheduler.lr_lambdas]
            return scheduler
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        n_warmup = self.args.get_warmup_steps(num_training_steps)

        def factor(step: int) -> float:
            warmed_up = min(1.0, (step + 1) / max(n_warmup, 1))
            return float(warmed_up * decay ** int(schedule.epochs_done(step)))

        optimizer = optimizer or self.optimizer
        assert optimizer is not None
        self.lr_scheduler = LambdaLR(optimizer, factor)
        self._created_lr_scheduler = True
        return self.lr_scheduler

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validate on the stream and return the metrics, baselines beside them.

        Raises:
            FloatingPointError: the loss is not finite: the run has diverged.
        """
        started = time.perf_counter()
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validate().items()}
        metrics[f"{metric_key_prefix}_seconds"] = time.perf_counter() - started
        self.throughput.leave_out(metrics[f"{metric_key_prefix}_seconds"])
        if not math.isfinite(loss := metrics[f"{metric_key_prefix}_loss"]):
            raise FloatingPointError(
                f"the validation loss at step {self.state.global_step:,} is {loss}: the run has diverged; lower "
                "--learning_rate or lengthen --warmup_steps, and resume from a checkpoint before it"
            )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    @torch.inference_mode()
    def validate(self) -> dict[str, float]:
        """Return loss, GEP and GEPC MSE over the masked positions of all validation cells, and what they mean."""
        model = self.accelerator.unwrap_model(self.model)
        model.eval()
        # Per objective its sum and the terms of its mean, then the cells; zeros where a rank has no batch.
        sums = torch.zeros(2 * len(self.weights) + 1, dtype=torch.float64)
        counted = []
        for batch, counts in self._validation_batches():
            with self.accelerator.autocast():
                losses = model(**self._prepare_inputs(batch)).losses
            if not counts:
                break
            n_masked, n_cells = len(batch["label_positions"]), len(lengths_of(batch))  # type: ignore[arg-type]
            n_terms = [n_masked if name.startswith("gep") else n_cells for name in self.weights]
            counted.append((torch.stack([losses[name].float() for name in self.weights]), n_terms, n_cells))
        model.train()
        for means, n_terms, n_cells in counted:  # only now, so that the GPU never waited
            weights = sums.new_tensor(n_terms)
            sums += torch.cat([means.cpu().double() * weights, weights, sums.new_tensor([n_cells])])
        return self.metrics_of(over_ranks(sums, self.accelerator).tolist())

    def _validation_batches(self) -> Iterator[tuple[Batch, bool]]:
        """Yield this rank's batches, and whether each counts.

        All ranks run a sharded model, or none can: one that has a batch less ends with its last one again.
        """
        with closing(prefetch(self.validation_stream(), while_waiting=self.check_stop_signal)) as batches:
            for _ in range(self.n_validation_rounds):
                if taken := self.take(batches, 1):
                    (batch,) = taken
                    yield batch, True
                elif self.is_fsdp_enabled:
                    yield batch, False

    def metrics_of(self, sums: list[float]) -> dict[str, float]:
        """Return means by name from what `validate` sums; see `Baselines` for the three that frame them."""
        n = len(self.weights)
        means = {name: sums[row] / max(sums[n + row], 1.0) for row, name in enumerate(self.weights)}
        metrics = {"loss": sum((self.weights[name] * mean for name, mean in means.items()), 0.0)}
        metrics |= {f"{name}_mse" if name in _SQUARED_ERRORS else name: mean for name, mean in means.items()}
        metrics["cells"] = sums[-1]
        if self.baselines is not None:
            metrics |= asdict(self.baselines)
            if "gep" in means:
                metrics["variance_explained"] = 1 - means["gep"] / self.baselines.constant_mse
        return metrics

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        started = time.perf_counter()
        super()._save_checkpoint(model, trial)
        self.throughput.leave_out(time.perf_counter() - started)
        if self.args.push_to_hub:
            self._publish(checkpoint_at(self.folder, self.state.global_step))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Leave README.md alone: `card.model_card` writes it, and the library's draft must not replace it."""

    def init_hf_repo(self, *_: Any, **__: Any) -> None:
        """Raise unless the run can be published in the end; see `check_repository`."""
        self.push_in_progress: Any = None
        if self.is_world_process_zero():
            check_repository(self.args.hub_model_id, **self._hub_arguments())

    def push_to_hub(self, *_: Any, **__: Any) -> Any:
        """Publish the finished run; return its address on the process that does.

        Raises:
            HubError: see `publish`.
        """
        if not self.is_world_process_zero():
            return None
        self._finish_current_push()
        return publish(self.args.output_dir, self.args.hub_model_id or "", **self._hub_arguments())

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Wait until the checkpoint is whole; see `_publish`."""

    def _publish(self, checkpoint: Path) -> None:
        """Publish a checkpoint in the background; the library's own way leaves out the code and adds pickles."""
        busy = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END or busy:
            return
        settings = {**self._hub_arguments(), "weights": checkpoint.name}
        job = HfApi().run_as_future(publish, self.args.output_dir, self.args.hub_model_id or "", **settings)
        job.add_done_callback(_report_failure)
        self.push_in_progress = PushInProgress([job])  # type: ignore[arg-type]

    def _hub_arguments(self) -> dict[str, Any]:
        args = self.args
        return {"private": args.hub_private_repo, "token": args.hub_token, "revision": args.hub_revision}


def over_ranks(sums: torch.Tensor, accelerator: Accelerator) -> torch.Tensor:
    """Return the sums of all processes, on the CPU; a device is used only to exchange them (Apple's has no float64)."""
    if accelerator.num_processes == 1:
        return sums
    total: torch.Tensor = accelerator.reduce(sums.to(accelerator.device), "sum")
    return total.cpu()


def _compose(factor: Callable[[Any], float], position: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: factor(position(step))


def _report_failure(job: Future[str]) -> None:
    if error := job.exception():
        logger.warning("a checkpoint could not be published, training goes on: %s", error)


class _TrueEpoch(TrainerCallback):
    """Keeps `state.epoch` right where the library counts from the epoch's start; has the last few steps logged too."""

    def __init__(self, schedule: RunSchedule) -> None:
        self.schedule = schedule

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        state.epoch = self.schedule.epochs_done(state.global_step)
        control.should_log |= state.global_step == self.schedule.n_steps


class _Placeholder(torch.utils.data.IterableDataset[Batch]):
    """Stands for the validation stream where the library insists on a dataset."""

    def __iter__(self) -> Iterator[Batch]:
        raise AssertionError("ScGPTTrainer.evaluate reads the stream itself")
