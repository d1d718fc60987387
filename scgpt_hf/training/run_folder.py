"""The folder of a run: who may write into it, and how each file gets there whole."""

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from scgpt_hf.training.fault_tolerance.checkpoints import CheckpointError, checkpoints_in, newest_valid, verify

METRICS, DROPPED, SPLIT, SETTINGS, SUMMARY, BEST_MODEL, CARD = (
    "metrics.jsonl",
    "metrics.dropped.jsonl",
    "split.json",
    "settings.yaml",
    "summary.json",
    "best_model",
    "README.md",
)


def claim_run_folder(folder: Path, resume_from_checkpoint: str | None) -> str | None:
    """Return the checkpoint to resume from, or None for a new run.

    Args:
        folder: of the run.
        resume_from_checkpoint: a checkpoint's folder; "true" or "latest" for the newest valid one in `folder`; None: a
            new run.

    Raises:
        FileExistsError: a new run, and the folder holds something.
        FileNotFoundError: the newest was asked for, and there is no valid checkpoint.
        ValueError: the checkpoint that was named is another run's, or not what was written.
    """
    if resume_from_checkpoint is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            began = folder.is_dir() and checkpoints_in(folder)
            remedy = "go on with it by --resume_from_checkpoint latest" if began else "it has no checkpoint; remove it"
            raise FileExistsError(f"{folder} holds an earlier run; {remedy}, or name a new folder with --output_dir")
        return None
    if resume_from_checkpoint.lower() in {"true", "latest"}:
        return str(newest_valid(folder))
    checkpoint = Path(resume_from_checkpoint)
    if checkpoint.resolve().parent != folder.resolve():
        raise ValueError(f"{checkpoint} is no checkpoint of the run in {folder}; name that run's with --output_dir")
    try:
        verify(checkpoint)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; --resume_from_checkpoint latest finds the newest valid one") from error
    return resume_from_checkpoint


def require_space(folder: Path, n_bytes: int) -> None:
    """Raise unless the disk under `folder` has room.

    Args:
        folder: that will be written to; it need not exist yet.
        n_bytes: to be written.

    Raises:
        OSError: too little room.
    """
    existing = next(parent for parent in (folder.resolve(), *folder.resolve().parents) if parent.exists())
    free = shutil.disk_usage(existing).free
    if free < n_bytes:
        raise OSError(
            errno.ENOSPC,
            f"the run needs {n_bytes / 1e9:,.2f} GB in {folder}, {free / 1e9:,.2f} GB are free; "
            "make room, choose another --output_dir or keep fewer checkpoints (--save_total_limit)",
        )


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and move it there, so that a crash leaves the old one."""
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a dictionary as JSON; see `write_whole`."""
    write_whole(path, json.dumps(content, indent=1, default=str, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl; a last one that a crash cut off is left out.

    Raises:
        ValueError: another line is no JSON object with a step; the message gives its number.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    read: list[dict[str, Any]] = []
    for number, text in enumerate(lines, start=1):
        try:
            line = json.loads(text)
            read.append({"step": line["step"], **line})
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            if number < len(lines):
                raise ValueError(
                    f"line {number} of {path} is no JSON object with a step: {text[:60]!r}; remove the line"
                ) from error
    return read


class MetricsFile(TrainerCallback):
    """Keeps metrics.jsonl as the log is, with the seconds trained so far, earlier sessions included.

    A resumed run writes anew what its checkpoint knows. Lines of steps that are trained again go to
    metrics.dropped.jsonl.
    """

    def __init__(self, folder: Path) -> None:
        """Name the run's folder."""
        self.path = folder / METRICS
        self.earlier_s = self.started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Write what was logged up to the checkpoint that training starts from."""
        if state.is_world_process_zero and self.path.exists():
            known = [_line(line) for line in state.log_history]
            if dropped := [line for line in map(_line, read_lines(self.path)) if line not in set(known)]:
                with self.path.with_name(DROPPED).open("a", encoding="utf-8") as file:
                    file.writelines(dropped)
            write_whole(self.path, "".join(known))
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
        """Append one line, to the file and with its seconds to the state that checkpoints keep."""
        state.log_history[-1]["seconds"] = round(self.earlier_s + time.perf_counter() - self.started, 1)
        if state.is_world_process_zero:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_line(state.log_history[-1]))


def _line(logged: dict[str, Any]) -> str:
    """Return a line of the log as it is written, its step first."""
    return json.dumps({"step": logged["step"], **logged}) + "\n"
