"""Plot UMAPs and tables of scores, save figures, and define the palette that all figures share.

Functions return a `matplotlib.figure.Figure` and never touch pyplot, so the state of a user's session stays as it is.
Loss curves are in `curves.py`, figures of predicted cell types in `plots_predictions.py`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle
from matplotlib.textpath import TextPath

from scgpt_hf.cells.atomic import replace_file
from scgpt_hf.cells.block import FloatArray
from scgpt_hf.cells.missing import fill_missing, has_value

# The first eight can be distinguished with every common kind of color blindness (Okabe & Ito 2008,
# jfly.uni-koeln.de/color). There are no twenty such hues, so the others also differ in lightness.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"),
    *("#882255", "#A6D96A", "#6A51A3", "#8C510A", "#FDBFAE", "#00441B", "#BFB8E6", "#E7298A"),
    *("#08306B", "#B8A24A", "#00CED1", "#A50F15"),
)
OTHER = "#BDBDBD"
UNLABELLED = ("unknown", "unlabelled")  # the Census writes "unknown" for cells without a type
GREY = "#6B6B6B"
SMALL = 7.5  # points
_SMALLER = 7  # points, of legends and of the scores in a table, which have to fit their cells
DPI = 200  # of figures saved as PNG
UMAP_CELLS = 5_000  # to draw at most: with more cells a UMAP looks the same, but takes minutes to compute

# Inches of a figure of UMAPs. With a legend of usual width, the figure still fits the screen of a phone.
_UMAP_INCHES = 2.7  # width and height of a UMAP without its legend
_UMAP_LEFT = 0.3  # room for the label of the vertical axis
_UMAP_BOTTOM = 0.25  # room for the label of the horizontal axis
_UMAP_TOP = 0.3  # room for the heading of the panel
_LEGEND_MARGINS = 0.45  # room for the markers of a legend, and for the gaps on both of its sides
_SUPTITLE_HEIGHT = 0.3  # room for one line of 10 points

# Inches of a table of scores
_CELL_WIDTH, _CELL_HEIGHT, _GROUP_GAP = 0.52, 0.27, 0.12
_TEXT_LEFT = 0.08  # between the left edge and the names of methods, as the text would otherwise touch the edge
_METHOD_MARGINS = 0.25  # gaps on both sides of the names of methods
_NAME_GAP = 0.05  # between the name of a metric and the scores below it, also below the last row
_HEADING_HEIGHT = 0.3  # room for the heading of a group of metrics
_RULE_GAP = 0.04  # between that heading and the rule below it
_RULE_TO_NAMES = 0.16  # between that rule and the longest name of a metric
_TITLE_HEIGHT, _NO_TITLE_HEIGHT = 0.35, 0.1  # room above the table, with and without a title


def plot_umap(coordinates: FloatArray, panels: Mapping[str, Sequence[str]], *, title: str | None = None) -> Figure:
    """Plot cells at their UMAP coordinates, one panel below the other, colored by category.

    The legend lists categories by decreasing number of cells. With more than 20 categories, the smallest are drawn in
    grey as "other". Cells without a label are drawn in grey as "unlabelled". Points are rasterised even in vector
    files, which would be too large otherwise.

    Args:
        coordinates: UMAP coordinates. Shape (cells, 2).
        panels: heading → category of each cell, e.g. {"cell type": obs["cell_type"], "donor": obs["donor_id"]}.
        title: above all panels.

    Raises:
        ValueError: there is no cell or no panel, coordinates are not finite, or a panel does not have one category
            per cell.

    Example:
        >>> figure = plot_umap(np.zeros((2, 2)), {"cell type": ["B cell", "T cell"]})
        >>> [axes.get_title(loc="left") for axes in figure.axes]
        ['cell type']
    """
    coordinates = np.asarray(coordinates)
    _require_coordinates(coordinates, panels)
    legends = [_colors(categories) for categories in panels.values()]
    legend_width = max(text_width(name, _SMALLER) for _, legend in legends for name in legend)
    width = _UMAP_LEFT + _UMAP_INCHES + _LEGEND_MARGINS + legend_width
    panel_height = _UMAP_BOTTOM + _UMAP_INCHES + _UMAP_TOP
    height = panel_height * len(panels) + (_SUPTITLE_HEIGHT if title else 0)
    figure = Figure(figsize=(width, height))
    for row, heading, (colors, legend) in zip(reversed(range(len(panels))), panels, legends, strict=True):
        bottom = row * panel_height + _UMAP_BOTTOM
        axes = figure.add_axes((_UMAP_LEFT / width, bottom / height, _UMAP_INCHES / width, _UMAP_INCHES / height))
        _draw_umap(axes, coordinates, colors, legend)
        axes.set_title(heading, fontsize=9, loc="left")
    if title:
        figure.suptitle(title, fontsize=10, x=_UMAP_LEFT / width, ha="left", y=1 - 0.1 / height, va="top")
    return figure


def plot_scores(
    scores: Mapping[str, Mapping[str, float]], groups: Mapping[str, Sequence[str]], *, title: str | None = None
) -> Figure:
    """Plot scores as a table with shaded cells: a row per method, a column per metric.

    The best score of each column is bold. A dash marks a missing score.

    Args:
        scores: method → metric → score in [0, 1], higher is better.
        groups: heading → metrics below it, in order; metrics without any score are left out.
        title: above the table.

    Raises:
        ValueError: no method has a score of any metric in `groups`.
    """
    shown = {}
    for heading, group in groups.items():
        if known := [metric for metric in group if any(metric in method_scores for method_scores in scores.values())]:
            shown[heading] = known
    if not shown:
        metrics = [metric for group in groups.values() for metric in group]
        raise ValueError(f"none of {len(scores)} methods has a score for any of {metrics}")
    columns = [metric for group in shown.values() for metric in group]
    # A heading can be wider than the columns below it.
    widths = [max(_CELL_WIDTH * len(group), text_width(heading, SMALL)) for heading, group in shown.items()]
    left = max(text_width(method, SMALL) for method in scores) + _METHOD_MARGINS
    names_height = max(text_width(metric, SMALL) for metric in columns)  # the names are written upwards
    header_height = _HEADING_HEIGHT + _RULE_GAP + _RULE_TO_NAMES + names_height + _NAME_GAP
    width = left + sum(widths) + _GROUP_GAP * len(shown)
    height = header_height + _CELL_HEIGHT * len(scores) + (_TITLE_HEIGHT if title else _NO_TITLE_HEIGHT)
    figure = Figure(figsize=(width, height))
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # inches from the top left
    axes.axis("off")
    top = height - _CELL_HEIGHT * len(scores) - _NAME_GAP
    heading_bottom = top - header_height + _HEADING_HEIGHT
    rule = heading_bottom + _RULE_GAP
    start = left
    for (heading, group), group_width in zip(shown.items(), widths, strict=True):
        x = start
        axes.text(x, heading_bottom, heading, fontsize=SMALL, color=GREY, va="bottom")
        axes.plot([x, x + group_width], [rule] * 2, color=GREY, linewidth=0.6)
        for metric in group:
            axes.text(
                x + _CELL_WIDTH / 2, top - _NAME_GAP, metric, fontsize=SMALL, rotation=90, ha="center", va="bottom"
            )
            values = np.array([method_scores.get(metric, np.nan) for method_scores in scores.values()])
            for row, value in enumerate(values):
                best = bool(np.isfinite(value)) and round(float(value), 3) == round(float(np.nanmax(values)), 3)
                _draw_score(axes, x, top + _CELL_HEIGHT * row, value, bold=best and len(values) > 1)
            x += _CELL_WIDTH
        start += group_width + _GROUP_GAP
    for row, method in enumerate(scores):
        axes.text(_TEXT_LEFT, top + _CELL_HEIGHT * (row + 0.5), method, fontsize=SMALL, va="center")
    if title:
        axes.text(_TEXT_LEFT, 0.2, title, fontsize=9, va="center")
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Save a figure as PNG, SVG or PDF, as the suffix of the path says.

    The file is written atomically, so an interruption leaves the old file.

    Args:
        figure: the figure.
        path: ending in .png, .svg or .pdf.

    Raises:
        ValueError: the path has another suffix.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot write a figure as {path.suffix!r}; expected .png, .svg or .pdf, found {path.name!r}")
    editable: Any = {"svg.fonttype": "none", "pdf.fonttype": 42}  # text stays text
    with matplotlib.rc_context(editable), replace_file(path) as temporary:
        figure.savefig(temporary, format=path.suffix[1:], dpi=DPI)


def _require_coordinates(coordinates: FloatArray, panels: Mapping[str, Sequence[str]]) -> None:
    if coordinates.ndim != 2 or coordinates.shape[1] != 2 or not len(coordinates):
        raise ValueError(f"expected coordinates of shape (cells, 2) with at least one cell, found {coordinates.shape}")
    if n_wrong := int((~np.isfinite(coordinates)).any(axis=1).sum()):
        raise ValueError(f"{n_wrong:,} of {len(coordinates):,} cells have coordinates that are not finite; drop them")
    if not panels:
        raise ValueError("no panel to plot; expected {heading: categories}, e.g. {'cell type': obs['cell_type']}")
    for heading, categories in panels.items():
        if len(categories) != len(coordinates):
            raise ValueError(
                f"{heading!r} has {len(categories):,} categories for {len(coordinates):,} cells; expected one per cell"
            )


def _colors(categories: Sequence[str]) -> tuple[npt.NDArray[np.str_], dict[str, str]]:
    """Return the color of each cell, and the legend: name with the number of cells → color."""
    values = pd.Series(list(categories), dtype=object)
    names = fill_missing(values).where(has_value(values), "unlabelled")
    sizes = names.value_counts()
    ordered = sorted(set(sizes.index) - set(UNLABELLED), key=lambda name: (-sizes[name], name))
    shown = ordered if len(ordered) <= len(PALETTE) else ordered[: len(PALETTE) - 1]
    color_of = dict(zip(shown, PALETTE, strict=False))
    legend = {f"{name} ({sizes[name]:,})": color for name, color in color_of.items()}
    if others := ordered[len(shown) :]:
        legend[f"{len(others)} other ({sizes[others].sum():,})"] = OTHER
    legend |= {f"{name} ({sizes[name]:,})": OTHER for name in UNLABELLED if name in sizes}
    return names.map(color_of).fillna(OTHER).to_numpy(dtype=str), legend


def text_width(text: str, points: float) -> float:
    """Return the width in inches of a text in a font of this size."""
    return float(TextPath((0, 0), text, size=points).get_extents().width) / 72


def _draw_umap(axes: Axes, coordinates: FloatArray, colors: npt.NDArray[np.str_], legend: dict[str, str]) -> None:
    shuffled = np.random.default_rng(0).permutation(len(coordinates))  # so that no category hides another
    size = float(np.clip(9_000 / len(coordinates), 0.6, 9))  # square points: small enough not to merge
    axes.scatter(
        coordinates[shuffled, 0], coordinates[shuffled, 1], s=size, c=colors[shuffled], linewidths=0, rasterized=True
    )
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_visible(False)
    axes.set_xlabel("UMAP 1", fontsize=SMALL, loc="left", color=GREY)
    axes.set_ylabel("UMAP 2", fontsize=SMALL, loc="bottom", color=GREY)
    handles = [Line2D([], [], marker="o", linestyle="", markersize=4, color=color) for color in legend.values()]
    axes.legend(
        handles,
        list(legend),
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        fontsize=_SMALLER,
        handletextpad=0.1,
        labelspacing=0.35,
        borderaxespad=0,
    )


def _draw_score(axes: Axes, x: float, y: float, value: float, *, bold: bool) -> None:
    """Draw one score, shaded from white at 0 to blue at 1."""
    known = bool(np.isfinite(value))
    shade = colormaps["Blues"](0.85 * float(np.clip(value, 0, 1))) if known else "#F2F2F2"
    axes.add_patch(
        Rectangle((x + 0.01, y + 0.01), _CELL_WIDTH - 0.02, _CELL_HEIGHT - 0.02, facecolor=shade, linewidth=0)
    )
    ink = "white" if known and value > 0.7 else "black" if known else GREY
    text = f"{value:.3f}" if known else "–"
    middle = (x + _CELL_WIDTH / 2, y + _CELL_HEIGHT / 2)
    axes.text(
        *middle, text, fontsize=_SMALLER, ha="center", va="center", color=ink, weight="bold" if bold else "normal"
    )
