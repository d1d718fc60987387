"""Tests of the figures of predicted cell types."""

import numpy as np
import pytest

from scgpt_hf.reporting.plots_predictions import plot_calibration, plot_confusion, plot_f1
from tests.support.figures import is_inside

TRUE = ["T"] * 6 + ["B"] * 4
PREDICTED = ["T"] * 3 + ["B"] * 2 + ["unassigned"] + ["B"] * 4


def test_confusion_matrix_shows_shares_of_each_true_type() -> None:
    figure = plot_confusion(TRUE, PREDICTED, title="probe")
    axes = figure.axes[0]
    assert np.asarray(axes.images[0].get_array()) == pytest.approx(np.array([[3 / 6, 2 / 6, 1 / 6], [0, 1, 0]]))
    assert [label.get_text() for label in axes.get_yticklabels()] == ["T (6)", "B (4)"]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["T", "B", "unassigned"]
    assert {text.get_text() for text in axes.texts} == {"50", "33", "17", "100"}
    assert is_inside(figure)


@pytest.mark.parametrize("n_types", [1, 2, 10, 21])
def test_all_labels_are_inside_the_figure(n_types: int) -> None:
    types = [f"CD4-positive, alpha-beta memory T cell {n}" for n in range(n_types)] * 2
    assert is_inside(plot_confusion(types, types[::-1]))
    assert is_inside(plot_f1(types, {"X_scgpt": types[::-1], "HVG + PCA": types}))


def test_f1_has_a_marker_per_type_and_method_and_the_mean_in_the_legend() -> None:
    figure = plot_f1(TRUE, {"one": PREDICTED, "two": TRUE})
    one, two = figure.axes[0].lines
    assert one.get_xdata() == pytest.approx([2 * 3 / 9, 2 * 4 / 10])
    assert two.get_xdata() == pytest.approx([1, 1])
    names = [text.get_text() for text in figure.legends[0].get_texts()]
    assert names == ["one (mean 0.733)", "two (mean 1.000)"]
    assert is_inside(figure)


@pytest.mark.parametrize("methods", [{}, {str(n): TRUE for n in range(9)}])
def test_zero_or_more_than_eight_methods_raise(methods: dict[str, list[str]]) -> None:
    with pytest.raises(ValueError, match=f"expected 1 to 8 methods, found {len(methods)}"):
        plot_f1(TRUE, methods)


def test_calibration_shows_accuracy_by_confidence_and_the_error() -> None:
    figure = plot_calibration([0.95, 0.85, 0.85, 0.15], [True, True, False, False], title="probe")
    upper, lower = figure.axes
    assert upper.lines[1].get_xdata() == pytest.approx([0.15, 0.85, 0.95])
    assert upper.lines[1].get_ydata() == pytest.approx([0, 0.5, 1])
    assert upper.get_title(loc="left") == "probe: expected calibration error 0.225"
    assert [patch.get_height() for patch in lower.patches] == [1, 2, 1]
    assert is_inside(figure)
