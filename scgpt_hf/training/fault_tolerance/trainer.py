"""A trainer that saves complete checkpoints, resumes from them exactly, and stops cleanly.

What is trained, and on which objectives, is decided in `scgpt_hf.training.trainer`. How each kind of failure is handled
is explained in the docstring of this package.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from scgpt_hf.cells.schedule.run import RunSchedule
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.training.fault_tolerance import checkpoints
from scgpt_hf.training.fault_tolerance.background import BackgroundSave
from scgpt_hf.training.fault_tolerance.checkpoints import Manifest
from scgpt_hf.training.fault_tolerance.losses import LossAccumulator, load_losses, losses_path, save_losses
from scgpt_hf.training.fault_tolerance.nonfinite import (
    FP16_SCALE_HALVINGS,
    NonFiniteGuard,
    all_finite,
    propagate_nonfinite,
)
from scgpt_hf.training.fault_tolerance.ranks import Ranks
from scgpt_hf.training.fault_tolerance.resume import translate_load_errors
from scgpt_hf.training.fault_tolerance.signals import StopSignal, TrainingInterrupted
from scgpt_hf.training.library_trainer import LibraryTrainer
from scgpt_hf.training.settings import TrainingSettings

logger = logging.getLogger(__name__)

# Reason to stop that the processes exchange when one cannot read its cells. Other reasons are signal numbers, which are
# below 65 on Linux and macOS.
_READ_FAILED = 1_000
_WRITE_FAILED = 2_000  # the checkpoint that is being written in the background


class FaultTolerantTrainer(LibraryTrainer):
    """A trainer that loses at most the steps since the last checkpoint.

    `train` raises, on all processes:

    - FloatingPointError: too many consecutive steps were skipped because their loss or gradient was not finite, or the
      weights are not finite when they are saved.
    - TrainingInterrupted: a signal was received. A checkpoint was saved.
    - OSError: cells could not be read (a checkpoint was saved), or a checkpoint could not be written. With
      `save_in_background`, this and weights that are not finite are found while the next steps run.
    - ValueError: the checkpoint to resume from does not fit the model.

    Attributes:
        schedule: which cells each step trains on.
        losses: losses since the last log line.
        stop_signal: see `__init__`.
    """

    args: TrainingSettings

    def __init__(
        self, *, schedule: RunSchedule, stop_signal: StopSignal | None = None, **trainer_arguments: Any
    ) -> None:
        """Create the trainer.

        Args:
            schedule: which cells each step trains on.
            stop_signal: handles SIGTERM, SIGUSR1 and SIGINT while `train` runs: the first one saves a checkpoint and
                stops. None leaves the signal handlers of the process alone.
            trainer_arguments: arguments of `transformers.Trainer`.

        Raises:
            ValueError: `save_total_limit` is 1, but the newest and the best checkpoint must both be kept; or
                `save_only_model` is set, but no run can resume from a model alone.
        """
        args = trainer_arguments["args"]
        if args.save_total_limit == 1 or args.save_only_model:
            raise ValueError(
                f"found save_total_limit {args.save_total_limit} and save_only_model {args.save_only_model}; expected "
                "a limit of 2 or more and no save_only_model: the newest and the best checkpoint are kept complete"
            )
        super().__init__(**trainer_arguments)
        self.schedule, self.folder = schedule, Path(self.args.output_dir)
        self.ranks = Ranks(self.args.world_size, self.args.process_index, self.args.ddp_timeout)
        limit = self.args.max_bad_steps + (FP16_SCALE_HALVINGS if self.args.fp16 else 0)
        self.guard = NonFiniteGuard(limit, schedule.cells, log_skipped=self.ranks.is_first)
        self.stop_signal = stop_signal
        self.losses = LossAccumulator()
        self.last_saved_step = -1
        sharded = self.is_fsdp_enabled or self.is_deepspeed_enabled
        # A checkpoint that is published must be complete first.
        in_background = self.args.save_in_background and not (sharded or self.args.push_to_hub)
        self.background = BackgroundSave(self.args.device) if in_background else None
        self.add_callback(_PrepareResume(self))
        if self.background is not None:
            self.add_callback(_BackgroundCallback(self, self.background))

    # The training loop

    @contextmanager
    def training_context(self) -> Iterator[None]:
        """Handle signals while `train` runs, if a `StopSignal` was passed, and complete the last checkpoint."""
        with self.stop_signal or nullcontext():
            try:
                yield
            except BaseException:
                # The processes may have failed at different points: do not let them wait for each other.
                if self.background is not None and (problem := self.background.wait()) is not None:
                    logger.warning("%s", checkpoints.cannot_write(self.folder, self.last_saved_step, problem))
                raise
            self.finish_checkpoint()

    def planned_length(self, steps_per_epoch: int) -> tuple[int, int] | None:
        """Return the number of epochs and steps of the schedule.

        The library resumes in epoch `step // steps_per_epoch`, which is not the true epoch if epochs differ in length.
        The epochs that the schedule has left are added to it.
        """
        start = self.schedule.start_step
        n_epochs_left = sum(end > start for end in self.schedule.epoch_ends)
        return start // steps_per_epoch + n_epochs_left, self.schedule.n_steps

    def read_step(self, batches: Iterator[Batch], n_batches: int) -> list[Batch]:
        """Return the micro-batches of one step, unless the run must stop; see `take_batches`."""
        taken = self.take_batches(batches, n_batches)
        self.guard.save_buffers(self.model)
        self.losses.start_step()
        return taken

    def take_batches(self, batches: Iterator[Batch], n_batches: int) -> list[Batch]:
        """Return the next batches of this process, once all processes have theirs and none must stop.

        Args:
            batches: batches of this process.
            n_batches: number of batches to take; fewer are returned at the end of the iterator.

        Raises:
            TrainingInterrupted: a process received a signal. A checkpoint was saved.
            OSError: a process could not read its cells. A checkpoint was saved. Or the last checkpoint could not be
                written.
        """
        taken, problem = [], None
        try:
            taken = list(islice(batches, n_batches))
        except Exception as error:  # noqa: BLE001 — raised again below, on all processes and after a checkpoint
            problem = error
        received = self.stop_signal.number if self.stop_signal else 0
        # A signal takes precedence on its process: `check_stop_signal` makes reading fail when one is received.
        reason = received or (_READ_FAILED if problem else 0)
        if self.background is not None and self.background.failed:
            reason = _WRITE_FAILED
        reason = self.ranks.all_reduce_max(reason)
        if reason == _WRITE_FAILED:
            self.finish_checkpoint()
        if reason:
            self._save_and_stop(reason, problem)
        return taken

    def check_stop_signal(self) -> None:
        """Raise `InterruptedError` if a stop signal was received; called while the trainer waits for a batch."""
        if self.stop_signal is not None:
            self.stop_signal.check()

    def _save_and_stop(self, reason: int, problem: Exception | None) -> NoReturn:
        """Save a checkpoint of the current step, unless there is one, and raise.

        Args:
            reason: number of a signal, or `_READ_FAILED`; the same on all processes.
            problem: why this process could not read, if it could not.
        """
        step = self.state.global_step
        if self.last_saved_step != step:
            self.save_checkpoint_now()
        self.finish_checkpoint()
        checkpoint = checkpoints.checkpoint_at(self.folder, step)
        if reason != _READ_FAILED:
            raise TrainingInterrupted(reason, step, checkpoint)
        raise OSError(
            f"cannot read cells after step {step:,}: {problem or 'see the errors of the other processes'}. "
            f"{checkpoint} was saved; when the cells can be read again, continue with --resume_from_checkpoint latest"
        ) from problem

    # Losses and gradients

    def process_loss(self, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        """Return the loss; if it is not finite, all its gradients become NaN."""
        return propagate_nonfinite(loss)

    def reported_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss, or 0 if it is not finite, because the step is skipped."""
        return loss.nan_to_num(0.0, 0.0, 0.0)

    def process_gradient_norm(self, norm: Any) -> torch.Tensor:
        """Skip the step if the gradient norm is not finite, and add its losses to the sums if it is."""
        norm = torch.as_tensor(norm)
        norm = getattr(norm, "full_tensor", lambda: norm)()  # of a sharded model, the norm is a DTensor
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # without accelerate's wrapper
        skipped = self.guard.skip_if_nonfinite(norm, self.state.global_step, self.model, optimizer)
        self.losses.end_step(skipped)
        return norm  # type: ignore[no-any-return]

    # Checkpoints

    def write_checkpoint(self, write_files: Callable[[Path | None], None]) -> None:
        """Save a checkpoint that is complete or absent; see `checkpoints.write_checkpoint`.

        With `save_in_background`, it is written while training goes on; see `finish_checkpoint`.
        """
        self.finish_checkpoint()
        self.guard.check_recent_steps()
        if self.background is None:
            self._require_finite()
        step, best_step = self.state.global_step, self.state.best_global_step
        manifest = Manifest(step, self.args.world_size, self.schedule.history(step))
        finish = None if self.background is None else partial(self._finish_later, best_step)
        with checkpoints.write_checkpoint(self.folder, manifest, self.ranks, finish) as staging:
            self.write_later = self.background.defer if self.background is not None else None
            try:
                write_files(staging.parent)
            finally:
                self.write_later = None
            # The library looked for the best checkpoint in the staging folder. Write the state again, with its path.
            best = checkpoints.checkpoint_at(self.folder, best_step) if best_step else None
            self.state.best_model_checkpoint = str(best) if best else None
            if self.ranks.is_first:
                self.state.save_to_json(str(staging / "trainer_state.json"))
        self.last_saved_step = step
        if self.ranks.is_first and self.background is None:
            checkpoints.prune(self.folder, self.args.save_total_limit, best_step)

    def _finish_later(self, best_step: int | None, complete: Callable[[], None]) -> None:
        """Write, complete and prune in the background what `write_checkpoint` has begun, on the first process."""
        assert self.background is not None

        def finish() -> None:
            complete()
            checkpoints.prune(self.folder, self.args.save_total_limit, best_step)

        self.background.start(_check_finite, finish)

    def finish_checkpoint(self) -> None:
        """Wait for the checkpoint that is being written in the background. All processes have to call it.

        Raises:
            FloatingPointError: weights or optimizer state are not finite. No checkpoint was saved.
            OSError: the checkpoint could not be written. The previous one is unchanged.
        """
        if self.background is None:
            return
        problem, step = self.background.wait(), self.last_saved_step
        failed = self.ranks.all_reduce_max((problem is not None) + isinstance(problem, FloatingPointError))
        if failed and self.ranks.is_first:
            checkpoints.discard_unfinished(self.folder)
        if failed:
            raise (
                _diverged(step) if failed == 2 else checkpoints.cannot_write(self.folder, step, problem)
            ) from problem

    def _require_finite(self) -> None:
        """Raise, on all processes, unless weights, buffers and optimizer state are finite."""
        states = self.optimizer.state.values() if self.optimizer is not None else []
        moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        finite = all_finite([*self.model.parameters(), *self.model.buffers(), *moments])
        if self.ranks.all_reduce_max(not finite):
            raise _diverged(self.state.global_step)

    def save_process_state(self, checkpoint: Path) -> None:
        """Save the losses of this process since the last log line."""
        save_losses(self.losses, losses_path(checkpoint, self.args.process_index))

    def restore_process_state(self, checkpoint: Path, load_random_state: Callable[[], None]) -> None:
        """Restore random state and losses of this process.

        On another number of processes, the random numbers start from a new seed, and the first process takes the losses
        of all: they are only ever summed over processes.
        """
        rank = self.args.process_index
        manifest = checkpoints.manifest_of(checkpoint)
        if manifest.world_size == self.args.world_size:
            with translate_load_errors(checkpoint):
                load_random_state()
            self.losses = load_losses([losses_path(checkpoint, rank)])
            return
        seeds = np.random.SeedSequence([self.args.seed, manifest.step, rank])
        set_seed(int(seeds.generate_state(1)[0]))
        self.losses = load_losses([losses_path(checkpoint, writer) for writer in range(manifest.world_size)])
        if rank != 0:
            self.losses.sums = {}

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Raise `CheckpointError` unless the files of a checkpoint are those that were written."""
        self.finish_checkpoint()  # it may be this one
        checkpoints.verify(checkpoint)


def _check_finite(tensors: list[torch.Tensor]) -> None:
    if not all_finite(tensors):
        raise FloatingPointError("not finite")


def _diverged(step: int) -> FloatingPointError:
    return FloatingPointError(
        f"weights or optimizer state are not finite after step {step:,}, so no checkpoint was saved: the run has "
        "diverged. Lower --learning_rate or lengthen --warmup_steps, and resume from an earlier checkpoint"
    )


class _BackgroundCallback(TrainerCallback):
    """Lets an optimizer step wait until the weights and moments of the last checkpoint are copied."""

    def __init__(self, trainer: FaultTolerantTrainer, background: BackgroundSave) -> None:
        self.trainer, self.background = trainer, background

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self.background.wait_for_copies()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer, optimizer = self.trainer, self.trainer.optimizer
        first_step = state.global_step == trainer.schedule.start_step + 1  # the optimizer has its state now
        if first_step and trainer.ranks.is_first and args.save_strategy != SaveStrategy.NO and optimizer is not None:
            self.background.warm_up([trainer.model.state_dict(), optimizer.state_dict()])


class _PrepareResume(TrainerCallback):
    """Prepares the run folder and the trainer before the first step, whether the run is new or resumed."""

    def __init__(self, trainer: FaultTolerantTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        if trainer.ranks.is_first:
            checkpoints.supersede_later(trainer.folder, step)
        trainer.ranks.barrier()
        assert step == trainer.schedule.start_step, "the schedule was planned for another checkpoint"
        if not step:
            return
        trainer.last_saved_step = step
        self._locate_best(state)
        if _validation_is_due(args, state, trainer.schedule):
            trainer.update_best_checkpoint(trainer.evaluate())
            self._locate_best(state)

    def _locate_best(self, state: TrainerState) -> None:
        """Set the path of the best checkpoint from its step: the run folder may have been moved."""
        best = checkpoints.checkpoint_at(self.trainer.folder, state.best_global_step or 0)
        state.best_model_checkpoint = str(best) if state.best_global_step and best.is_dir() else None


def _validation_is_due(args: TrainingArguments, state: TrainerState, schedule: RunSchedule) -> bool:
    """Return whether the run stopped after a step was saved, but before the validation that follows that step."""
    step = state.global_step
    if not step or any(line["step"] == step and "eval_loss" in line for line in state.log_history):
        return False
    if args.eval_strategy == IntervalStrategy.EPOCH:
        return step in schedule.epoch_ends
    at_interval = state.eval_steps > 0 and step % state.eval_steps == 0
    return args.eval_strategy == IntervalStrategy.STEPS and (at_interval or step == schedule.n_steps)
