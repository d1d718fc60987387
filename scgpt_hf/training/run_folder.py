"""The folder of a run: who may write into it, and how each file gets there whole."""

import errno
import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

METRICS, SPLIT, SETTINGS, SUMMARY, BEST_MODEL = (
    "metrics.jsonl",
    "split.json",
    "settings.yaml",
    "summary.json",
    "best_model",
)


def claim_run_folder(folder: Path, resume_from_checkpoint: str | None) -> str | None:
    """Return the checkpoint to resume from, or None for a new run.

    Args:
        folder: of the run.
        resume_from_checkpoint: a checkpoint's folder; "true" or "latest" for the newest in `folder`; None: a new run.

    Raises:
        FileExistsError: a new run, and the folder holds something.
        FileNotFoundError: a resumed run, and there is no such checkpoint.
    """
    if resume_from_checkpoint is None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            began = get_last_checkpoint(str(folder)) if folder.is_dir() else None  # type: ignore[no-untyped-call]
            remedy = "go on with it by --resume_from_checkpoint latest" if began else "it has no checkpoint; remove it"
            raise FileExistsError(f"{folder} holds an earlier run; {remedy}, or name a new folder with --output_dir")
        return None
    if resume_from_checkpoint.lower() in {"true", "latest"}:
        checkpoint = get_last_checkpoint(str(folder)) if folder.is_dir() else None  # type: ignore[no-untyped-call]
        if checkpoint is None:
            raise FileNotFoundError(f"{folder} holds no checkpoint to resume from; remove it and start anew")
        return str(checkpoint)
    if not (Path(resume_from_checkpoint) / "trainer_state.json").is_file():
        raise FileNotFoundError(f"{resume_from_checkpoint} is not a checkpoint: it has no trainer_state.json")
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
    """Return the lines of metrics.jsonl; a last one that a crash cut off is left out."""
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        last = [json.loads(line) for line in lines[-1:]]
    except json.JSONDecodeError:
        last = []
    return [json.loads(line) for line in lines[:-1]] + last


class MetricsFile(TrainerCallback):
    """Appends each line of the log to metrics.jsonl, with the seconds trained so far, earlier sessions included.

    A resumed run first drops the lines after its checkpoint.
    """

    def __init__(self, folder: Path) -> None:
        """Name the run's folder."""
        self.path = folder / METRICS
        self.earlier_s = self.started = 0.0

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep what was logged up to the step that training starts from."""
        if state.is_world_process_zero and self.path.exists():
            kept = [line for line in read_lines(self.path) if line["step"] <= state.global_step]
            write_whole(self.path, "".join(json.dumps(line) + "\n" for line in kept))
            self.earlier_s = kept[-1].get("seconds", 0.0) if kept else 0.0
        self.started = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Append one line."""
        if state.is_world_process_zero:
            seconds = round(self.earlier_s + time.perf_counter() - self.started, 1)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": state.global_step, **(logs or {}), "seconds": seconds}) + "\n")
