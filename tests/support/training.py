"""Small pretraining runs for tests: prepare a trainer from flags, and read what a run leaves behind."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from scgpt_hf.pretraining import prepare_run
from scgpt_hf.training.data_module import DataModule
from scgpt_hf.training.fault_tolerance.signals import StopSignal
from scgpt_hf.training.recipe import make_trainer
from scgpt_hf.training.selection import save_selection
from scgpt_hf.training.settings_parsing import parse_settings
from scgpt_hf.training.trainer import ScGPTTrainer
from scgpt_hf.training.validation.cell_types import make_cell_type_scorer

# A model and a data set that train in a few seconds on one CPU core.
TINY = [
    *("--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--intermediate_size", "16"),
    *("--min_gene_counts", "1", "--validation_fraction", "0.3", "--use_cpu", "true", "--disable_tqdm", "true"),
    *("--num_train_epochs", "2", "--logging_steps", "5", "--chunks_per_window", "1"),
    *("--loss_weights", '{"gep": 1.0, "gepc": 1.0}', "--cls_shortcut", "false", "--shortcut_steps", "0"),
]
# No checkpoints, no validation, every step logged.
QUIET = ("--save_strategy", "no", "--eval_strategy", "no", "--load_best_model_at_end", "false", "--logging_steps", "1")
# A checkpoint every 4 steps, a validation after each epoch, every step logged.
EVERY_4 = (
    *("--save_strategy", "steps", "--save_steps", "4", "--eval_strategy", "epoch", "--logging_steps", "1"),
    *("--load_best_model_at_end", "false", "--save_total_limit", "20"),
)


def prepare(
    census: Path | Sequence[Path], folder: Path, *flags: str, stop_signal: StopSignal | None = None
) -> tuple[ScGPTTrainer, DataModule, str | None]:
    """Set up a pretraining run as the command line does, up to the call of `train`.

    Args:
        census: the cells to train on: a folder, or files.
        folder: the run folder.
        flags: settings that differ from `TINY`.
        stop_signal: handles signals while the trainer runs; the command line passes one.

    Returns:
        The trainer, its data module, and the checkpoint that `train` must resume from, or None for a new run.
    """
    data = [str(path) for path in (census if isinstance(census, Sequence) else [census])]
    settings = parse_settings([*TINY, "--data", *data, "--output_dir", str(folder), *flags], "test")
    run = prepare_run(settings)
    cell_types = make_cell_type_scorer(run.source, run.selection, run.data_module, settings)
    trainer = make_trainer(run.data_module, run.model, settings.training, stop_signal, cell_types)
    if run.checkpoint is None and settings.training.process_index == 0:
        save_selection(run.selection, run.source, settings)
    return trainer, run.data_module, run.checkpoint


def assert_resumes_exactly(census: Path | Sequence[Path], folder: Path, *flags: str) -> ScGPTTrainer:
    """Train a run, resume a copy of it from its first checkpoint, compare all weights, and return the resumed run."""
    uninterrupted, *_ = prepare(census, folder / "run", *flags, *EVERY_4)
    uninterrupted.train()
    copy = shutil.copytree(folder / "run", folder / "copy")
    resume = (*QUIET, "--resume_from_checkpoint", str(copy / "checkpoint-4"))
    resumed, _, checkpoint = prepare(census, copy, *flags, *resume)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, value in weights_of(resumed).items():
        assert torch.equal(value, weights_of(uninterrupted)[name]), name
    return resumed


def weights_of(trainer: ScGPTTrainer) -> dict[str, torch.Tensor]:
    """Return copies of the model's weights by name."""
    return {name: weight.detach().clone() for name, weight in trainer.model.named_parameters()}


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the lines of metrics.jsonl without the values that depend on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "_per_second", "waiting_share", "_runtime")
    return [{k: v for k, v in line.items() if not k.endswith(clock)} for line in lines if "train_loss" not in line]
