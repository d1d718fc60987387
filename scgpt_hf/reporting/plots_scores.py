"""The scores of several methods as one figure: a table whose cells are shaded, the best of each column in bold.

Figures are returned; `plots.py` saves them. What the scores are, `metrics.py` and `probing.py` decide.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from scgpt_hf.reporting.plots import GREY, SMALL, text_width

_WIDTH, _HEIGHT, _GAP = 0.52, 0.27, 0.12  # inches of a cell of the table, and between two groups


def plot_scores(
    scores: Mapping[str, Mapping[str, float]], groups: Mapping[str, Sequence[str]], *, title: str | None = None
) -> Figure:
    """Return a table of scores: a row per method, a column per metric; what has no score is a dash.

    Args:
        scores: method → metric → score, higher is better.
        groups: heading → metrics below it, in order; those without any score are left out.
        title: above the table.

    Raises:
        ValueError: no method has a score of any metric of the groups.
    """
    shown = {
        heading: [metric for metric in metrics if any(metric in one for one in scores.values())]
        for heading, metrics in groups.items()
    }
    shown = {heading: metrics for heading, metrics in shown.items() if metrics}
    if not shown:
        raise ValueError(f"none of {len(scores)} methods has a score of {[m for ms in groups.values() for m in ms]}")
    columns = [metric for metrics in shown.values() for metric in metrics]
    left = max(map(text_width, scores)) + 0.25
    head = 1.1 * max(map(text_width, columns)) + 0.55  # the font is a little larger than that of text_width
    width = left + _WIDTH * len(columns) + _GAP * len(shown)
    height = head + _HEIGHT * len(scores) + (0.35 if title else 0.1)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # inches from the top left
    axes.axis("off")
    top = height - _HEIGHT * len(scores) - 0.05
    x = left
    for heading, metrics in shown.items():
        axes.text(x, top - head + 0.3, heading, fontsize=SMALL, color=GREY, va="bottom")
        axes.plot([x, x + _WIDTH * len(metrics)], [top - head + 0.34] * 2, color=GREY, linewidth=0.6)
        for metric in metrics:
            axes.text(x + _WIDTH / 2, top - 0.05, metric, fontsize=SMALL, rotation=90, ha="center", va="bottom")
            values = np.array([one.get(metric, np.nan) for one in scores.values()])
            for row, value in enumerate(values):
                best = bool(np.isfinite(value)) and round(float(value), 3) == round(float(np.nanmax(values)), 3)
                _draw_cell(axes, x, top + _HEIGHT * row, value, bold=best and len(values) > 1)
            x += _WIDTH
        x += _GAP
    for row, method in enumerate(scores):
        axes.text(0.08, top + _HEIGHT * (row + 0.5), method, fontsize=SMALL, va="center")
    if title:
        axes.text(0.08, 0.2, title, fontsize=9, va="center")
    return figure


def _draw_cell(axes: Axes, x: float, y: float, value: float, *, bold: bool) -> None:
    """Draw one score, shaded from white at 0 to blue at 1."""
    told = bool(np.isfinite(value))
    shade = colormaps["Blues"](0.85 * float(np.clip(value, 0, 1))) if told else "#F2F2F2"
    axes.add_patch(Rectangle((x + 0.01, y + 0.01), _WIDTH - 0.02, _HEIGHT - 0.02, facecolor=shade, linewidth=0))
    ink = "white" if told and value > 0.7 else "black" if told else GREY
    text = f"{value:.3f}" if told else "–"
    place = (x + _WIDTH / 2, y + _HEIGHT / 2)
    axes.text(*place, text, fontsize=7, ha="center", va="center", color=ink, weight="bold" if bold else "normal")
