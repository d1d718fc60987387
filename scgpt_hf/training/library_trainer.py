"""All overrides of `transformers.Trainer`, and the hooks that our trainers implement instead.

`transformers.Trainer` has few extension points, and many of the methods that we must change are private: a new release
may rename them or change their arguments. So one class in the package overrides them, `LibraryTrainer`, and each
override says why it is needed. Our trainers (`FaultTolerantTrainer`, `ScGPTTrainer`, `ClassifierTrainer`) derive from
it and override only its hooks, whose names the library does not use.

tests/training/test_library_trainer.py compares the signature of every method listed here with the installed
transformers, and checks that no other class overrides or calls a private method of the library. To support a new
release, run that file first: it names each method that changed. Then raise the upper bound in pyproject.toml.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from transformers import PrinterCallback, ProgressCallback, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINING_ARGS_NAME
from transformers.utils.hub import PushInProgress

from scgpt_hf.pipeline.loader import StreamLoader
from scgpt_hf.pipeline.stream import Batch
from scgpt_hf.training.fault_tolerance.resume import require_all_weights, translate_load_errors, translate_model_errors
from scgpt_hf.training.optimization.optimizers import matrix_names
from scgpt_hf.training.validation.progress import TerminalProgress


class LibraryTrainer(Trainer):
    """`transformers.Trainer` with the changes that our trainers share, and hooks for the rest.

    The first part of the class holds the hooks, the second the library's methods. A hook that a trainer does not
    override leaves the library's behavior unchanged, except for the two that are required: `validation_metrics` and, if
    the run is published, `publish_run`. A trainer also sets `loader` before it trains.
    """

    model: Any
    push_in_progress: Any
    loader: StreamLoader  # the training batches of this process; set by the class that derives from this one

    # Where checkpoint folders are written, if not to `output_dir`. Set only while `write_checkpoint` runs.
    _checkpoint_root: Path | None = None

    # Writes a large part of a checkpoint later: receives its tensors, and the function that writes a copy of them. None
    # writes it at once. Set only while a checkpoint is saved, and not for a model that is sharded.
    write_later: Callable[[Any, Callable[[Any], object]], None] | None = None

    def __init__(self, **trainer_arguments: Any) -> None:
        """Create the trainer.

        Args:
            trainer_arguments: arguments of `transformers.Trainer`, without data sets.
        """
        super().__init__(**trainer_arguments, eval_dataset=_NoDataset())
        self._model_class = type(self.model)
        # In a notebook the library shows a table instead, which stays.
        if self.pop_callback(ProgressCallback) or self.pop_callback(PrinterCallback):
            self.add_callback(TerminalProgress())

    # Hooks: what our trainers override ------------------------------------------------------------------------------

    def validation_metrics(self) -> dict[str, float]:
        """Run a validation and return its metrics, without the `eval_` prefix. Required."""
        raise NotImplementedError

    def training_context(self) -> AbstractContextManager[object]:
        """Return a context manager that is active while `train` runs."""
        return nullcontext()

    def planned_length(self, steps_per_epoch: int) -> tuple[int, int] | None:
        """Return the number of epochs and of steps in the whole run, or None for the library's numbers.

        Args:
            steps_per_epoch: number by which the library divides the step to find the epoch to resume in.
        """

    def read_step(self, batches: Iterator[Batch], n_batches: int) -> list[Batch]:
        """Return the micro-batches of one optimizer step: `n_batches`, or fewer at the end of the epoch."""
        return list(islice(batches, n_batches))

    def n_labels_of_step(self, batches: Sequence[Batch], device: torch.device) -> torch.Tensor | int | None:
        """Return the number of labels of a step over all processes, by which its summed loss is divided."""
        return super()._get_num_items_in_batch(list(batches), device)

    def before_forward(self) -> None:
        """Prepare the model for the forward pass of a training batch; it is in training mode."""

    def process_loss(self, loss: torch.Tensor, outputs: Any) -> torch.Tensor:
        """Return the loss to backpropagate, shape (), given the library's loss and the model's outputs."""
        return loss

    def reported_loss(self, loss: torch.Tensor) -> torch.Tensor:
        """Return the loss of a micro-batch that the library adds to its running mean, after the backward pass."""
        return loss

    def process_gradient_norm(self, norm: Any) -> Any:
        """Return the gradient norm to log. Called between the backward pass and the optimizer step."""
        return norm

    def complete_log(self, logs: dict[str, float]) -> None:
        """Change the values that are about to be logged, in place."""

    def make_optimizer(self, model: torch.nn.Module) -> torch.optim.Optimizer | None:
        """Return the optimizer, or None for the one that `optim` names in the library."""

    def scheduler_arguments(self, n_steps: int) -> Any:
        """Return the arguments of the library's learning rate schedule for a run of `n_steps`."""
        return self.args.lr_scheduler_kwargs

    def learning_rate_factor(self, n_steps: int) -> Callable[[int], float] | None:
        """Return a function from a step to the factor of the learning rate, or None for the library's schedules."""

    def rescaled_steps(self) -> Callable[[int], float] | None:
        """Return a function from a step to the step that the library's schedule should see, or None for no change."""

    def write_checkpoint(self, write_files: Callable[[Path | None], None]) -> None:
        """Save a checkpoint.

        Args:
            write_files: writes the library's files to `checkpoint-<step>` in the folder passed; None is `output_dir`.
        """
        write_files(None)

    def save_process_state(self, checkpoint: Path) -> None:
        """Write what this process needs to resume in addition to its random state."""

    def restore_process_state(self, checkpoint: Path, load_random_state: Callable[[], None]) -> None:
        """Restore what `save_process_state` wrote.

        Args:
            checkpoint: folder of the checkpoint.
            load_random_state: restores the random state of this process; fails if it has none in the checkpoint.
        """
        load_random_state()

    def restore_weights(self, checkpoint: Path) -> None:
        """Restore weights that the checkpoint holds beside its model, which is loaded already."""

    def check_checkpoint(self, checkpoint: Path) -> None:
        """Raise if the files of a checkpoint must not be loaded."""

    def check_publishing(self) -> None:
        """Raise if the run cannot be published in the end. Called while the trainer is created."""

    def publish_run(self) -> Any:
        """Publish the finished run and return its address."""
        raise NotImplementedError

    # For our trainers: private methods of the library that they call -------------------------------------------------

    def save_checkpoint_now(self) -> None:
        """Save a checkpoint between two steps, whatever the save strategy."""
        self._save_checkpoint(self.model, None)

    def update_best_checkpoint(self, metrics: dict[str, float]) -> None:
        """Record the current step as the best one if the metrics are better than all before."""
        self._determine_best_metric(metrics, None)

    def to_model_inputs(self, batch: Batch) -> dict[str, Any]:
        """Return the batch with its tensors on the device."""
        return self._prepare_inputs(batch)

    def track_upload(self, upload: "Future[str]") -> None:
        """Register a background upload, for which the library waits at the end of training."""
        self.push_in_progress = PushInProgress([upload])  # type: ignore[arg-type]

    def is_uploading(self) -> bool:
        """Return whether a background upload has not finished."""
        return self.push_in_progress is not None and not self.push_in_progress.is_done()

    def wait_for_upload(self) -> None:
        """Wait until the background upload has finished."""
        self._finish_current_push()

    # Overrides: the training loop -----------------------------------------------------------------------------------

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> Any:
        """Train, with `training_context` active."""
        # The library has no hook that runs when training fails, and reading threads must be stopped then, too.
        with self.training_context():
            return super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)

    def get_train_dataloader(self) -> StreamLoader:  # type: ignore[override]
        """Return `loader`."""
        # The library would build a DataLoader and let accelerate split it between the processes once more. Our batches
        # are made ahead by threads, and the plan of the epoch has already assigned them to processes.
        return self.loader

    def set_initial_training_values(self, args: Any, dataloader: Any) -> tuple[Any, ...]:
        """Return the library's seven numbers on the length of the run, corrected by `planned_length`."""
        # The library assumes that all epochs have as many steps as the first. Ours differ when a run resumes with
        # another batch size in the middle of an epoch.
        n_epochs, steps_per_epoch, *others, n_steps = super().set_initial_training_values(args, dataloader)
        n_epochs, n_steps = self.planned_length(steps_per_epoch) or (n_epochs, n_steps)
        return (n_epochs, steps_per_epoch, *others, n_steps)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Batch], num_batches: int, device: torch.device
    ) -> tuple[list[Batch], torch.Tensor | int | None]:
        """Return the micro-batches of one optimizer step, and the number that their losses are divided by."""
        # This is the one place between two steps that all processes reach together, before any of them needs the others
        # for a gradient: here they agree to stop. It is also where the library's loop reads data.
        return super().get_batch_samples(iter(self.read_step(epoch_iterator, num_batches)), num_batches, device)

    def _get_num_items_in_batch(self, batch_samples: list[Batch], device: torch.device) -> torch.Tensor | int | None:
        # The library counts labels that differ from -100, and waits for the copy of the number to the GPU.
        return self.n_labels_of_step(batch_samples, device)

    def _prepare_input(self, data: Any) -> Any:
        # The library copies to the device and waits. From page-locked memory no wait is needed; what is already on the
        # device, the library leaves as it is.
        return super()._prepare_input(copy_to(self.args.device, data) if isinstance(data, torch.Tensor) else data)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """Return the loss of a training batch, with the model's outputs if `return_outputs`."""
        # The library discards the outputs of training batches, and with them the loss of each objective.
        self.before_forward()
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        loss = self.process_loss(loss, outputs)
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: torch.nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Run forward and backward pass of a micro-batch and return its `reported_loss`."""
        # The library can leave NaN out of its running mean (`logging_nan_inf_filter`), but then it waits for the GPU
        # after each batch. Our settings turn that off, and one NaN would spoil the mean.
        return self.reported_loss(super().training_step(model, inputs, num_items_in_batch))

    def _get_grad_norm(self, model: torch.nn.Module, grad_norm: Any = None) -> Any:
        # The only call between clipping and the optimizer step that receives the gradient norm, which is the same on
        # all processes: a step can be skipped here. (The callback `on_pre_optimizer_step` does not receive it.)
        return self.process_gradient_norm(super()._get_grad_norm(model, grad_norm))  # type: ignore[no-untyped-call]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log values after `complete_log` has changed them."""
        # The library knows one loss, and callbacks may not add values to a line before trackers receive it.
        self.complete_log(logs)
        super().log(logs, start_time)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create the optimizer: of `make_optimizer`, or the library's."""
        # The library knows optimizers by name, and Muon is not among them.
        if self.optimizer is None:
            self.optimizer = self.make_optimizer(model or self.model)
        return super().create_optimizer(model)

    def get_decay_parameter_names(self, model: torch.nn.Module) -> list[str]:
        """Return the names of the weights that decay: those of linear layers."""
        # The library decays all weights but norms and biases: also embedding tables, of which a step sees few rows.
        # Without decay the groups stay as they are, because optimizer states of earlier checkpoints have their order.
        names = super().get_decay_parameter_names(model)
        if not self.args.weight_decay:
            return names
        matrices = matrix_names(model)
        return [name for name in names if name in matrices]

    def create_scheduler(self, num_training_steps: int, optimizer: torch.optim.Optimizer | None = None) -> LRScheduler:
        """Create the learning rate schedule: of `learning_rate_factor`, or the library's over `rescaled_steps`."""
        # The library's schedules depend on the step number only. When the batch size changes, the schedule must
        # continue by cells seen; and no schedule of the library steps down after each epoch.
        if self.lr_scheduler is not None:
            return self.lr_scheduler
        if factor := self.learning_rate_factor(num_training_steps):
            optimizer = optimizer or self.optimizer
            assert optimizer is not None, "the library creates the optimizer before the scheduler"
            self.lr_scheduler = LambdaLR(optimizer, factor)
            self._created_lr_scheduler = True  # so that a second call of `train` creates a new one
            return self.lr_scheduler
        rescale = self.rescaled_steps()
        n_steps = num_training_steps if rescale is None else math.ceil(rescale(num_training_steps))
        # The library passes the arguments as they are; some of ours are shares of the run.
        requested, self.args.lr_scheduler_kwargs = self.args.lr_scheduler_kwargs, self.scheduler_arguments(n_steps)
        try:
            scheduler = super().create_scheduler(n_steps, optimizer)
        finally:
            self.args.lr_scheduler_kwargs = requested
        if rescale is not None and isinstance(scheduler, LambdaLR):  # all but those that react to the loss
            scheduler.lr_lambdas = [_compose(factor, rescale) for factor in scheduler.lr_lambdas]
        return scheduler

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Validate on the stream, log the metrics and return them; the arguments but the prefix have no effect."""
        # The library gathers the predictions of all cells and reads from a data set; we sum losses over a stream.
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in self.validation_metrics().items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # Overrides: saving ----------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        # The library writes into the final folder, so a run that is killed meanwhile leaves a checkpoint that looks
        # complete. `write_checkpoint` passes a staging folder instead. There the library also finds no older
        # checkpoints, so it deletes none: `prune` does, after the new one is safe.
        save = partial(super()._save_checkpoint, model, trial)

        def write_files(root: Path | None) -> None:
            self._checkpoint_root = root
            try:
                save()
            finally:
                self._checkpoint_root = None

        self.write_checkpoint(write_files)

    def _get_output_dir(self, trial: Any) -> str:
        # Redirects `_save_checkpoint` to the staging folder.
        return str(self._checkpoint_root or super()._get_output_dir(trial))

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        # The library writes the weights at once.
        if self.write_later is not None and self.args.should_save:
            state = self.model.state_dict()
            # Unlike weights, buffers change in the next forward pass, for example the statistics of a batch norm.
            state |= {name: buffer.clone() for name, buffer in self.model.named_buffers() if name in state}
            self.write_later(state, partial(self._save_now, output_dir))
        else:
            self._save_now(output_dir, state_dict)

    def _save_now(self, output_dir: str | None, state_dict: Any) -> None:
        # torch gives a sharded model a generated class (`FSDPScGPTForPreTraining`). `save_pretrained` would write that
        # name to config.json and look for the source code of the generated class.
        sharded_class, self.model.__class__ = type(self.model), self._model_class
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__ = sharded_class
        # The library pickles the training arguments. Loading a pickle can run code, so no folder of ours contains one;
        # settings.yaml holds the arguments.
        if self.args.should_save:
            (Path(output_dir or str(self.args.output_dir)) / TRAINING_ARGS_NAME).unlink(missing_ok=True)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # The library writes the state of the optimizer at once.
        if self.write_later is None or not self.args.should_save:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        folder, optimizer, scheduler = Path(output_dir), self.optimizer, self.lr_scheduler
        assert optimizer is not None, "a checkpoint is saved during training"
        assert scheduler is not None, "it is created with the optimizer"
        self.write_later(optimizer.state_dict(), lambda state: torch.save(state, folder / OPTIMIZER_NAME))
        torch.save(scheduler.state_dict(), folder / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        # The library calls this on every process while a checkpoint is written; most other methods of saving run on
        # the first process only.
        super()._save_rng_state(output_dir)
        self.save_process_state(Path(output_dir))

    # Overrides: loading ---------------------------------------------------------------------------------------------

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        # The library raises a RuntimeError that lists tensors, without the checkpoint and without what to do.
        with translate_model_errors(resume_from_checkpoint):
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        self.restore_weights(Path(resume_from_checkpoint))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        # Damaged files raise anything, from pickle errors to KeyErrors, without the name of the checkpoint.
        with translate_load_errors(checkpoint) if checkpoint else nullcontext():
            super()._load_optimizer_and_scheduler(checkpoint)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # The library fails if the number of processes has changed: there is no file for the new ones.
        if checkpoint is not None:
            self.restore_process_state(Path(checkpoint), partial(super()._load_rng_state, checkpoint))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # The library logs a warning about missing weights and trains on with random ones.
        require_all_weights(load_result)

    def _load_best_model(self) -> None:
        # The library loads whatever is in the folder now.
        self.check_checkpoint(Path(str(self.state.best_model_checkpoint)))
        super()._load_best_model()

    # Overrides: the Hub ---------------------------------------------------------------------------------------------

    def create_model_card(self, *arguments: Any, **keywords: Any) -> None:
        """Do nothing: scgpt_hf.publishing writes README.md, and the library's draft would replace it."""

    def init_hf_repo(self, *arguments: Any, **keywords: Any) -> None:
        """Check that the run can be published."""
        # The library creates the repository at once. We check access and names, and create it with the first upload.
        self.push_in_progress = None
        if self.is_world_process_zero():
            self.check_publishing()

    def push_to_hub(self, *arguments: Any, **keywords: Any) -> Any:
        """Publish the finished run and return its address; None on all processes but the first."""
        # The library uploads the output folder, pickles included, without the code that the model needs to load.
        if not self.is_world_process_zero():
            return None
        self.wait_for_upload()
        return self.publish_run()

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        # The library uploads here, when the checkpoint is still in the staging folder. `ScGPTTrainer` publishes it
        # after `write_checkpoint`.
        pass


def copy_to(device: torch.device, tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor on the device. If it is in page-locked memory, the host does not wait for the copy."""
    return tensor.to(device, non_blocking=tensor.is_pinned())


def _compose(factor: Callable[[Any], float], rescale: Callable[[int], float]) -> Callable[[int], float]:
    return lambda step: factor(rescale(step))


class _NoDataset(torch.utils.data.IterableDataset[Batch]):
    """Placeholder: the library requires a data set if `eval_strategy` is set, but `evaluate` reads a stream."""

    def __iter__(self) -> Iterator[Batch]:
        raise AssertionError("LibraryTrainer.evaluate does not read a data set")
