"""The run folder of a fine-tuning run: the same files for every task, and no checkpoints once the run is finished."""

import os
import shutil
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedModel

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.selection.splits import save_split
from scgpt_hf.cells.source import CellSource
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.finetuning.settings import FinetuneSettings
from scgpt_hf.training.run_folder import BEST_MODEL, SETTINGS, SPLIT, SUMMARY, write_json


def save_inputs(
    folder: Path,
    source: CellSource,
    parts: dict[str, Int64Array],
    donor_key: str | None,
    settings: FinetuneSettings,
    classes: dict[str, Any],
) -> None:
    """Write settings.yaml, and split.json with the cells of each part.

    Args:
        folder: the run folder; made if it does not exist.
        source: source of the cells.
        parts: "train" and "validation" → cell ids. Shape (cells of the part,).
        donor_key: obs column whose values were kept together, if any.
        settings: fine-tuning settings.
        classes: what the model distinguishes, by name, e.g. {"labels": ["B cell", "T cell"]}. It is recorded with the
            source.
    """
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True, width=120)
    write_atomically(folder / SETTINGS, str(text))
    obs = source.obs([] if donor_key is None else [donor_key])
    record = {**source.describe(), **classes}
    save_split(folder / SPLIT, parts, obs, seed=settings.seed, source=record, donor_key=donor_key)


def save_results(folder: Path, model: PreTrainedModel, processor: ScGPTProcessor, summary: dict[str, Any]) -> None:
    """Write best_model, atomically, and summary.json; then remove the checkpoints of the run."""
    temporary = folder / f"{BEST_MODEL}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    model.save_pretrained(temporary)
    processor.save_pretrained(temporary)
    os.replace(temporary, folder / BEST_MODEL)
    versions = {name: version(name) for name in ("scgpt_hf", "torch", "transformers")}
    write_json(folder / SUMMARY, {**summary, "versions": versions})
    for checkpoint in folder.glob("checkpoint*"):
        shutil.rmtree(checkpoint)
