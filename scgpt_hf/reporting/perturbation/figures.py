"""Plot perturbation scores: methods beside each other, and predicted against true effects of genes."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from scgpt_hf.perturbation.evaluation.evaluate import CEILING, MODEL, TRUTH
from scgpt_hf.reporting.plots import GREY, OTHER, PALETTE, SMALL

_BAR = 0.28  # inches per method
_PANEL = 2.1  # inches, side of a scatter plot
_MAX_PANELS = 9


def plot_methods(tables: Mapping[str, Mapping[str, Mapping[str, Any]]], metric: str, label: str) -> Figure:
    """Plot one metric of all methods, a panel for each group of conditions.

    Args:
        tables: group of conditions → method → metric → mean, or None.
        metric: the metric.
        label: of the horizontal axis.
    """
    shown = {group: methods for group, methods in tables.items() if methods}
    methods = list(dict.fromkeys(name for table in shown.values() for name in table))
    figure = Figure(figsize=(2.1 + 2.2 * len(shown), 0.9 + _BAR * len(methods)), layout="constrained")
    axes = figure.subplots(1, max(len(shown), 1), sharey=True, squeeze=False)[0]
    places = np.arange(len(methods))[::-1]
    for axis, (group, table) in zip(axes, shown.items(), strict=False):
        values = [table.get(name, {}).get(metric) for name in methods]
        colors = [PALETTE[0] if name == MODEL else OTHER if name == CEILING else GREY for name in methods]
        axis.barh(places, [value or 0.0 for value in values], color=colors, height=0.7)
        for place, value in zip(places, values, strict=True):
            text = " not defined" if value is None else f" {value:.2f}"
            axis.text(max(value or 0.0, 0.0), place, text, va="center", fontsize=SMALL)
        axis.set_title(group, fontsize=SMALL + 1)
        axis.set_xlabel(label, fontsize=SMALL)
        axis.tick_params(labelsize=SMALL)
        axis.margins(x=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(places, methods, fontsize=SMALL)
    return figure


def plot_effects(conditions: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot predicted against true effects of the most affected genes, a panel for each condition.

    Args:
        conditions: entries of `conditions` in the results; the first nine are plotted.
    """
    shown = [one for one in conditions if MODEL in one["deltas"]][:_MAX_PANELS]
    columns = min(3, max(len(shown), 1))
    rows = -(-max(len(shown), 1) // columns)
    figure = Figure(figsize=(_PANEL * columns + 0.4, _PANEL * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis, one in zip(axes, shown, strict=False):
        true, predicted = np.array(one["deltas"][TRUTH]), np.array(one["deltas"][MODEL])
        limit = 1.1 * max(np.abs(true).max(), np.abs(predicted).max(), 1e-3)
        axis.plot([-limit, limit], [-limit, limit], color=GREY, linewidth=0.8, linestyle="--")
        axis.scatter(true, predicted, s=12, color=PALETTE[0])
        for gene in np.argsort(-np.abs(true))[:3]:
            axis.annotate(one["genes"][gene], (true[gene], predicted[gene]), fontsize=SMALL - 1, color=GREY)
        name = f"{one['condition']} | {one['context']}" if one["context"] else one["condition"]
        axis.set_title(f"{name}, split-half r {one['split_half']:.2f}", fontsize=SMALL)
        axis.tick_params(labelsize=SMALL - 1)
    for axis in axes[len(shown) :]:
        axis.set_visible(False)
    figure.supxlabel("true effect (difference of log1p values)", fontsize=SMALL)
    figure.supylabel("predicted effect", fontsize=SMALL)
    return figure


def plot_ceiling(scores: Sequence[Mapping[str, Any]], conditions: Sequence[Mapping[str, Any]]) -> Figure:
    """Plot the correlation of each predicted effect against the split-half correlation of its condition.

    Args:
        scores: entries of `scores` in the results.
        conditions: entries of `conditions` in the results.
    """
    ceiling = {(one["condition"], one["context"]): one["split_half"] for one in conditions}
    figure = Figure(figsize=(3.6, 3.2), layout="constrained")
    axis = figure.add_subplot()
    axis.plot([-0.2, 1], [-0.2, 1], color=GREY, linewidth=0.8, linestyle="--")
    methods = [name for name in dict.fromkeys(row["method"] for row in scores) if name not in (CEILING, "no change")]
    for name, color in zip(methods, (*PALETTE, *PALETTE), strict=False):
        points = [
            (ceiling[row["condition"], row["context"]], row["pearson_delta"])
            for row in scores
            if row["method"] == name and row["pearson_delta"] is not None
        ]
        if points:
            x, y = zip(*points, strict=True)
            axis.scatter(x, y, s=22 if name == MODEL else 9, color=color, label=name, alpha=0.85)
    axis.set_xlabel("split-half correlation of the condition", fontsize=SMALL)
    axis.set_ylabel("correlation of predicted and true effect", fontsize=SMALL)
    axis.tick_params(labelsize=SMALL)
    axis.legend(fontsize=SMALL - 1, frameon=False)
    return figure
