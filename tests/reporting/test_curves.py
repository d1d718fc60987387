"""Tests of the loss curves."""

import itertools
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes

from scgpt_hf.reporting.curves import plot_cell_types, plot_loss, spread_labels

Lines = list[dict[str, Any]]
BASELINES = {"eval_constant_mse": 208.0, "eval_gene_mean_mse": 120.0, "eval_tie_floor_mse": 44.0}


def a_run() -> Lines:
    """Return 60 training lines of two epochs, with a validation after each; the first one is better."""
    training = [
        {"step": s, "epoch": s / 30, "loss": 300.0 - s, "gep": 150.0 - s, "gepc": 150.0, "grad_norm": 1.0}
        for s in range(1, 61)
    ]
    validation = [
        {"step": 30, "epoch": 1.0, "eval_loss": 200.0, "eval_gep_mse": 95.0, "eval_gepc_mse": 105.0, **BASELINES},
        {"step": 60, "epoch": 2.0, "eval_loss": 210.0, "eval_gep_mse": 94.0, "eval_gepc_mse": 116.0, **BASELINES},
    ]
    return [*training, *validation, {"step": 60, "epoch": 2.0, "train_runtime": 9.0, "train_loss": 1.0}]


def line(axes: Axes, label: str) -> tuple[list[float], list[float]]:
    (found,) = [line for line in axes.lines if line.get_label() == label]
    return list(np.atleast_1d(found.get_xdata())), list(np.atleast_1d(found.get_ydata()))


def test_training_panel_draws_total_and_objectives_only() -> None:
    axes = plot_loss(a_run()).axes[0]
    assert [line.get_label() for line in axes.lines if not line.get_label().startswith("_")] == ["loss", "gep", "gepc"]
    epochs, values = line(axes, "gep")
    assert epochs == [s / 30 for s in range(1, 61)]
    assert values == [150.0 - s for s in range(1, 61)]
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
    assert [text.get_text() for text in axes.texts] == ["total 240", "GEP 90", "GEPC 150"]


def test_validation_panel_draws_errors_baselines_and_best_step() -> None:
    axes = plot_loss(a_run()).axes[1]
    assert line(axes, "gep") == ([1.0, 2.0], [95.0, 94.0])
    assert line(axes, "gepc") == ([1.0, 2.0], [105.0, 116.0])
    for label, height in {"constant": 208.0, "gene mean": 120.0, "tie floor": 44.0}.items():
        assert set(line(axes, label)[1]) == {height}
    assert line(axes, "best gep") == ([1.0], [95.0])  # by eval_loss, though its GEP is not the lowest
    assert axes.get_title(loc="left") == "Validation error (○ best, step 30)"
    assert axes.get_ylabel() == "mean squared error"
    assert axes.get_ylim()[0] == 0


def test_labels_are_inside_the_figure_and_do_not_overlap() -> None:
    figure = plot_loss(a_run())
    figure.draw_without_rendering()
    for axes in figure.axes:
        boxes = sorted((text.get_window_extent() for text in axes.texts), key=lambda box: box.y0)
        assert all(lower.y1 < upper.y0 for lower, upper in itertools.pairwise(boxes))
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_losses_of_different_magnitude_get_a_logarithmic_scale() -> None:
    assert plot_loss(a_run()).axes[0].get_yscale() == "linear"
    assert plot_loss([one | {"ecs": 0.5} for one in a_run() if "gep" in one]).axes[0].get_yscale() == "log"


def test_total_of_a_single_objective_is_not_drawn_twice() -> None:
    axes = plot_loss([{"step": 1, "epoch": 0.5, "loss": 9.0, "gep": 9.0}]).axes[0]
    assert [text.get_text() for text in axes.texts] == ["GEP 9"]


def test_panel_without_data_is_left_out() -> None:
    assert len(plot_loss([one for one in a_run() if "gep" in one]).axes) == 1
    (axes,) = plot_loss([{"step": 30, "epoch": 1.0, "eval_gep_mse": 95.0}]).axes
    assert [text.get_text() for text in axes.texts] == ["GEP 95"]


def test_losses_that_are_not_finite_are_left_out() -> None:
    run = [{"step": s, "epoch": float(s), "loss": value} for s, value in enumerate([3.0, float("nan"), 2.0])]
    assert line(plot_loss(run).axes[0], "loss") == ([0.0, 2.0], [3.0, 2.0])


@pytest.mark.parametrize("metrics", [[], [{"step": 1, "epoch": 0.1, "learning_rate": 1e-4}]])
def test_metrics_without_losses_raise(metrics: Lines) -> None:
    with pytest.raises(ValueError, match="has a loss"):
        plot_loss(metrics)


@settings(deadline=None)
@given(st.lists(st.floats(0, 1), max_size=8))
def test_spread_labels_keeps_order_and_gap_and_moves_no_label_needlessly(heights: list[float]) -> None:
    given_heights, gap = np.array(heights), 0.1
    apart = spread_labels(given_heights, gap)
    order = np.argsort(given_heights, kind="stable")
    assert (np.diff(apart[order]) >= gap - 1e-9).all()
    assert apart.sum() == pytest.approx(given_heights.sum() if len(heights) else 0)
    if (np.diff(given_heights[order]) >= gap).all():
        assert apart == pytest.approx(given_heights)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(0, 1), min_size=2, max_size=4), st.integers(0, 2**32 - 1))
def test_spread_labels_finds_the_closest_arrangement_labels(heights: list[float], seed: int) -> None:
    heights_sorted, gap = np.sort(heights), 0.2
    apart = spread_labels(heights_sorted, gap)
    rivals = np.sort(np.random.default_rng(seed).uniform(-0.5, 1.5, (500, len(heights))), axis=1)
    rivals = rivals[(np.diff(rivals, axis=1) >= gap).all(axis=1)]
    assert (((rivals - heights_sorted) ** 2).sum(axis=1) >= ((apart - heights_sorted) ** 2).sum() - 1e-12).all()


def test_the_step_of_the_kept_model_is_marked() -> None:
    axes = plot_loss(a_run(), best_step=60).axes[1]
    assert "best, step 60" in axes.get_title(loc="left")
    assert line(axes, "best gep") == ([2.0], [94.0])


def test_scores_of_cell_types_are_drawn_beside_pca() -> None:
    scores = {"eval_knn_macro_f1": 0.8, "eval_nmi": 0.5, "eval_pca_knn_macro_f1": 0.9, "eval_pca_nmi": 0.7}
    lines = a_run()
    lines[-3] |= scores
    lines[-2] |= {**scores, "eval_nmi": 0.6}
    knn, nmi = plot_cell_types(lines).axes
    assert (knn.get_title(loc="left"), nmi.get_title(loc="left")) == ("kNN macro-F1", "NMI")
    assert line(nmi, "PCA")[1] == [0.7, 0.7]
    assert list(nmi.lines[-1].get_ydata()) == [0.5, 0.6]
    with pytest.raises(ValueError, match="no line of 63 has a score"):
        plot_cell_types(a_run())
