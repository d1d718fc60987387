"""Checkpoints that are whole or not there: written beside, hashed, flushed to the disk, then renamed.

Their content is the trainer's. Here is how they get onto the disk, how one knows that they are still what was written,
which one a run resumes from and which ones it may delete.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from safetensors import SafetensorError

from scgpt_hf.training.fault_tolerance.ranks import Ranks

logger = logging.getLogger(__name__)

MANIFEST = "manifest.json"
_UNFINISHED = ".unfinished"  # folder of the run in which checkpoints are written
_SET_ASIDE = ".set_aside"  # ending of checkpoints that the run went back behind
_NAME = re.compile(r"checkpoint-(\d+)")


class CheckpointError(ValueError):
    """A checkpoint is not what was written; the message names the file."""


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint says of itself.

    Attributes:
        step: steps done.
        world_size: processes that wrote it.
        history: (cells of a global step, number of steps), in the order they were trained; see `cells.schedule`.
    """

    step: int
    world_size: int
    history: list[tuple[int, int]]


def checkpoint_at(folder: Path, step: int) -> Path:
    """Return where the checkpoint of a step lies."""
    return folder / f"checkpoint-{step}"


def checkpoints_in(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, valid or not, the newest last."""
    found = {int(match[1]): path for path in folder.glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))}
    return [path for _, path in sorted(found.items()) if path.is_dir()]


@contextmanager
def written_whole(folder: Path, manifest: Manifest, ranks: Ranks) -> Iterator[Path]:
    """Give all processes the folder to write a checkpoint into; it takes its place when the block ends without error.

    Args:
        folder: of the run.
        manifest: of the checkpoint.
        ranks: the processes; all of them fail if one does.

    Raises:
        OSError: the checkpoint could not be written. What was there before is untouched.
    """
    target = checkpoint_at(folder, manifest.step)
    beside = folder / _UNFINISHED / target.name
    problem: Exception | None = None
    try:
        if ranks.is_first:
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
        ranks.all_reduce_max(0)
        yield beside
    except (OSError, RuntimeError, SafetensorError) as error:  # torch.save tells of a full disk by a RuntimeError
        problem = error
    if not ranks.all_reduce_max(problem is not None) and ranks.is_first:
        try:
            _write_manifest(beside, manifest)
            _flush([*beside.rglob("*"), beside])
            _take_place(beside, target)
        except OSError as error:
            problem = error
    if ranks.all_reduce_max(problem is not None):
        if ranks.is_first:
            shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
        earlier = next((path for path in reversed(checkpoints_in(folder)) if path != target), None)
        remedy = f"{earlier} is untouched: go on with --resume_from_checkpoint latest" if earlier else "start anew"
        raise OSError(
            f"the checkpoint of step {manifest.step:,} could not be written: {problem or 'another process failed'}; "
            f"make room, then {remedy}"
        ) from problem


def verify(checkpoint: Path) -> Manifest:
    """Return what a checkpoint says of itself, once every file of it is the one that was written.

    Raises:
        CheckpointError: no manifest, a malformed one, or a file that is missing, cut off or changed.
    """
    content = _read_manifest(checkpoint)
    for name, expected in content["files"].items():
        path = checkpoint / name
        if not path.is_file():
            raise CheckpointError(f"{path} is missing")
        if (found := path.stat().st_size) != expected["bytes"]:
            raise CheckpointError(f"{path} has {found:,} bytes, expected {expected['bytes']:,}")
        if _hash(path) != expected["sha256"]:
            raise CheckpointError(f"{path} is not what was written: its SHA-256 differs from the one in {MANIFEST}")
    return manifest_of(checkpoint)


def manifest_of(checkpoint: Path) -> Manifest:
    """Return what a checkpoint says of itself, its files unseen.

    Raises:
        CheckpointError: no manifest, or a malformed one.
    """
    content = _read_manifest(checkpoint)
    return Manifest(content["step"], content["world_size"], [(size, n) for size, n in content["history"]])


def newest_valid(folder: Path) -> Path:
    """Return the newest checkpoint of a run that is what was written; newer ones are named in a warning.

    Raises:
        FileNotFoundError: there is none.
    """
    problems = []
    for checkpoint in reversed(checkpoints_in(folder)):
        try:
            verify(checkpoint)
        except CheckpointError as error:
            logger.warning("%s cannot be used, looking for the one before it: %s", checkpoint.name, error)
            problems.append(str(error))
        else:
            return checkpoint
    found = f" ({'; '.join(problems)})" if problems else ""
    raise FileNotFoundError(f"{folder} holds no checkpoint to resume from{found}; remove it and start anew")


def prune(folder: Path, limit: int | None, best: int | None) -> None:
    """Delete the oldest checkpoints beyond `limit`, never the newest nor the one of step `best`."""
    checkpoints = checkpoints_in(folder)
    spared = {checkpoints[-1].name, checkpoint_at(folder, best or 0).name} if checkpoints else set()
    surplus = len(checkpoints) - limit if limit else 0
    for checkpoint in [path for path in checkpoints if path.name not in spared][: max(surplus, 0)]:
        checkpoint.unlink() if checkpoint.is_symlink() else shutil.rmtree(checkpoint)


def set_aside(folder: Path, step: int) -> None:
    """Rename the checkpoints after a step that a run goes on from: they are of a future that will not be."""
    shutil.rmtree(folder / _UNFINISHED, ignore_errors=True)
    for checkpoint in checkpoints_in(folder):
        if int(checkpoint.name.split("-")[1]) > step:
            beside = checkpoint.with_name(checkpoint.name + _SET_ASIDE)
            shutil.rmtree(beside, ignore_errors=True)
            os.replace(checkpoint, beside)
            logger.warning(
                "%s is newer than step %d, which the run goes on from: now %s", checkpoint, step, beside.name
            )


def _write_manifest(beside: Path, manifest: Manifest) -> None:
    paths = sorted(path for path in beside.rglob("*") if path.is_file())
    files = {
        path.relative_to(beside).as_posix(): {"bytes": path.stat().st_size, "sha256": _hash(path)} for path in paths
    }
    content = {"step": manifest.step, "world_size": manifest.world_size, "history": manifest.history, "files": files}
    (beside / MANIFEST).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def _read_manifest(checkpoint: Path) -> dict[str, Any]:
    path = checkpoint / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: {checkpoint.name} was not written whole, or not by this program")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        whole = all(isinstance(content[key], int) for key in ("step", "world_size")) and content["world_size"] > 0
        whole &= all(isinstance(n, int) for size, steps in content["history"] for n in (size, steps))
        whole &= all(size > 0 and steps >= 0 for size, steps in content["history"])
        whole &= sum(steps for _, steps in content["history"]) == content["step"]
        for name, file in content["files"].items():
            whole &= _is_inside(name) and isinstance(file["bytes"], int) and isinstance(file["sha256"], str)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is malformed: {error!r}") from error
    if not whole:
        raise CheckpointError(f"{path} is malformed: expected numbers of steps that add up, and files of the folder")
    return dict(content)


def _is_inside(name: str) -> bool:
    """Return whether a file's name cannot lead out of its folder."""
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and max(map(len, path.parts)) < 256


def _flush(paths: Iterable[Path]) -> None:
    """Have the disk, not only the system's memory, hold files and names in folders."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _take_place(beside: Path, target: Path) -> None:
    """Rename a finished checkpoint to its name; one of that name gives way."""
    replaced = beside.with_name(f"{target.name}.replaced")
    if os.path.lexists(target):  # a link that leads nowhere, too
        shutil.rmtree(replaced, ignore_errors=True)
        os.replace(target, replaced)
    os.replace(beside, target)
    _flush([target.parent])
    shutil.rmtree(beside.parent)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
