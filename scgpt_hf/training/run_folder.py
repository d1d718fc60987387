"""The run folder: who may write into it, and how its files are written so that a crash leaves no incomplete one."""

import errno
import json
import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.locking import exclusive
from scgpt_hf.cells.schedule.run import RunSchedule
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.output import require_writable_folder
from scgpt_hf.publishing.record import read_metrics
from scgpt_hf.training.fault_tolerance.checkpoints import (
    CheckpointError,
    checkpoints_in,
    newest_valid,
    verify,
)

logger = logging.getLogger(__name__)

METRICS, DROPPED, SPLIT, SETTINGS, SUMMARY, BEST_MODEL, CARD = (
    "metrics.jsonl",
    "metrics.dropped.jsonl",
    "split.json",
    "settings.yaml",
    "summary.json",
    "best_model",
    "README.md",
)


def resolve_checkpoint(folder: Path, resume_from_checkpoint: str | None) -> str | None:
    """Return the checkpoint that a run resumes from, or None for a new run in an empty folder.

    Args:
        folder: the run folder.
        resume_from_checkpoint: folder of a checkpoint; "true" or "latest" for the newest valid one in `folder`; "auto"
            for that one, or a new run if there is none yet; None for a new run.

    Raises:
        FileExistsError: the run is new, and the folder is not empty, or a file. With "auto", a run that was stopped
            before its first checkpoint starts again, and replaces its files.
        FileNotFoundError: the newest checkpoint is requested, and there is no valid one.
        ValueError: the named checkpoint belongs to another run, or is damaged.
    """
    if resume_from_checkpoint is None:
        require_new_folder(folder, "--output_dir")
        return None
    if resume_from_checkpoint.lower() == "auto" and not checkpoints_in(folder):
        if not (folder / SPLIT).is_file():  # the first file of a run
            require_new_folder(folder, "--output_dir")
        return None
    if resume_from_checkpoint.lower() in {"true", "latest", "auto"}:
        return str(newest_valid(folder))
    checkpoint = Path(resume_from_checkpoint)
    if checkpoint.resolve().parent != folder.resolve():
        raise ValueError(
            f"{checkpoint} is not a checkpoint of the run in {folder}; set --output_dir to the folder of its run"
        )
    try:
        verify(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --resume_from_checkpoint latest finds the newest valid one") from error
    return resume_from_checkpoint


def require_new_folder(folder: Path, option: str) -> None:
    """Raise unless a run folder is absent or empty.

    Args:
        folder: the run folder.
        option: the option of the command line that names it.

    Raises:
        FileExistsError: it is a file, or not empty. The message recommends removing it only if it holds a run.
        OSError: nothing can be written there.
    """
    advice = f"name a new folder with {option}"
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, not a run folder; {advice}")
    require_writable_folder(folder)
    if not folder.exists():
        return
    names = {path.name for path in folder.iterdir()}
    if checkpoints_in(folder) and option == "--output_dir":
        raise FileExistsError(
            f"{folder} holds an earlier run; resume it with --resume_from_checkpoint latest, or {advice}"
        )
    if SPLIT in names:
        reason = "it has no checkpoint" if option == "--output_dir" else "it cannot be resumed"
        raise FileExistsError(f"{folder} holds an earlier run; {reason}; remove it, or {advice}")
    if names:
        raise FileExistsError(f"{folder} is not empty and holds no run, but e.g. {sorted(names)[:3]}; {advice}")


def list_results(folder: Path) -> str:
    """Return the text at the end of a run: its files that exist, the most useful ones first."""
    candidates = (f"{BEST_MODEL}/", "baselines/", "report.html", CARD, METRICS, SUMMARY, SPLIT, "loss.png", "umap.png")
    return f"Everything is in {folder}: {' '.join(name for name in candidates if (folder / name).exists())}"


@contextmanager
def own_run_folder(folder: Path) -> Iterator[None]:
    """Keep other runs from writing to a run folder, on the first process of a run.

    Two runs that start at the same time both find the folder empty, and would write their checkpoints over each other.

    Raises:
        FileExistsError: another run is writing to the folder.
    """
    with exclusive(folder) if os.environ.get("RANK", "0") == "0" else nullcontext():
        yield


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise unless the disk has enough free space.

    Args:
        folder: where files will be written. It does not have to exist yet.
        n_bytes: size of the files.

    Raises:
        OSError: the free space is too small.
    """
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the run needs {n_bytes / 1e9:,.2f} GB in {folder}, {free / 1e9:,.2f} GB are free; free some space, "
            "choose another --output_dir or keep fewer checkpoints (--save_total_limit)",
        )


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as JSON, atomically.

    Raises:
        ValueError: the content holds a NaN or an infinity, which JSON does not have.
    """
    write_atomically(path, json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")


def save_best_model(trainer: Trainer, folder: Path) -> None:
    """Write the best model and its processor to `folder/best_model`, atomically. All processes have to call it."""
    temporary, old = folder / f"{BEST_MODEL}.tmp", folder / f"{BEST_MODEL}.old"
    if trainer.is_world_process_zero():
        shutil.rmtree(temporary, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    # `_internal_call` keeps the library from pushing to the Hub at this point.
    trainer.save_model(str(temporary), _internal_call=True)
    if trainer.is_world_process_zero():
        # A pickle, which nobody should have to load. settings.yaml has the same content.
        (temporary / "training_args.bin").unlink(missing_ok=True)
        if (folder / BEST_MODEL).exists():
            os.replace(folder / BEST_MODEL, old)
        os.replace(temporary, folder / BEST_MODEL)
        shutil.rmtree(old, ignore_errors=True)


def unsharded_model(trainer: Trainer, folder: Path) -> ScGPTForPreTraining:
    """Return the best model for use by a single process.

    A sharded model can only run on all processes together, so it is loaded from `folder/best_model` instead.
    """
    if not trainer.is_fsdp_enabled:
        return cast(ScGPTForPreTraining, trainer.model)
    model: torch.nn.Module = ScGPTForPreTraining.from_pretrained(folder / BEST_MODEL)
    return cast(ScGPTForPreTraining, model.to(trainer.args.device))


def finished_summary(folder: Path, schedule: RunSchedule) -> dict[str, Any] | None:
    """Return the summary of a finished run, or None if the run is not finished.

    A run is finished when it has done all steps of the schedule and has written its model, its summary and its card.
    The card is the last file of a run.
    """
    try:
        summary = json.loads((folder / SUMMARY).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    steps = summary.get("steps") if isinstance(summary, dict) else None
    if not isinstance(steps, int) or steps < schedule.n_steps:
        return None
    return summary if (folder / BEST_MODEL).is_dir() and (folder / CARD).is_file() else None


class MetricsFile(TrainerCallback):
    """Write the log to metrics.jsonl, with the seconds of training so far. Earlier sessions of the run count too.

    A resumed run first rewrites the file with the lines that its checkpoint has. The others belong to steps that are
    trained again, and move to metrics.dropped.jsonl.
    """

    def __init__(self, folder: Path) -> None:
        """Name the run folder."""
        self.path = folder / METRICS
        self.earlier_s = self.started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Restore the file to the state of the checkpoint that training starts from."""
        if state.is_world_process_zero and self.path.exists():
            known = [_line(line) for line in state.log_history]
            if dropped := [line for line in map(_line, read_metrics(self.path)) if line not in set(known)]:
                with self.path.with_name(DROPPED).open("a", encoding="utf-8") as file:
                    file.writelines(dropped)
            write_atomically(self.path, "".join(known))
        self.earlier_s = state.log_history[-1].get("seconds", 0.0) if state.log_history else 0.0
        self.started = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append one line to the file, and add its seconds to the log in the trainer's state."""
        # The state is part of each checkpoint, so a resumed run continues the count of seconds.
        state.log_history[-1]["seconds"] = round(self.earlier_s + time.perf_counter() - self.started, 1)
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


class OnTrainBegin(TrainerCallback):
    """Call a function when training starts.

    At that point model and optimizer exist and no step has been done. Everything that can reject a run has passed, so
    this is the moment to write the first files of the run folder.
    """

    def __init__(self, function: Callable[[], object]) -> None:
        """Store the function."""
        self.function = function

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Call it."""
        self.function()


def _line(logged: dict[str, Any]) -> str:
    """Return a line of the log as it is written: the step first."""
    return json.dumps({"step": logged["step"], **logged}) + "\n"
