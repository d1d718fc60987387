"""Figures of predicted types and of scores: what they show is what was counted."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from scgpt_hf.reporting.plots_scores import plot_scores
from scgpt_hf.reporting.plots_types import plot_calibration, plot_confusion, plot_f1

TRUE = ["T"] * 6 + ["B"] * 4
PREDICTED = ["T"] * 3 + ["B"] * 2 + ["unassigned"] + ["B"] * 4


def inside(figure: Figure) -> bool:
    """Whether every text lies inside the figure."""
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for axes in figure.axes for text in axes.texts]
    frames = [axes.get_tightbbox() for axes in figure.axes]
    return all(
        box.x0 >= -1 and box.y0 >= -1 and box.x1 <= figure.bbox.x1 + 1 and box.y1 <= figure.bbox.y1 + 1
        for box in [*boxes, *frames]
        if box is not None
    )


def test_confusion_shares_each_true_type_among_the_predicted() -> None:
    figure = plot_confusion(TRUE, PREDICTED, title="probe")
    axes = figure.axes[0]
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(np.array([[3 / 6, 2 / 6, 1 / 6], [0, 1, 0]]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["T (6)", "B (4)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["T", "B", "unassigned"]
    assert {text.get_text() for text in axes.texts} == {"50", "33", "17", "100"}
    assert inside(figure)


@pytest.mark.parametrize("n_types", [1, 21])
def test_any_number_of_types_is_drawn_inside_the_figure(n_types: int) -> None:
    types = [f"CD4-positive, alpha-beta memory T cell {n}" for n in range(n_types)] * 2
    assert inside(plot_confusion(types, types[::-1]))
    assert inside(plot_f1(types, {"X_scgpt": types[::-1], "HVG + PCA": types}))


def test_f1_has_a_mark_for_each_type_and_method_and_says_the_mean() -> None:
    figure = plot_f1(TRUE, {"one": PREDICTED, "two": TRUE})
    one, two = figure.axes[0].lines
    assert one.get_xdata() == pytest.approx([2 * 3 / 9, 2 * 4 / 10])
    assert two.get_xdata() == pytest.approx([1, 1])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["one (macro 0.733)", "two (macro 1.000)"]
    assert inside(figure)


@pytest.mark.parametrize("methods", [{}, {str(n): TRUE for n in range(9)}])
def test_none_or_too_many_methods_raise(methods: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 8 methods, found {len(methods)}"):
        plot_f1(TRUE, methods)


def test_calibration_draws_accuracy_over_confidence_and_the_error() -> None:
    figure = plot_calibration([0.95, 0.85, 0.85, 0.15], [True, True, False, False], title="probe")
    upper, lower = figure.axes
    assert upper.lines[1].get_xdata() == pytest.approx([0.15, 0.85, 0.95])
    assert upper.lines[1].get_ydata() == pytest.approx([0, 0.5, 1])
    assert upper.get_title(loc="left") == "probe: expected calibration error 0.225"
    assert [patch.get_height() for patch in lower.patches] == [1, 2, 1]
    assert inside(figure)


def test_scores_are_shown_the_best_bold_and_what_is_missing_as_a_dash() -> None:
    scores = {"X_scgpt": {"NMI": 0.5, "ARI": 0.25}, "HVG + PCA": {"NMI": 0.75}}
    figure = plot_scores(scores, {"kept apart": ["NMI", "ARI"], "mixed": ["iLISI"]}, title="cells")
    texts = {text.get_text(): text.get_weight() for text in figure.axes[0].texts}
    assert texts["0.750"] == "bold"
    assert texts["0.500"] == "normal"
    assert {"–", "kept apart", "X_scgpt", "cells"} <= texts.keys()
    assert "mixed" not in texts
    assert inside(figure)
    with pytest.raises(ValueError, match=r"none of 1 methods has a score of \['NMI'\]"):
        plot_scores({"a": {}}, {"all": ["NMI"]})
