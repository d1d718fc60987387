"""What a run records of where its weights come from: the make-up of its cells, the recipe, the machine.

It goes into summary.json; how a card words it is in `card.py`.
"""

from typing import Any

import numpy as np
from transformers import Trainer

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.source import CellSource
from scgpt_hf.training.device import device_name


def composition_of(source: CellSource, parts: dict[str, Int64Array]) -> dict[str, dict[str, int]]:
    """Return the number of cells of each tissue, assay, disease and data set, as far as the source tells.

    Args:
        source: of the cells.
        parts: ids of the cells, by part; int64 (cells of the part,).
    """
    told = [column for column in ("tissue_general", "assay", "disease", "dataset_id") if column in source.columns]
    obs = source.obs(told).loc[np.concatenate(list(parts.values()))].astype(str)
    return {column: {str(value): int(n) for value, n in obs[column].value_counts().items()} for column in told}


def training_of(trainer: Trainer) -> dict[str, Any]:
    """Return recipe and machine of a training, under the names that summary.json has for them."""
    args: Any = trainer.args
    decay, precision = args.lr_decay_per_epoch, trainer.accelerator.mixed_precision
    return {
        "device": device_name(args.device),
        "processes": args.world_size,
        "precision": {"no": "fp32"}.get(precision, precision),
        "recipe": {
            "optimiser": str(getattr(args.optim, "value", args.optim)),
            "weight_decay": args.weight_decay,
            "clipped_at": args.max_grad_norm,
            "warmup": args.warmup_steps,
            "schedule": f"times {decay:g} after each epoch" if decay else str(args.lr_scheduler_type.value),
            "seed": args.seed,
        },
    }
