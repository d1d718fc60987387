"""Settings that no run can have, refused before anything is read or written and before any number becomes a NaN.

What a setting means is said where it is used; what depends on the data is checked there.
"""

import math
from typing import Any

from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_utils import HubStrategy, SaveStrategy

# The smallest number that can be, and the one that all are below; a NaN is not.
_DATA: dict[str, tuple[float, float]] = {
    "max_cells": (1, 2**53),
    "min_genes": (0, 2**31),
    "min_gene_counts": (0, 2**53),
    "n_bins": (2, 2**31),
    "max_tokens": (2, 2**31),
    "chunks_per_window": (1, 2**31),
}
_TRAINING: dict[str, tuple[float, float]] = {
    "per_device_train_batch_size": (1, 2**31),
    "per_device_eval_batch_size": (1, 2**31),
    "gradient_accumulation_steps": (1, 2**31),
    "num_train_epochs": (0, 100_000),  # each is planned before the first begins
    "max_steps": (-1, 2**31),
    "learning_rate": (0, math.inf),
    "lr_decay_per_epoch": (0, math.inf),
    "weight_decay": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "adam_beta1": (0, 1),
    "adam_beta2": (0, 1),
    "adam_epsilon": (0, math.inf),
    "logging_steps": (0, 2**31),
    "eval_steps": (0, 2**31),
    "save_steps": (0, 2**31),
    "save_total_limit": (1, 2**31),
    "seed": (0, 2**32),
    "data_seed": (0, 2**32),
    "cpu_threads": (0, 1024),  # OpenMP crashes where the system refuses it a thread
    "ddp_timeout": (1, 10**9),
    "max_bad_steps": (1, 2**31),
}
# Source: the documentation of `torch.compile`, which itself names an unknown one in a traceback.
_COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")


def validate_data_settings(settings: Any) -> None:
    """Raise unless the numbers of `DataSettings` can be.

    Raises:
        ValueError: naming the setting, its range and what was found.
    """
    _require_in_range(settings, _DATA)


def validate_training_settings(args: TrainingArguments) -> None:
    """Raise for what the library would notice, if at all, once the run has begun.

    Raises:
        ValueError: naming the setting, what was found and what to do.
    """
    _require_in_range(args, _TRAINING)
    if args.save_strategy == SaveStrategy.STEPS and not args.save_steps:
        raise ValueError("expected save_steps > 0, found 0; for no checkpoints at all choose save_strategy 'no'")
    if args.label_smoothing_factor:
        raise ValueError("label_smoothing_factor is for classes, which pretraining does not predict; leave it out")
    known = get_available_reporting_integrations()  # type: ignore[no-untyped-call]
    if absent := set(args.report_to or []) - set(known):
        raise ValueError(
            f"report_to names {sorted(absent)}, which is not installed or unknown; install it, or leave it out"
        )
    if args.torch_compile_mode not in (None, *_COMPILE_MODES):
        raise ValueError(
            f"torch_compile_mode is {args.torch_compile_mode!r}; choose one of {', '.join(_COMPILE_MODES)}"
        )
    if args.average_tokens_across_devices is False:
        raise ValueError("average_tokens_across_devices=False would weigh the cells of a step differently by process")
    if args.hub_strategy in {"checkpoint", "all_checkpoints"}:
        strategy = HubStrategy(args.hub_strategy).value
        raise ValueError(f"hub_strategy {strategy!r} would publish optimiser states; choose 'every_save' or 'end'")


def _require_in_range(settings: Any, ranges: dict[str, tuple[float, float]]) -> None:
    """Raise unless each number lies in its range; what is not given need not."""
    for name, (low, high) in ranges.items():
        value = getattr(settings, name)
        if value is not None and not low <= value < high:
            below = "" if high == math.inf else f" and < {high:,}"
            raise ValueError(f"expected {name} finite, >= {low:,}{below}, found {value}")
