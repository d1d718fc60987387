"""Plot predicted cell types: confusion matrix, F1 score of each type, calibration of the confidence.

The numbers are computed in `scoring/classification.py` and `training/finetuning/calibration.py`;
`plots.py` defines the palette and saves figures.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from scgpt_hf.reporting.plots import GREY, PALETTE, SMALL, text_width
from scgpt_hf.scoring.classification import count_confusions, f1_by_type
from scgpt_hf.training.finetuning.calibration import calibration_error, reliability

_MARKERS = "oDs^vPX*"
_ROW = 0.21  # inches per cell type
_SQUARE = 0.27  # inches, side of a square of a confusion matrix that is large enough for a percentage
_MAX_WRITTEN = 20  # cell types; in a larger matrix, the percentages would not fit their squares


def plot_confusion(true: npt.ArrayLike, predicted: npt.ArrayLike, *, title: str | None = None) -> Figure:
    """Plot a confusion matrix: a row per true type, with the share of its cells that was predicted as each type.

    Types are sorted by decreasing number of cells. Names that are only predicted, such as "unassigned", come last.
    Shares of at least half a percent are written in percent, unless there are more than 20 types.

    Args:
        true: type of each cell. Shape (cells,).
        predicted: predicted type of each cell. Shape (cells,).
        title: above the matrix.

    Raises:
        ValueError: there is no cell, or the two arrays differ in length.
    """
    types, columns, counts = count_confusions(true, predicted)
    sizes = counts.sum(axis=1)
    shares = counts / sizes[:, None]
    rows = [f"{name} ({size:,})" for name, size in zip(types, sizes, strict=True)]
    side = _ROW if len(types) > _MAX_WRITTEN else _SQUARE
    # Of matplotlib's layouts, only "compressed" keeps all labels of square axes inside the figure.
    figure = Figure(
        figsize=(
            side * len(columns) + max(text_width(name, SMALL) for name in rows) + 1.2,
            max(side * len(rows), 1.6) + max(text_width(name, SMALL) for name in columns) + 0.7,
        ),
        layout="compressed",
    )
    axes = figure.add_subplot()
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="equal")
    if len(types) <= _MAX_WRITTEN:
        for row, column in zip(*np.nonzero(shares >= 0.005), strict=True):
            share = shares[row, column]
            ink = "white" if share > 0.55 else "black"
            axes.text(column, row, f"{100 * share:.0f}", ha="center", va="center", fontsize=6.5, color=ink)
    axes.set_yticks(range(len(rows)), rows, fontsize=SMALL)
    axes.set_xticks(range(len(columns)), columns, fontsize=SMALL, rotation=90)
    axes.set_xlabel("predicted type", fontsize=SMALL)
    axes.set_ylabel("true type (number of cells)", fontsize=SMALL)
    axes.spines[:].set_color("#CCCCCC")
    axes.tick_params(length=0)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02, format=PercentFormatter(1), aspect=25)
    bar.set_label("share of the cells of the true type", fontsize=SMALL)
    bar.ax.tick_params(labelsize=SMALL)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def plot_f1(true: npt.ArrayLike, predicted: Mapping[str, npt.ArrayLike], *, title: str | None = None) -> Figure:
    """Plot the F1 score of each type: a row per type, a marker per method.

    Types are sorted by decreasing number of cells. The legend shows the macro-F1 of each method, which is the mean
    over types.

    Args:
        true: type of each cell. Shape (cells,).
        predicted: method → predicted type of each cell, shape (cells,); at most eight methods.
        title: above the rows.

    Raises:
        ValueError: there are no or more than eight methods, there is no cell, or arrays differ in length.
    """
    if not 1 <= len(predicted) <= len(_MARKERS):
        raise ValueError(f"expected 1 to {len(_MARKERS)} methods, found {len(predicted)}: {list(predicted)}")
    scores = {method: f1_by_type(true, labels) for method, labels in predicted.items()}
    names, sizes = np.unique(np.asarray(true, dtype=str), return_counts=True)
    order = np.argsort(-sizes, kind="stable")
    types = names[order]
    rows = [f"{name} ({size:,})" for name, size in zip(types, sizes[order], strict=True)]
    width = 3.2 + max(text_width(name, SMALL) for name in rows)
    figure = Figure(figsize=(width, _ROW * len(rows) + 0.75 + 0.16 * len(scores)), layout="constrained")
    axes = figure.add_subplot()
    axes.hlines(range(len(rows)), 0, 1, color="#E6E6E6", linewidth=0.8, zorder=0)
    for (method, score), color, marker in zip(scores.items(), PALETTE, _MARKERS, strict=False):
        legend = f"{method} (mean {np.mean(list(score.values())):.3f})"
        style: dict[str, Any] = {"markersize": 4.5, "alpha": 0.85, "clip_on": False, "linestyle": ""}
        axes.plot([score[name] for name in types], range(len(rows)), marker, color=color, label=legend, **style)
    axes.set_yticks(range(len(rows)), rows, fontsize=SMALL)
    axes.set(xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
    axes.set_xlabel("F1 score", fontsize=SMALL)
    axes.tick_params(labelsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    figure.legend(loc="outside lower left", frameon=False, fontsize=7, handletextpad=0.2, labelspacing=0.3)
    if title:
        figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    return figure


def plot_calibration(
    confidence: npt.ArrayLike, correct: npt.ArrayLike, *, n_bins: int = 15, title: str | None = None
) -> Figure:
    """Plot a reliability diagram: the share of correct predictions, and their number, by confidence.

    With a perfectly calibrated confidence, all points lie on the diagonal: of the cells predicted with confidence 0.8,
    80 % are predicted correctly. The title shows the expected calibration error; see `calibration_error`.

    Args:
        confidence: confidence of each prediction, in [0, 1]. Shape (cells,).
        correct: whether each prediction is correct. Shape (cells,).
        n_bins: number of bins of equal width.
        title: before the error.

    Raises:
        ValueError: there is no cell, the arrays differ in length, or a confidence is outside [0, 1].
    """
    bins = reliability(confidence, correct, n_bins)
    error = calibration_error(confidence, correct, n_bins)
    figure = Figure(figsize=(3.2, 3.5), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    upper.plot([0, 1], [0, 1], color=GREY, linewidth=0.9, linestyle=(0, (4, 2)))
    upper.plot(bins["confidence"], bins["accuracy"], "o-", color=PALETTE[0], markersize=4, linewidth=1.2, clip_on=False)
    upper.set(ylim=(0, 1), xlim=(0, 1))
    upper.set_ylabel("share of correct predictions", fontsize=SMALL)
    heading = f"expected calibration error {error:.3f}"
    upper.set_title(f"{title}: {heading}" if title else heading, fontsize=9, loc="left")
    lower.bar(
        bins.index.to_numpy() / n_bins, bins["cells"], width=0.92 / n_bins, align="edge", color=PALETTE[0], alpha=0.75
    )
    lower.set_xlabel("confidence", fontsize=SMALL)
    lower.set_ylabel("cells", fontsize=SMALL)
    for axes in (upper, lower):
        axes.tick_params(labelsize=SMALL)
        axes.spines[["top", "right"]].set_visible(False)
    return figure
