"""Plot the loss curves of a run from its `metrics.jsonl`: training losses, and the validation error with its baselines.

`publishing/record.py` reads the file; `plots.py` defines the palette and saves figures.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from scgpt_hf.cells.block import FloatArray
from scgpt_hf.publishing.record import read_metrics
from scgpt_hf.publishing.run_summary import EMBEDDING_SCORES
from scgpt_hf.reporting.page import Html, inline_svg
from scgpt_hf.reporting.plots import GREY, PALETTE, SMALL
from scgpt_hf.training.run_folder import METRICS

Curves = dict[str, tuple[FloatArray, FloatArray]]

# The names under which the trainer logs the losses of the objectives, in the order of the palette.
OBJECTIVES = ("gep", "gepc", "ecs", "cce", "dar", "gep_zero", "gepc_zero", "cls", "counts", "gen")
# Short names of the baselines; `publishing/run_summary.py` explains them.
BASELINES = {"eval_constant_mse": "constant", "eval_gene_mean_mse": "gene mean", "eval_tie_floor_mse": "tie floor"}
_LABEL_GAP = 0.085  # between the labels of two lines, as a share of the height of the axes


def plot_loss(
    metrics: Sequence[Mapping[str, Any]],
    panels: Collection[str] = ("training", "validation"),
    *,
    best_step: int | None = None,
) -> Figure:
    """Plot the loss curves of a run: training losses, and validation errors with their baselines.

    A panel without data is left out.

    Args:
        metrics: lines of metrics.jsonl, see `read_metrics`.
        panels: which of "training" and "validation".
        best_step: step whose model the run keeps; by default the one with the lowest `eval_loss`.

    Raises:
        ValueError: no line holds a loss.
    """
    training = _curves(metrics, {name: name for name in ("loss", *OBJECTIVES)})
    validation = _curves(metrics, {name: f"eval_{name}_mse" for name in ("gep", "gepc", "gen")})
    draw_validation = partial(_draw_validation, best_step=best_step)
    available: dict[str, tuple[Callable[..., None], Curves]] = {
        "training": (_draw_training, training),
        "validation": (draw_validation, validation),
    }
    shown = [(draw, curves) for panel, (draw, curves) in available.items() if panel in panels and curves]
    if not shown:
        raise ValueError(f"no line of {len(metrics):,} has a loss; expected keys such as 'loss' or 'eval_gep_mse'")
    figure = Figure(figsize=(3.7 * len(shown), 2.7), layout=ConstrainedLayoutEngine(w_pad=0.08))
    for axes, (draw, curves) in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        draw(axes, curves, metrics)
    return figure


def loss_figures(run: Path, captions: Mapping[str, str], best_step: int | None = None) -> list[Html]:
    """Return the loss curves of a run as one figure for each panel that has data.

    Args:
        run: the run folder; without metrics.jsonl the list is empty.
        captions: caption of each panel, "training" and "validation".
        best_step: see `plot_loss`.
    """
    metrics = read_metrics(run / METRICS) if (run / METRICS).is_file() else []
    keys = {"training": "loss", "validation": "eval_gep_mse"}
    drawn = [panel for panel, key in keys.items() if any(key in line for line in metrics)]
    return [inline_svg(plot_loss(metrics, [panel], best_step=best_step), captions[panel]) for panel in drawn]


def plot_cell_types(metrics: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the scores of the embedding of labelled validation cells, each beside that of PCA as a dashed line.

    Args:
        metrics: lines of metrics.jsonl of a run with `eval_labels`.

    Raises:
        ValueError: no line holds a score.
    """
    curves = _curves(metrics, {name: f"eval_{name}" for name in EMBEDDING_SCORES})
    if not curves:
        raise ValueError(f"no line of {len(metrics):,} has a score; expected keys such as 'eval_knn_macro_f1'")
    figure = Figure(figsize=(3.1 * len(curves), 2.4), layout=ConstrainedLayoutEngine(w_pad=0.08))
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for axes, (name, (epochs, values)) in zip(panels, curves.items(), strict=True):
        pca = next(line[f"eval_pca_{name}"] for line in metrics if f"eval_pca_{name}" in line)
        axes.axhline(pca, color=GREY, linewidth=0.9, linestyle=(0, (4, 2)), label="PCA")
        axes.plot(epochs, values, color=PALETTE[0], linewidth=1.4, marker="o", markersize=2.5, clip_on=False)
        labels = [(f"PCA {pca:.3f}", float(pca), GREY), (f"model {values[-1]:.3f}", float(values[-1]), PALETTE[0])]
        axes.margins(y=0.15)
        _finish(axes, {name: (epochs, values)}, EMBEDDING_SCORES[name][0], "score, higher is better", labels)
    return figure


def _curves(metrics: Sequence[Mapping[str, Any]], keys: Mapping[str, str]) -> Curves:
    """Return name → (epochs, values) of the lines with a finite number at the name's key; empty curves are left out."""
    curves = {}
    for name, key in keys.items():
        points = [(line["epoch"], line[key]) for line in metrics if np.isfinite(line.get(key, np.nan))]
        if points:
            epochs, values = np.array(points, dtype=float).T
            curves[name] = (epochs, values)
    return curves


def _draw_training(axes: Axes, curves: Curves, metrics: Sequence[Mapping[str, Any]]) -> None:
    """Draw the logged values as faint lines, and their running mean over a fiftieth of the run as bold lines."""
    colors = {"loss": GREY, **dict(zip(OBJECTIVES, PALETTE, strict=False))}
    if set(curves) == {"loss", "gep"}:  # with a single objective, the total is the same curve
        curves = {"gep": curves["gep"]}
    labels = []
    for name, (epochs, values) in curves.items():
        smooth = pd.Series(values).rolling(max(1, len(values) // 50), min_periods=1).mean().to_numpy()
        dot = "o" if len(values) <= 20 else None  # a line through a single point would be invisible
        axes.plot(epochs, values, color=colors[name], linewidth=0.6, alpha=0.35)
        axes.plot(
            epochs, smooth, color=colors[name], linewidth=1.4, label=name, marker=dot, markersize=2.5, clip_on=False
        )
        labels.append((f"{_title(name)} {smooth[-1]:.3g}", float(smooth[-1]), colors[name]))
    everything = np.concatenate([values for _, values in curves.values()])
    if everything.min() > 0 and everything.max() > 20 * everything.min():
        axes.set_yscale("log")
    _finish(axes, curves, "Training loss", "loss", labels)


def _draw_validation(
    axes: Axes, curves: Curves, metrics: Sequence[Mapping[str, Any]], *, best_step: int | None = None
) -> None:
    """Draw the error of each prediction head, the baselines as dashed lines, and the best step as a circle."""
    lines = [line for line in metrics if "eval_gep_mse" in line or "eval_gepc_mse" in line]
    best = min(lines, key=lambda line: line.get("eval_loss", line.get("eval_gep_mse", np.inf)))
    best = next((line for line in lines if line["step"] == best_step), best)
    labels = []
    for key, name in BASELINES.items():
        if best.get(key):  # values that are not binned have no ties, and a tie floor of 0
            axes.axhline(best[key], color=GREY, linewidth=0.9, linestyle=(0, (4, 2)), label=name)
            labels.append((f"{name} {best[key]:.3g}", float(best[key]), GREY))
    for (name, (epochs, values)), color in zip(curves.items(), PALETTE, strict=False):
        axes.plot(epochs, values, color=color, linewidth=1.4, marker="o", markersize=2.5, label=name, clip_on=False)
        labels.append((f"{_title(name)} {values[-1]:.3g}", float(values[-1]), color))
        if f"eval_{name}_mse" in best:
            place = (best["epoch"], best[f"eval_{name}_mse"])
            axes.plot(*place, "o", markersize=7, fillstyle="none", color=color, label=f"best {name}", clip_on=False)
    # Leave room below the title, because labels of close lines are moved apart.
    axes.set_ylim(0, 1.1 * axes.dataLim.ymax)
    _finish(axes, curves, f"Validation error (○ best, step {best['step']:,})", "mean squared error", labels)


def _title(name: str) -> str:
    return "total" if name == "loss" else name.upper().replace("_", " ")


def _finish(axes: Axes, curves: Curves, title: str, y_label: str, labels: list[tuple[str, float, str]]) -> None:
    """Label the axes, and each line at its right end; `labels` are text, height in data units and color."""
    last = max(float(epochs[-1]) for epochs, _ in curves.values())
    axes.set_xlim(0, last or 1)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.get_ylim()  # computes the limits; the transform to axes units below would use those of an empty plot
    axes.set_title(title, fontsize=9, loc="left")
    axes.set_xlabel("epoch", fontsize=SMALL)
    axes.set_ylabel(y_label, fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    to_axes = axes.transScale + axes.transLimits
    heights = np.array([to_axes.transform((1, value))[1] for _, value, _ in labels])
    for (text, _, color), height, label_height in zip(labels, heights, spread_labels(heights, _LABEL_GAP), strict=True):
        axes.annotate(
            text,
            (1, height),
            (1.05, label_height),
            "axes fraction",
            "axes fraction",
            color=color,
            va="center",
            fontsize=SMALL,
            arrowprops={"arrowstyle": "-", "color": color, "linewidth": 0.6, "shrinkA": 1},
        )


def spread_labels(heights: FloatArray, gap: float) -> FloatArray:
    """Move labels apart until none overlap, and by as little as possible (least squares).

    Args:
        heights: heights of the labels. Shape (labels,).
        gap: smallest distance between two labels.

    Returns:
        New heights, at least `gap` apart, in the same order. Shape (labels,).

    Source: isotonic regression of `height - rank * gap`, by pooling adjacent violators.
    """
    order = np.argsort(heights, kind="stable")
    pools: list[list[float]] = []  # neighboring labels that touch; each pool is placed around its mean
    for rank, height in enumerate(heights[order]):
        pools.append([float(height) - rank * gap])
        while len(pools) > 1 and np.mean(pools[-2]) > np.mean(pools[-1]):
            pools[-2:] = [pools[-2] + pools[-1]]
    apart = np.empty(len(heights))
    apart[order] = [np.mean(pool) for pool in pools for _ in pool] + gap * np.arange(len(heights))
    return apart
