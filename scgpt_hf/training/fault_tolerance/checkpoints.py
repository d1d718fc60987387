"""Write checkpoints that are either complete or absent, verify them, and choose the one to resume from.

A checkpoint folder is written in four steps, so that a crash at any moment leaves a valid state:

1. All processes write their files to `.unfinished/checkpoint-<step>` in the run folder.
2. The first process adds manifest.json: the size and SHA-256 of every file, and the step, processes and batch sizes.
3. It flushes all files to the disk (fsync), so that they survive a crash of the machine, too.
4. It renames the folder to `checkpoint-<step>`. A rename is atomic.

Steps 2 to 4 may run in a thread (`background`), with the large files of step 1.

What the files contain is decided by the trainer.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from scgpt_hf.cells.atomic import flush_to_disk
from scgpt_hf.training.fault_tolerance.ranks import Ranks

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_STAGING = ".unfinished"  # folder inside the run folder in which checkpoints are written
_SUPERSEDED = ".superseded"  # suffix of checkpoints later than the one that a run resumed from
_NAME = re.compile(r"checkpoint-(\d+)")
_MAX_NAME_LENGTH = 255  # of a file name, on the file systems of Linux and macOS


class CheckpointError(ValueError):
    """A checkpoint is damaged, incomplete or malformed. The message names the file."""


@dataclass(frozen=True)
class Manifest:
    """Metadata of a checkpoint, stored in its manifest.json.

    Attributes:
        step: number of steps done.
        world_size: number of processes that wrote it.
        history: (cells of a global step, number of steps), in the order trained; see `cells.schedule.run`.
    """

    step: int
    world_size: int
    history: list[tuple[int, int]]


def checkpoint_at(folder: Path, step: int) -> Path:
    """Return the path of the checkpoint of a step in a run folder."""
    return folder / f"checkpoint-{step}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, valid or not, sorted by step."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [path for _, path in sorted(found.items()) if path.is_dir()]


@contextmanager
def write_checkpoint(
    folder: Path, manifest: Manifest, ranks: Ranks, finish: Callable[[Callable[[], None]], object] | None = None
) -> Iterator[Path]:
    """Yield a staging folder to all processes; it becomes the checkpoint if the block ends without an error.

    Args:
        folder: the run folder.
        manifest: metadata of the checkpoint.
        ranks: the processes. If one fails, all of them raise.
        finish: receives, on the first process, the function that completes the checkpoint, and calls it later. That
            function raises the OSError below. By default, the checkpoint is completed at the end of the block.

    Raises:
        OSError: the checkpoint could not be written. Existing checkpoints are unchanged.

    Example:
        >>> with write_checkpoint(folder, Manifest(step=100, world_size=1, history=[(64, 100)]), ranks) as staging:
        ...     save_file(weights, staging / "model.safetensors")
    """
    target = checkpoint_at(folder, manifest.step)
    staging = folder / _STAGING / target.name
    problem: Exception | None = None
    try:
        if ranks.is_first:
            shutil.rmtree(staging, ignore_errors=True)
            staging.mkdir(parents=True)
        ranks.barrier()
        yield staging
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save reports a full disk as a RuntimeError
        problem = error
    # Every process must reach each of the three reductions below, whatever failed on it, or the others would hang.
    complete = partial(_complete, staging, target, manifest)
    if not ranks.all_reduce_max(problem is not None):
        if finish is not None:
            if ranks.is_first:
                finish(complete)
            return
        try:
            if ranks.is_first:
                complete()
        except OSError as error:
            problem = error
    if ranks.all_reduce_max(problem is not None):
        if ranks.is_first:
            discard_unfinished(folder)
        raise cannot_write(folder, manifest.step, problem) from problem


def cannot_write(folder: Path, step: int, problem: Exception | None) -> OSError:
    """Return the error of a checkpoint that could not be written.

    Args:
        folder: the run folder.
        step: step of the checkpoint.
        problem: what went wrong; None if that is known to another process.
    """
    target = checkpoint_at(folder, step)
    previous = next((path for path in reversed(checkpoints_in(folder)) if path != target), None)
    remedy = f"continue with --resume_from_checkpoint latest: {previous} is unchanged" if previous else "start again"
    return OSError(
        f"cannot write the checkpoint of step {step:,}: {problem or 'another process failed'}. Free disk space, then "
        f"{remedy}"
    )


def discard_unfinished(folder: Path) -> None:
    """Delete what is left of checkpoints that could not be written."""
    shutil.rmtree(folder / _STAGING, ignore_errors=True)


def verify(checkpoint: Path) -> Manifest:
    """Verify that every file of a checkpoint is the one that was written, and return the metadata.

    Raises:
        CheckpointError: the manifest is missing or malformed, or a file is missing, truncated or changed.
    """
    content = _read_manifest(checkpoint)
    for name, expected in content["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if (found := path.stat().st_size) != expected["bytes"]:
            raise CheckpointError(f"{path} has {found:,} bytes, expected {expected['bytes']:,}")
        if _hash(path) != expected["sha256"]:
            raise CheckpointError(f"{path} has changed since it was written: its SHA-256 differs from {MANIFEST}")
    return manifest_of(checkpoint)


def manifest_of(checkpoint: Path) -> Manifest:
    """Return the metadata of a checkpoint without verifying its files.

    Raises:
        CheckpointError: the manifest is missing or malformed.
    """
    content = _read_manifest(checkpoint)
    return Manifest(content["step"], content["world_size"], [(size, n) for size, n in content["history"]])


def newest_valid(folder: Path) -> Path:
    """Return the newest checkpoint of a run that `verify` accepts, and log a warning for each newer one.

    Raises:
        FileNotFoundError: no checkpoint is valid.
    """
    problems = []
    for checkpoint in reversed(checkpoints_in(folder)):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            logger.warning("cannot use %s, trying the previous checkpoint: %s", checkpoint.name, error)
            problems.append(str(error))
        else:
            return checkpoint
    found = f" ({'; '.join(problems)})" if problems else ""
    raise FileNotFoundError(f"{folder} has no checkpoint to resume from{found}; delete it and start again")


def prune(folder: Path, limit: int | None, best_step: int | None) -> None:
    """Delete the oldest checkpoints, so that at most `limit` remain.

    Args:
        folder: the run folder.
        limit: number of checkpoints to keep; None keeps all.
        best_step: step of the best checkpoint. It is kept, and so is the newest.
    """
    checkpoints = checkpoints_in(folder)
    if not limit or not checkpoints:
        return
    kept = {checkpoints[-1], checkpoint_at(folder, best_step or 0)}
    candidates = [checkpoint for checkpoint in checkpoints if checkpoint not in kept]
    for checkpoint in candidates[: max(len(checkpoints) - limit, 0)]:
        checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)


def supersede_later(folder: Path, step: int) -> None:
    """Rename the checkpoints later than a step that a run resumes from.

    The run will reach those steps again, perhaps with other settings. Until then, `newest_valid` must not choose them.
    They are renamed, not deleted, because you may want to go back to them.
    """
    discard_unfinished(folder)
    for checkpoint in checkpoints_in(folder):
        if int(checkpoint.name.split("-")[1]) > step:
            renamed = checkpoint.with_name(checkpoint.name + _SUPERSEDED)
            shutil.rmtree(renamed, ignore_errors=True)
            os.replace(checkpoint, renamed)
            logger.warning("renamed %s to %s: the run resumes from step %d", checkpoint, renamed.name, step)


def _complete(staging: Path, target: Path, manifest: Manifest) -> None:
    """Make a checkpoint of a staging folder with all files."""
    _write_manifest(staging, manifest)
    flush_to_disk([*staging.rglob("*"), staging])
    _replace(staging, target)


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    files = {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in paths
    }
    content = {"step": manifest.step, "world_size": manifest.world_size, "history": manifest.history, "files": files}
    (folder / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    """Return the content of manifest.json, after checking it: somebody may have edited the file."""
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {checkpoint.name} is incomplete, or another program wrote it")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        valid = all(isinstance(content[key], int) for key in ("step", "world_size")) and content["world_size"] > 0
        valid &= all(isinstance(n, int) for size, steps in content["history"] for n in (size, steps))
        valid &= all(size > 0 and steps >= 0 for size, steps in content["history"])
        valid &= sum(steps for _, steps in content["history"]) == content["step"]
        for name, file in content["files"].items():
            valid &= _is_inside(name) and isinstance(file["bytes"], int) and isinstance(file["sha256"], str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is malformed: {error!r}") from error
    if not valid:
        raise CheckpointError(
            f"{path} is malformed: expected a history whose steps add up to `step`, and names of files in the folder"
        )
    return dict(content)


def _is_inside(name: str) -> bool:
    """Return whether the name of a file cannot point out of its folder."""
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts:
        return False
    return max(map(len, path.parts)) <= _MAX_NAME_LENGTH


def _replace(staging: Path, target: Path) -> None:
    """Rename a finished checkpoint to its final name, and delete a checkpoint of that name."""
    replaced = staging.with_name(f"{target.name}.replaced")
    if os.path.lexists(target):  # not `exists`, which is False for a link to nowhere
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(target, replaced)
    os.replace(staging, target)
    flush_to_disk([target.parent])  # the new name is stored in the parent folder
    shutil.rmtree(staging.parent)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
