"""Summarize a run: `summary.json`, which model cards and reports are made of, and the text at the end of a run."""

import math
import platform
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer
from transformers.trainer_pt_utils import get_model_param_count

from scgpt_hf.publishing.record import RunRecord, read_metrics
from scgpt_hf.publishing.run_summary import EMBEDDING_SCORES, best_validation, error_rows, score_rows, value_unit
from scgpt_hf.training.data_module import DataModule
from scgpt_hf.training.run_folder import BEST_MODEL, METRICS, SUMMARY, list_results, write_json
from scgpt_hf.training.selection import composition_of, supervision_of
from scgpt_hf.training.trainer import ScGPTTrainer


class RunSummary(dict[str, Any]):
    """The content of summary.json of a run, as a dictionary, with the folder of the run.

    Attributes:
        folder: the run folder.

    Example:
        >>> run = pretrain("demo", num_train_epochs=3)  # doctest: +SKIP
        >>> run["train_cells"], run.model  # doctest: +SKIP
        (613, PosixPath('runs/demo/best_model'))
    """

    def __init__(self, values: dict[str, Any], folder: str | Path) -> None:
        super().__init__(values)
        self.folder = Path(folder)

    @property
    def model(self) -> Path:
        """The folder of the model with the lowest validation error, for `embed_anndata` and `load_model`."""
        return self.folder / BEST_MODEL


_PACKAGES = ("scgpt_hf", "torch", "transformers", "datasets", "accelerate", "tiledbsoma", "cellxgene-census")


def summarize(
    trainer: ScGPTTrainer, data_module: DataModule, baseline_scores: dict[str, dict[str, float]] | None = None
) -> dict[str, Any]:
    """Return the summary of a finished run, and write it to summary.json. Only the first process may call it.

    Args:
        trainer: has trained the run.
        data_module: the batches of the run.
        baseline_scores: baseline → scores on the labelled cells that validations scored the model on, if any.
    """
    args, parts, donors = trainer.args, data_module.selection.parts, data_module.selection.n_donors
    history = trainer.state.log_history
    rates = [line["cells_per_second"] for line in history if "cells_per_second" in line]
    summary = {
        "model_parameters": get_model_param_count(trainer.model),  # type: ignore[no-untyped-call]
        "train_cells": len(parts["train"]),
        "validation_cells": len(parts["validation"]),
        "train_donors": donors["train"],
        "validation_donors": donors["validation"],
        "genes": len(data_module.selection.genes),
        "steps": trainer.state.global_step,
        "epochs": trainer.state.epoch,
        "global_batch_size": data_module.first_plan.batch_size,
        "train_seconds": read_metrics(Path(args.output_dir) / METRICS)[-1]["seconds"],
        **training_of(trainer),
        "cells_per_second": round(float(np.median(rates)), 1) if rates else None,
        "versions": {name: version(name) for name in _PACKAGES},
        "input_style": data_module.processor.input_style,
        "baselines": asdict(trainer.baselines) if trainer.baselines else None,
        "best": best_validation(history, trainer.args.metric_for_best_model) or None,
        "baseline_scores": baseline_scores,
        "supervision": supervision_of(data_module.source, data_module.selection, data_module.supervise_by),
        "composition": composition_of(data_module.source, parts),
        "data": data_module.source.describe(),
    }
    write_json(Path(args.output_dir) / SUMMARY, summary)
    return summary


def training_of(trainer: Trainer) -> dict[str, Any]:
    """Return device and recipe of a training, under the names that they have in summary.json."""
    args: Any = trainer.args
    decay, precision = args.lr_decay_per_epoch, trainer.accelerator.mixed_precision
    return {
        "device": device_name(args.device),
        "processes": args.world_size,
        "precision": {"no": "fp32"}.get(precision, precision),
        "recipe": {
            "optimizer": str(getattr(args.optim, "value", args.optim)),
            "weight_decay": args.weight_decay,
            "clipped_at": args.max_grad_norm,
            "warmup": args.warmup_steps,
            "schedule": f"times {decay:g} after each epoch" if decay else str(args.lr_scheduler_type.value),
            "ema_decay": args.ema_decay,
            "seed": args.seed,
        },
    }


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the architecture and the number of threads of a CPU."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def format_summary(summary: dict[str, Any], folder: Path) -> str:
    """Return the text at the end of a run: what was trained, its validation errors beside the baselines, and the files.

    Args:
        summary: summary that `summarize` returns.
        folder: the run folder.
    """
    best, errors = summary["best"], error_rows(RunRecord(summary, SUMMARY))
    lines = [
        "Trained {model_parameters:,} parameters on {train_cells:,} cells of {train_donors} donors for "
        "{epochs:.3g} epochs ({steps:,} steps) in {train_seconds:.0f} s on {device}.".format(**summary),
    ]
    if best and summary["baselines"]:
        lines += [
            f"Best validation at step {best['step']:,}, "
            "{validation_cells:,} cells of {validation_donors} other donors, mean squared error in {unit}:".format(
                **summary, unit=value_unit(RunRecord(summary, SUMMARY))
            ),
            *[f"  {row.name:40} {row.value:8.2f}" for row in errors if row.value is not None],
            f"  {'share of the variance explained':40} {best.get('eval_variance_explained', math.nan):8.1%}",
        ]
    if rows := score_rows(RunRecord(summary, SUMMARY)):
        names = [name for name, _ in EMBEDDING_SCORES.values()]
        lines += ["Cell types of labelled validation cells:", f"  {'':24}" + "".join(f"{name:>14}" for name in names)]
        lines += [
            f"  {row.method:24}" + "".join(f"{'–' if one is None else f'{one:.3f}':>14}" for one in row.scores)
            for row in rows
        ]
    lines += [list_results(folder)]
    return "\n".join(lines)
