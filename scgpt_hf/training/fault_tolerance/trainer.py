"""A Trainer that outlives what happens to long runs: kills, signals, full disks, lost data, infinite losses.

It saves whole checkpoints and resumes from them exactly, on any number of processes; what is learned is not decided
here but in `trainer.py`.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from safetensors import SafetensorError
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed
from transformers.trainer_utils import IntervalStrategy

from scgpt_hf.cells.schedule.run import RunSchedule
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.training.fault_tolerance import checkpoints
from scgpt_hf.training.fault_tolerance.checkpoints import Manifest
from scgpt_hf.training.fault_tolerance.nonfinite import (
    HALVINGS_OF_FP16,
    NonFiniteGuard,
    all_finite,
    propagate_nonfinite,
)
from scgpt_hf.training.fault_tolerance.ranks import Ranks
from scgpt_hf.training.fault_tolerance.resume import read_window, translate_load_errors
from scgpt_hf.training.fault_tolerance.signals import Interrupted, StopSignal
from scgpt_hf.training.settings import TrainingSettings

logger = logging.getLogger(__name__)

_CANNOT_READ = 1_000  # beside the numbers of signals


@dataclass
class Window:
    """What one process has summed since the last line of the log; a checkpoint keeps it, so that no line differs.

    Attributes:
        sums: by objective, of the good steps: shares of the loss, which add up over processes.
        n_good: steps summed.
    """

    sums: dict[str, torch.Tensor | float] = field(default_factory=dict)
    n_good: torch.Tensor | float = 0.0

    def add(self, shares: dict[str, torch.Tensor], bad: torch.Tensor) -> None:
        """Add a step, unless it was bad."""
        for name, share in shares.items():
            self.sums[name] = self.sums.get(name, 0.0) + share.masked_fill(bad, 0.0)
        self.n_good = self.n_good + (~bad).float()


class FaultTolerantTrainer(Trainer):
    """A Trainer whose position in the data is its step number, and which loses nothing but the time since a save."""

    args: TrainingSettings
    model: Any

    def __init__(
        self, *, schedule: RunSchedule, stop_signal: StopSignal | None = None, **trainer_arguments: Any
    ) -> None:
        """Follow a schedule.

        Args:
            schedule: which cells each step trains on.
            stop_signal: handles SIGTERM and SIGINT while `train` runs: the first one saves a checkpoint and stops. None
                leaves the signal handlers of the process alone.
            trainer_arguments: of `transformers.Trainer`.

        Raises:
            ValueError: one checkpoint shall be kept, which cannot be both the newest and the best; or only its model,
                from which no run can go on.
        """
        if trainer_arguments["args"].save_total_limit == 1 or trainer_arguments["args"].save_only_model:
            raise ValueError(
                "expected save_total_limit of 2 or more and no save_only_model: the newest and the best checkpoint are "
                "kept whole"
            )
        super().__init__(**trainer_arguments)
        self._model_class = type(self.model)
        self.schedule, self.folder = schedule, Path(self.args.output_dir)
        self.ranks = Ranks(self.args.world_size, self.args.process_index, self.args.ddp_timeout)
        limit = self.args.max_bad_steps + (HALVINGS_OF_FP16 if self.args.fp16 else 0)
        self.guard = NonFiniteGuard(limit, schedule.cells, tells=self.ranks.is_first)
        self.stop_signal = stop_signal
        self.window, self.step_shares = Window(), dict[str, torch.Tensor]()
        self._saved_step = -1
        self._writes_into: Path | None = None
        self.add_callback(_Resuming(self))

    def train(self, *arguments: Any, **keywords: Any) -> Any:
        """Train as `transformers.Trainer.train`.

        Raises:
            FloatingPointError: too many bad steps in a row, or weights that are not finite when they are saved.
            Interrupted: by a signal, after a checkpoint.
            OSError: cells could not be read, after a checkpoint; or a checkpoint could not be written.
            ValueError: the checkpoint does not fit the model.
        """
        with self.stop_signal or nullcontext():
            return super().train(*arguments, **keywords)

    def check_stop_signal(self) -> None:
        """Raise `InterruptedError` if a stop signal has arrived; called while the trainer waits for a batch."""
        if self.stop_signal is not None:
            self.stop_signal.check()

    def set_initial_training_values(self, *arguments: Any) -> tuple[Any, ...]:
        """Return the library's numbers, with the epochs that the schedule has left and all its steps."""
        _, longest, *others, in_epoch, _ = super().set_initial_training_values(*arguments)
        start = self.schedule.start_step
        n_epochs = start // longest + sum(end > start for end in self.schedule.epoch_ends)
        return (n_epochs, longest, *others, in_epoch, self.schedule.n_steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """Return the micro-batches of one step; see `take`."""
        batches = self.take(epoch_iterator, num_batches)
        self.guard.remember(self.model)
        self.step_shares = {}
        return super().get_batch_samples(iter(batches), num_batches, device)

    def take(self, batches: Iterator[Batch], number: int) -> list[Batch]:
        """Return the next batches of this process, once all processes have theirs and nobody was told to stop.

        Args:
            batches: of this process.
            number: of them to take; fewer come where they end.

        Raises:
            Interrupted: by a signal, after a checkpoint.
            OSError: a process could not read its cells, after a checkpoint.
        """
        taken, problem = [], None
        try:
            taken = list(islice(batches, number))
        except Exception as error:  # noqa: BLE001 — raised again below, on all processes and after a checkpoint
            problem = error
        received = self.stop_signal.number if self.stop_signal else 0
        if told := self.ranks.all_reduce_max(received or (_CANNOT_READ if problem else 0)):
            self._stop(told, problem)
        return taken

    def _stop(self, told: int, problem: Exception | None) -> NoReturn:
        """Save what is not saved yet, and raise what ends the run; for all processes, between two steps."""
        step = self.state.global_step
        if self._saved_step != step:
            self._save_checkpoint(self.model, None)
        checkpoint = checkpoints.checkpoint_at(self.folder, step)
        if told != _CANNOT_READ:
            raise Interrupted(told, step, checkpoint)
        raise OSError(
            f"cells could not be read after step {step:,}: {problem or 'see the other processes'}; {checkpoint} "
            "holds what was learned, go on with --resume_from_checkpoint latest when they can be"
        ) from problem

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the library's loss, whose gradients are NaN throughout if it is not finite."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (propagate_nonfinite(loss), outputs) if return_outputs else propagate_nonfinite(loss)

    def training_step(self, *arguments: Any, **keywords: Any) -> torch.Tensor:
        """Return the loss of a micro-batch after its backward pass; 0 if it is not finite, since it is skipped."""
        return super().training_step(*arguments, **keywords).nan_to_num(0.0, 0.0, 0.0)

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> torch.Tensor:
        norm = torch.as_tensor(super()._get_grad_norm(model, grad_norm))  # type: ignore[no-untyped-call]
        norm = getattr(norm, "full_tensor", lambda: norm)()
        optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        bad = self.guard.skip_if_bad(norm, self.state.global_step, self.model, optimizer)
        self.window.add(self.step_shares, bad)
        return norm

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._writes_into or super()._get_output_dir(trial))

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Save beside and rename; see `checkpoints.written_whole`. The library only writes the files."""
        self.guard.review()
        self._require_finite()
        step, best = self.state.global_step, self.state.best_global_step
        manifest = Manifest(step, self.args.world_size, self.schedule.history(step))
        with checkpoints.written_whole(self.folder, manifest, self.ranks) as beside:
            self._writes_into = beside.parent
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writes_into = None
            self.state.best_model_checkpoint = str(checkpoints.checkpoint_at(self.folder, best)) if best else None
            if self.ranks.is_first:
                self.state.save_to_json(str(beside / "trainer_state.json"))
        self._saved_step = step
        if self.ranks.is_first:
            checkpoints.prune(self.folder, self.args.save_total_limit, best)

    def _require_finite(self) -> None:
        states = self.optimizer.state.values() if self.optimizer is not None else []
        moments = [value for state in states for value in state.values() if isinstance(value, torch.Tensor)]
        finite = all_finite([*self.model.parameters(), *self.model.buffers(), *moments])
        if self.ranks.all_reduce_max(not finite):
            raise FloatingPointError(
                f"weights or optimiser state are not finite after step {self.state.global_step:,}: nothing was saved; "
                "the run has diverged; lower --learning_rate or lengthen --warmup_steps, and resume from a checkpoint"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the library does, but not its pickle of the arguments: settings.yaml has them."""
        super().save_model(output_dir, _internal_call)
        if self.ranks.is_first:
            (Path(output_dir or self.args.output_dir) / "training_args.bin").unlink(missing_ok=True)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Save a sharded model under its own class: torch gives it another, whose name and code would be saved."""
        sharded_class, self.model.__class__ = type(self.model), self._model_class
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = sharded_class

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        sums: dict[str, torch.Tensor | float] = {name: float(value) for name, value in self.window.sums.items()}
        content = asdict(Window(sums, float(self.window.n_good)))
        (Path(output_dir) / f"window_{self.args.process_index}.json").write_text(json.dumps(content), encoding="utf-8")

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """Go on with the random numbers of the checkpoint; on another number of processes, with new ones."""
        if checkpoint is None:
            return
        folder, index = Path(checkpoint), self.args.process_index
        manifest = checkpoints.manifest_of(folder)
        if manifest.world_size == self.args.world_size:
            with translate_load_errors(folder):
                super()._load_rng_state(checkpoint)
            self.window = _load_window([folder / f"window_{index}.json"])
            return
        seeds = np.random.SeedSequence([self.args.seed, manifest.step, index])
        set_seed(int(seeds.generate_state(1)[0]))
        if index == 0:  # the log sums over processes: one holds what all had
            self.window = _load_window(sorted(folder.glob("window_*.json")))
        else:
            self.window = Window(n_good=_load_window([folder / "window_0.json"]).n_good)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        try:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        except (RuntimeError, SafetensorError) as error:
            raise ValueError(f"{resume_from_checkpoint} does not fit the model of the settings: {error}") from error

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with translate_load_errors(Path(str(checkpoint))):
            super()._load_optimizer_and_scheduler(checkpoint)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if load_result.missing_keys or load_result.unexpected_keys:
            raise ValueError(
                f"a checkpoint does not fit the model of the settings: it lacks {load_result.missing_keys[:5]} and has "
                f"{load_result.unexpected_keys[:5]} besides; resume with the settings that the run began with"
            )

    def _load_best_model(self) -> None:
        checkpoints.verify(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()


class _Resuming(TrainerCallback):
    """Puts a run in order that goes on from a checkpoint, before its first step."""

    def __init__(self, trainer: FaultTolerantTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        trainer, step = self.trainer, state.global_step
        if trainer.ranks.is_first:
            checkpoints.set_aside(trainer.folder, step)
        trainer.ranks.all_reduce_max(0)
        assert step == trainer.schedule.start_step, (
            "a run goes on from the checkpoint that its schedule was planned for"
        )
        if not step:
            return
        trainer._saved_step = step
        self._find_best(state)
        if _evaluation_is_due(args, state, trainer.schedule):
            trainer._determine_best_metric(trainer.evaluate(), None)
            self._find_best(state)

    def _find_best(self, state: TrainerState) -> None:
        """Name the best checkpoint by its step: the folder of the run may have moved."""
        best = checkpoints.checkpoint_at(self.trainer.folder, state.best_global_step or 0)
        state.best_model_checkpoint = str(best) if state.best_global_step and best.is_dir() else None


def _evaluation_is_due(args: TrainingArguments, state: TrainerState, schedule: RunSchedule) -> bool:
    """Return whether the run was ended after a step was saved and before it was validated."""
    step = state.global_step
    if not step or any(line["step"] == step and "eval_loss" in line for line in state.log_history):
        return False
    if args.eval_strategy == IntervalStrategy.EPOCH:
        return step in schedule.epoch_ends
    in_turn = state.eval_steps > 0 and step % state.eval_steps == 0
    return args.eval_strategy == IntervalStrategy.STEPS and (in_turn or step == schedule.n_steps)


def _load_window(paths: list[Path]) -> Window:
    """Return what was summed by the processes that wrote the files."""
    contents = [read_window(path) for path in paths]
    names = dict.fromkeys(name for sums, _ in contents for name in sums)
    _, n_good = contents[0]
    return Window({name: sum(sums.get(name, 0.0) for sums, _ in contents) for name in names}, n_good)
