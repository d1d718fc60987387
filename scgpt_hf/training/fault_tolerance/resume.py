"""Check that a run can resume from a checkpoint, before anything is loaded from it and before anything is written.

`checkpoints.py` verifies that the files of a checkpoint are those that were written. This module verifies what they
contain and that they belong to this run, because a checkpoint or a split.json may have been edited, or copied from
another run.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from safetensors import SafetensorError
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.missing import number_texts
from scgpt_hf.cells.obs import are_among, take_cells
from scgpt_hf.training.fault_tolerance.checkpoints import CheckpointError, manifest_of
from scgpt_hf.training.fault_tolerance.losses import load_losses, losses_path

# Files that every checkpoint must have. If one is missing, `transformers.Trainer` resumes without it and trains on with
# a fresh optimizer or schedule.
_REQUIRED_FILES = ("model*.safetensors", "optimizer*", "scheduler.pt", TRAINER_STATE_NAME)

# Parts of a run's record that do not have to match: the same data may be stored elsewhere, and genes, domains and
# classes are read from the record.
_MAY_DIFFER = {"uri", "genes", "domains", "classes"}
# Parts of a run's record that are dictionaries, whose items are compared one by one.
_NESTED = ("steps", "tokens")


@contextmanager
def translate_load_errors(checkpoint: str | Path) -> Iterator[None]:
    """Raise one kind of error for everything that can go wrong while a checkpoint is loaded.

    Raises:
        CheckpointError: loading failed. The message names the checkpoint, and the cause is the original error.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # torch, pickle and json raise errors of any type on malformed files
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpoint} does not contain what a run needs to resume: {reason}. Delete it, and "
            "--resume_from_checkpoint latest uses the previous checkpoint"
        ) from error


@contextmanager
def translate_model_errors(checkpoint: str | Path) -> Iterator[None]:
    """Raise a readable error if the weights of a checkpoint do not fit the model.

    Raises:
        ValueError: shapes differ, or the file is not a safetensors file.
    """
    try:
        yield
    except (RuntimeError, SafetensorError) as error:
        raise ValueError(f"{checkpoint} does not fit the model of the settings: {error}") from error


def require_all_weights(load_result: Any) -> None:
    """Raise unless a checkpoint has exactly the weights of the model.

    Args:
        load_result: what `torch.nn.Module.load_state_dict` returns.

    Raises:
        ValueError: weights are missing or not part of the model.
    """
    if load_result.missing_keys or load_result.unexpected_keys:
        raise ValueError(
            f"the checkpoint does not fit the model of the settings: it lacks {load_result.missing_keys[:5]} and has "
            f"unknown {load_result.unexpected_keys[:5]}. Resume with the settings that the run was started with"
        )


def require_resumable(checkpoint: Path) -> None:
    """Raise unless a checkpoint has all files that exact resuming needs, all written at the same step.

    Raises:
        CheckpointError: a file is missing or malformed, or belongs to another step.
    """
    manifest = manifest_of(checkpoint)
    ranks = range(manifest.world_size)
    random_states = ["rng_state.pth"] if manifest.world_size == 1 else [f"rng_state_{rank}.pth" for rank in ranks]
    with translate_load_errors(checkpoint):
        for pattern in (*_REQUIRED_FILES, *random_states):
            if not any(checkpoint.glob(pattern)):
                raise CheckpointError(f"{checkpoint} lacks {pattern}; it was not written by a pretraining run")
        load_losses([losses_path(checkpoint, rank) for rank in ranks])
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step != manifest.step or not all(line["step"] <= manifest.step for line in state.log_history):
            raise CheckpointError(
                f"{checkpoint / TRAINER_STATE_NAME} is not of step {manifest.step:,}, which the checkpoint was saved at"
            )


def require_same_cells(donors: Mapping[str, list[str]], parts: Mapping[str, Int64Array], obs: pd.Series) -> None:
    """Raise unless all cells of a run still exist and belong to the donors that they belonged to.

    Cell ids are positions in the data. If the data change, the same id may mean a cell of another donor, and then
    validation donors would be trained on.

    Args:
        donors: donors of each part ("train", "validation"), as recorded when the run started.
        parts: cell ids of each part, as recorded.
        obs: current donor of each cell, index = cell ids. Shape (cells,).

    Raises:
        ValueError: cells are missing, or their donors differ.
    """
    for part, cell_ids in parts.items():
        if len(missing := cell_ids[~are_among(cell_ids, obs.index.to_numpy(np.int64))]):
            raise ValueError(
                f"{len(missing):,} of the {len(cell_ids):,} cells of {part!r} are not in the data any more, for "
                f"example {missing[:5].tolist()}. Resume with the data that the run was started with"
            )
        found = number_texts(take_cells(obs, cell_ids))[1]
        if found != sorted(donors[part]):
            raise ValueError(
                f"the cells of {part!r} belonged to the donors {donors[part][:5]} … when the run was started and "
                f"belong to {found[:5]} … now. Resume with the data that the run was started with, and list its files "
                "in the same order"
            )


def changed_values(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the values of a run's record that have changed, as (recorded value, current value) by name.

    A record describes the data, the order of the cells, the masks and the tokens. Moving the data elsewhere is no
    change.

    Args:
        recorded: the record when the run was started.
        now: the record for the current settings.
    """

    def flatten(record: Mapping[str, Any]) -> dict[str, Any]:
        flat = {name: value for name, value in record.items() if name not in {*_MAY_DIFFER, *_NESTED}}
        if "paths" in flat:  # the files may have moved, but their order determines the cell ids
            flat["paths"] = [Path(path).name for path in flat["paths"]]
        for name in _NESTED:
            flat |= record.get(name, {})
        return flat

    before, after = flatten(recorded), flatten(now)
    return {name: (before.get(name), after[name]) for name in after if before.get(name) != after[name]}
