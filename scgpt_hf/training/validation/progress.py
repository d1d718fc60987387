"""Show a run on the terminal: a progress bar with the time that remains, and one line for each step that is logged.

The library prints the values of a step as a dictionary of about 300 characters. `metrics.jsonl` and trackers receive
all of them; these lines show what a person reads. Without a terminal there is no bar.
"""

from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

_WIDTH = 80
# Metrics of a validation that are not errors of the model: they are shown in another place, or in the files only.
_BASELINES = {"gene_mean_mse": "gene mean", "constant_mse": "constant"}
_NOT_SHOWN = {"loss", "cells", "seconds", "tie_floor_mse", "variance_explained", *_BASELINES}


class TerminalProgress(TrainerCallback):
    """Shows a progress bar and one line for each logged step; replaces the library's callbacks that do so."""

    def __init__(self) -> None:
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open the bar, on a terminal only."""
        if state.is_world_process_zero:
            self.bar = tqdm(
                total=state.max_steps,
                initial=state.global_step,
                unit="step",
                dynamic_ncols=True,
                disable=True if args.disable_tqdm else None,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the line of a step or of a validation."""
        if state.is_world_process_zero and logs and (line := format_log(state.global_step, logs)):
            tqdm.write(line)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the bar."""
        if self.bar is not None:
            self.bar.close()
            self.bar = None


def format_log(step: int, logs: dict[str, Any]) -> str:
    """Return the text of what is logged at a step; empty for the library's totals at the end of a run.

    Args:
        step: optimizer steps so far.
        logs: the values, as in `metrics.jsonl`. Those of a validation start with `eval_`.

    Example:
        >>> format_log(50, {"loss": 211.2, "gep": 104.75, "learning_rate": 0.001, "cells_per_second": 85.3})
        'step 50  loss 211.2  gep 104.8  lr 0.001  85 cells/s'
        >>> format_log(50, {"eval_loss": 90.0, "eval_gep_mse": 90.0, "eval_constant_mse": 214.0})
        'step 50  validation: gep_mse 90 (constant 214)'
        >>> format_log(7, {"eval_loss": 0.94, "eval_pearson_delta": 0.5})
        'step 7  validation: loss 0.94  pearson_delta 0.5'
    """
    if any(name.startswith("eval_") for name in logs):
        metrics = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
        return _format_validation(step, metrics)
    if "loss" not in logs:
        return ""
    others = {"loss", "grad_norm", "learning_rate", "cells_per_second", "tokens_per_second", "waiting_share", "epoch"}
    parts = [f"step {step:,}", f"loss {logs['loss']:.4g}"]
    parts += [f"{name} {value:.4g}" for name, value in logs.items() if name not in others and _is_number(value)]
    if "learning_rate" in logs:
        parts.append(f"lr {logs['learning_rate']:.2g}")
    if "cells_per_second" in logs:
        parts.append(f"{logs['cells_per_second']:,.0f} cells/s")
    return _wrap(parts)


def _format_validation(step: int, metrics: dict[str, Any]) -> str:
    """Return the errors of the model, with those of the baselines on the same masked positions in parentheses."""
    shown = {name: value for name, value in metrics.items() if name not in _NOT_SHOWN and _is_number(value)}
    errors = [f"{name} {value:.4g}" for name, value in shown.items() if name.endswith("_mse")]
    others = [f"{name} {value:.4g}" for name, value in shown.items() if not name.endswith("_mse")]
    if "loss" in metrics and not errors:
        others.insert(0, f"loss {metrics['loss']:.4g}")
    baselines = [f"{label} {metrics[name]:.4g}" for name, label in _BASELINES.items() if name in metrics]
    if errors and baselines:  # they are comparable with the squared errors only, not with what follows
        errors[-1] += f" ({', '.join(baselines)})"
    first, *rest = errors + others or [""]  # a log without numbers must not end the run
    return _wrap([f"step {step:,}", f"validation: {first}", *rest])


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _wrap(parts: list[str]) -> str:
    """Return the parts side by side, on as few lines as fit the width of a terminal."""
    lines = [parts[0]]
    for part in parts[1:]:
        longer = f"{lines[-1]}  {part}"
        lines = [*lines[:-1], longer] if len(longer) <= _WIDTH else [*lines, f"    {part}"]
    return "\n".join(lines)
