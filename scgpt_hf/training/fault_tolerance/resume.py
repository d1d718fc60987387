"""Whether a run can go on from a checkpoint, looked at before anything of it is used or anything is written.

That its files are what was written is checked by `checkpoints.py`. Here is what they must hold, and which run they are
of: a checkpoint, or a split.json, may have been made or changed by somebody else.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import TrainerState
from transformers.trainer import TRAINER_STATE_NAME

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.training.fault_tolerance.checkpoints import CheckpointError, manifest_of

# What a checkpoint is incomplete without: the library would go on from the rest, with other numbers than before.
_NEEDED = ("model*.safetensors", "optimizer*", "scheduler.pt", TRAINER_STATE_NAME)


_NESTED = {"steps", "tokens"}  # parts of a run's record that are compared by what they hold


@contextmanager
def translate_load_errors(checkpoint: Path) -> Iterator[None]:
    """Turn what torch, pickle and the library raise on files that do not hold what they should into our error.

    Raises:
        CheckpointError: naming the checkpoint.
    """
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # they raise anything; the cause is kept
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{checkpoint} does not hold what a run needs to go on: {said}; remove it, and "
            "--resume_from_checkpoint latest finds the one before it"
        ) from error


def require_resumable(checkpoint: Path) -> None:
    """Raise unless a checkpoint holds all that exact resuming needs, and its parts are of one step.

    Raises:
        CheckpointError: naming what is missing or differs.
    """
    manifest = manifest_of(checkpoint)
    ranks = range(manifest.world_size)
    states = ["rng_state.pth"] if manifest.world_size == 1 else (f"rng_state_{index}.pth" for index in ranks)
    with translate_load_errors(checkpoint):
        for pattern in (*_NEEDED, *states):
            if not any(checkpoint.glob(pattern)):
                raise CheckpointError(f"{checkpoint} lacks {pattern}; it was not written by a pretraining run")
        for index in ranks:
            read_window(checkpoint / f"window_{index}.json")
        state = TrainerState.load_from_json(str(checkpoint / TRAINER_STATE_NAME))
        if state.global_step != manifest.step or not all(line["step"] <= manifest.step for line in state.log_history):
            raise CheckpointError(f"{checkpoint} is of step {manifest.step:,}, but its {TRAINER_STATE_NAME} is not")


def read_window(path: Path) -> tuple[dict[str, float], float]:
    """Return what one process had summed for the log: shares of the losses by name, and the number of steps.

    Raises:
        ValueError: the file does not hold that.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    return {str(name): float(share) for name, share in content["sums"].items()}, float(content["n_good"])


def require_same_cells(donors: Mapping[str, list[str]], parts: Mapping[str, Int64Array], obs: pd.Series) -> None:
    """Raise unless the cells of each part are there, and are of the donors they were of when the run began.

    Args:
        donors: of each part, as recorded.
        parts: cell ids of each part, as recorded.
        obs: the donor of each cell as the data now say, index = cell ids. Shape (cells,).

    Raises:
        ValueError: the data have changed, or are other ones.
    """
    for part, cell_ids in parts.items():
        if len(absent := np.setdiff1d(cell_ids, obs.index)):
            raise ValueError(
                f"{len(absent):,} of the {len(cell_ids):,} cells of {part!r} are not in the data any more, e.g. "
                f"{absent[:5].tolist()}; resume with the data that the run began with"
            )
        found = sorted(obs.loc[pd.Index(cell_ids)].astype(str).unique())
        if found != sorted(donors[part]):
            raise ValueError(
                f"the cells of {part!r} were of the donors {donors[part][:5]} … when the run began and are of "
                f"{found[:5]} … now; resume with the data that it began with, files in the same order"
            )


def difference(recorded: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return what of a run's record differs now, as it was and as it is: data, order, masks or tokens.

    Where the data lie may change. Records of before tokens were recorded do not tell; those are not compared.
    """

    def comparable(record: Mapping[str, Any]) -> dict[str, Any]:
        flat = {name: value for name, value in record.items() if name not in {"uri", "genes", "domains", *_NESTED}}
        if "paths" in flat:  # the files may have moved, but their order gives the cells their ids
            flat["paths"] = [Path(path).name for path in flat["paths"]]
        return {**flat, **record.get("steps", {}), **(record["tokens"] if "tokens" in recorded else {})}

    then, new = comparable(recorded), comparable(now)
    return {name: (then.get(name), new[name]) for name in new if then.get(name) != new[name]}
