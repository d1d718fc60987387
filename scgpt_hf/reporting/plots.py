"""Figures of cells, and how any figure is saved: figures are returned, never shown, and saved only by `save_figure`.

Every figure is built on `matplotlib.figure.Figure` alone, so no global state of pyplot is read or changed. The schedule
of a run is drawn in `curves.py`.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.textpath import TextPath

FloatArray = npt.NDArray[np.floating[Any]]

# The first eight tell apart for every common kind of colour blindness (Okabe & Ito 2008, jfly.uni-koeln.de/color); the
# rest differ from them and from each other in lightness, since no twenty hues can.
PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000"),
    *("#882255", "#A6D96A", "#6A51A3", "#8C510A", "#FDBFAE", "#00441B", "#BFB8E6", "#E7298A"),
    *("#08306B", "#B8A24A", "#00CED1", "#A50F15"),
)
OTHER = "#BDBDBD"
UNLABELLED = ("unknown", "unlabelled")  # no type: the Census writes "unknown"
GREY = "#6B6B6B"
SMALL = 7.5  # points
_MAP = 2.7  # inches, width and height of a map without its legend; beside one it still fits a phone


def plot_umap(coordinates: FloatArray, panels: Mapping[str, Sequence[str]], *, title: str | None = None) -> Figure:
    """Return the cells on their map, panels below each other, categories by falling size.

    Points are drawn in one shuffled order, so that no category hides another, and as pixels even in a vector file.
    Beyond 20 categories the smallest share the grey of "other"; cells without a label are "unlabelled", grey as
    "unknown".

    Args:
        coordinates: shape (cells, 2).
        panels: heading → category of each cell, e.g. {"cell type": obs["cell_type"], "donor": obs["donor_id"]}.
        title: above all panels.

    Raises:
        ValueError: no cell, no panel, coordinates that are not finite, or not one category for each cell.
    """
    coordinates = np.asarray(coordinates)
    _require_map(coordinates, panels)
    legends = [_colours(categories) for categories in panels.values()]
    width = 0.3 + _MAP + 0.45 + max(text_width(name) for _, legend in legends for name in legend)
    height = (_MAP + 0.55) * len(panels) + (0.3 if title else 0)
    figure = Figure(figsize=(width, height))
    for row, heading, (colours, legend) in zip(reversed(range(len(panels))), panels, legends, strict=True):
        bottom = row * (_MAP + 0.55) + 0.25
        axes = figure.add_axes((0.3 / width, bottom / height, _MAP / width, _MAP / height))
        _draw_map(axes, coordinates, colours, legend)
        axes.set_title(heading, fontsize=9, loc="left")
    if title:
        figure.suptitle(title, fontsize=10, x=0.3 / width, ha="left", y=1 - 0.1 / height, va="top")
    return figure


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure as PNG, SVG or PDF by the suffix of the path, whole or not at all.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"cannot write a figure as {path.suffix!r}; expected .png, .svg or .pdf, found {path.name!r}")
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with matplotlib.rc_context({"svg.fonttype": "none", "pdf.fonttype": 42}):  # letters stay letters
            figure.savefig(beside, format=path.suffix[1:], dpi=200)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _require_map(coordinates: FloatArray, panels: Mapping[str, Sequence[str]]) -> None:
    if coordinates.ndim != 2 or coordinates.shape[1] != 2 or not len(coordinates):
        raise ValueError(f"expected coordinates of shape (cells, 2) with at least one cell, found {coordinates.shape}")
    if n_wrong := int((~np.isfinite(coordinates)).any(axis=1).sum()):
        raise ValueError(f"{n_wrong:,} of {len(coordinates):,} cells have coordinates that are not finite; drop them")
    if not panels:
        raise ValueError("no panel to draw; expected {heading: categories}, e.g. {'cell type': obs['cell_type']}")
    for heading, categories in panels.items():
        if len(categories) != len(coordinates):
            raise ValueError(
                f"{heading!r} has {len(categories):,} categories for {len(coordinates):,} cells; expected one for each"
            )


def _colours(categories: Sequence[str]) -> tuple[npt.NDArray[np.str_], dict[str, str]]:
    """Return the colour of each cell, and the legend: name with the number of cells → colour."""
    names = pd.Series(np.asarray(categories, dtype=object)).astype("string").fillna("unlabelled")
    sizes = names.value_counts()
    ordered = sorted(set(sizes.index) - set(UNLABELLED), key=lambda name: (-sizes[name], name))
    shown = ordered if len(ordered) <= len(PALETTE) else ordered[: len(PALETTE) - 1]
    colour_of = dict(zip(shown, PALETTE, strict=False))
    legend = {f"{name} ({sizes[name]:,})": colour for name, colour in colour_of.items()}
    if others := ordered[len(shown) :]:
        legend[f"{len(others)} other ({sizes[others].sum():,})"] = OTHER
    legend |= {f"{name} ({sizes[name]:,})": OTHER for name in UNLABELLED if name in sizes}
    return names.map(colour_of).fillna(OTHER).to_numpy(dtype=str), legend


def text_width(name: str) -> float:
    """Return inches that a name takes in a legend or beside an axis."""
    return float(TextPath((0, 0), name, size=7).get_extents().width) / 72


def _draw_map(axes: Axes, coordinates: FloatArray, colours: npt.NDArray[np.str_], legend: dict[str, str]) -> None:
    shuffled = np.random.default_rng(0).permutation(len(coordinates))  # the picture, not a result, depends on it
    size = float(np.clip(9_000 / len(coordinates), 0.6, 9))  # square points
    axes.scatter(
        coordinates[shuffled, 0], coordinates[shuffled, 1], s=size, c=colours[shuffled], linewidths=0, rasterized=True
    )
    axes.set(xticks=[], yticks=[])
    axes.set_aspect("equal", adjustable="datalim")
    axes.spines[:].set_visible(False)
    axes.set_xlabel("UMAP 1", fontsize=SMALL, loc="left", color=GREY)
    axes.set_ylabel("UMAP 2", fontsize=SMALL, loc="bottom", color=GREY)
    handles = [Line2D([], [], marker="o", linestyle="", markersize=4, color=colour) for colour in legend.values()]
    axes.legend(
        handles,
        list(legend),
        loc="center left",
        bbox_to_anchor=(1.02, 0.5),
        frameon=False,
        fontsize=7,
        handletextpad=0.1,
        labelspacing=0.35,
        borderaxespad=0,
    )
