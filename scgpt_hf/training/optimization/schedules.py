"""The arguments of the learning rate schedules of transformers, with lengths as shares of the run."""

import logging
import math
from typing import Any

from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

logger = logging.getLogger(__name__)

DECAY_SHARE = 0.2
"""Share of the steps in which `warmup_stable_decay` lowers the learning rate. Source: Hägele et al. 2024,
arXiv:2405.18392, who find that longer decays gain little."""


def scheduler_arguments(args: TrainingArguments, n_steps: int) -> dict[str, Any] | None:
    """Return `lr_scheduler_kwargs` for a run of some length.

    For the schedule `warmup_stable_decay`, a `num_decay_steps` below 1 is a share of all steps, like `warmup_steps`;
    it is `DECAY_SHARE` by default.

    Args:
        args: schedule and arguments of the run.
        n_steps: number of steps of the run.

    Raises:
        ValueError: the number is not above 0.

    Example:
        >>> args = TrainingArguments(lr_scheduler_type="warmup_stable_decay")
        >>> scheduler_arguments(args, n_steps=1000)
        {'num_decay_steps': 200}
    """
    arguments: Any = args.lr_scheduler_kwargs
    if args.lr_scheduler_type != SchedulerType.WARMUP_STABLE_DECAY:
        return arguments  # type: ignore[no-any-return]
    arguments = {"num_decay_steps": DECAY_SHARE, **(arguments or {})}
    n_decay = arguments["num_decay_steps"]
    if not n_decay > 0:
        raise ValueError(f"expected num_decay_steps above 0, found {n_decay}")
    if n_decay < 1:
        arguments["num_decay_steps"] = math.ceil(n_decay * n_steps)
    return arguments  # type: ignore[no-any-return]


def warn_of_long_warmup(args: TrainingArguments, n_steps: int) -> None:
    """Warn of a run that ends before its learning rate has risen: a config for many cells, used on few.

    Args:
        args: warm-up of the run.
        n_steps: number of steps of the run.

    Example:
        >>> warn_of_long_warmup(TrainingArguments(warmup_steps=0.1), n_steps=1000)
    """
    if (n_warmup := args.get_warmup_steps(n_steps)) > n_steps:
        logger.warning(
            "the run has %s steps, but the learning rate rises for %s (--warmup_steps): such a model learns little; "
            "train longer (--num_train_epochs), or warm up for a share of the run, such as --warmup_steps 0.05",
            *(f"{n_steps:,}", f"{n_warmup:,}"),
        )
