"""Tests of UMAPs, tables of scores, and saving figures."""

import os
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.figure import Figure

from scgpt_hf.reporting.plots import OTHER, PALETTE, plot_scores, plot_umap, save_figure
from tests.support.figures import is_inside


def legend_of(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def colors_of(axes: Axes) -> set[str]:
    return {to_hex(color).upper() for color in axes.collections[0].get_facecolors()}


@settings(deadline=None, max_examples=10)
@given(st.lists(st.sampled_from("abcdefgh"), min_size=1, max_size=60))
def test_legend_counts_every_cell_once_largest_first(categories: list[str]) -> None:
    axes = plot_umap(np.zeros((len(categories), 2)), {"type": categories}).axes[0]
    counts = sorted(((categories.count(name), name) for name in set(categories)), key=lambda pair: (-pair[0], pair[1]))
    assert legend_of(axes) == [f"{name} ({count})" for count, name in counts]
    assert len(axes.collections[0].get_offsets()) == len(categories)
    assert len(colors_of(axes)) == len(counts)


def test_points_keep_position_and_color_when_drawn_in_shuffled_order() -> None:
    coordinates = np.arange(40.0).reshape(20, 2)
    categories = ["a"] * 12 + ["b"] * 8
    points = plot_umap(coordinates, {"type": categories}).axes[0].collections[0]
    color_at = dict(zip(map(tuple, points.get_offsets()), points.get_facecolors(), strict=True))
    for place, category in zip(coordinates, categories, strict=True):
        assert color_at[tuple(place)][:3] == pytest.approx(to_rgb(PALETTE["ab".index(category)]))
    assert points.get_rasterized()


def test_smallest_categories_beyond_twenty_are_merged_and_missing_labels_listed() -> None:
    names = [f"type {i:02}" for i in range(23) for _ in range(23 - i)]
    categories = [*names, None, float("nan")]
    axes = plot_umap(np.zeros((len(categories), 2)), {"type": categories}).axes[0]
    legend = legend_of(axes)
    assert len(legend) == 19 + 2
    assert legend[0] == "type 00 (23)"
    assert legend[-2:] == ["4 other (10)", "unlabelled (2)"]
    assert colors_of(axes) == {*PALETTE[:19], OTHER}


def test_twenty_categories_are_all_listed() -> None:
    names = [f"type {i:02}" for i in range(20)]
    axes = plot_umap(np.zeros((20, 2)), {"type": names}).axes[0]
    assert legend_of(axes) == [f"{name} (1)" for name in names]
    assert len(colors_of(axes)) == 20


def test_panels_are_stacked_with_equal_size_and_aspect_and_no_ticks() -> None:
    coordinates = np.random.default_rng(0).normal(size=(30, 2)) * [5, 1]
    figure = plot_umap(
        coordinates, {"cell type": ["a long name of a cell type"] * 30, "donor": ["d"] * 30}, title="run"
    )
    figure.draw_without_rendering()
    upper, lower = figure.axes
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["cell type", "donor"]
    assert figure.get_suptitle() == "run"
    assert upper.bbox.size == pytest.approx(lower.bbox.size)
    assert upper.bbox.x0 == pytest.approx(lower.bbox.x0)
    assert lower.title.get_window_extent().y1 < upper.bbox.y0
    assert upper.get_aspect() == 1
    assert not upper.get_xticks().size + upper.get_yticks().size
    assert (upper.get_xlabel(), upper.get_ylabel()) == ("UMAP 1", "UMAP 2")
    assert upper.get_legend().get_window_extent().x1 <= figure.bbox.x1


@pytest.mark.parametrize(
    ("coordinates", "panels", "message"),
    [
        (np.zeros((3, 3)), {"a": ["x"] * 3}, r"shape \(cells, 2\).*found \(3, 3\)"),
        (np.zeros((0, 2)), {"a": []}, "at least one cell"),
        (np.array([[0, np.nan]]), {"a": ["x"]}, "1 of 1 cells have coordinates that are not finite"),
        (np.zeros((3, 2)), {}, "no panel"),
        (np.zeros((3, 2)), {"donor": ["x"]}, "'donor' has 1 categories for 3 cells"),
    ],
)
def test_invalid_input_raises(coordinates: np.ndarray, panels: dict[str, list[str]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_umap(coordinates, panels)


@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml"), (".pdf", b"%PDF")])
def test_save_figure_writes_one_file_in_the_format_of_its_suffix(tmp_path: Path, suffix: str, start: bytes) -> None:
    before = dict(matplotlib.rcParams)
    save_figure(plot_umap(np.zeros((2, 2)), {"type": ["naïve B", "T"]}), tmp_path / f"umap{suffix}")
    assert [path.name for path in tmp_path.iterdir()] == [f"umap{suffix}"]
    written = (tmp_path / f"umap{suffix}").read_bytes()
    assert written.startswith(start)
    assert suffix != ".svg" or "naïve B" in written.decode()  # text that can be searched and edited
    assert dict(matplotlib.rcParams) == before


def test_save_figure_raises_for_other_suffixes(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'umap\.jpg'"):
        save_figure(Figure(), tmp_path / "umap.jpg")


def test_failed_save_leaves_only_the_old_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "umap.png"
    path.write_bytes(b"old")

    def full_disk(self: Figure, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Figure, "savefig", full_disk)
    with pytest.raises(OSError, match="No space left"):
        save_figure(Figure(), path)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("umap.png", b"old")]


def test_figures_are_not_registered_in_pyplot() -> None:
    matplotlib.use("agg")
    from matplotlib import pyplot

    plot_umap(np.zeros((1, 2)), {"type": ["a"]})
    assert pyplot.get_fignums() == []


def test_scores_show_the_best_in_bold_and_missing_ones_as_a_dash() -> None:
    scores = {"X_scgpt": {"NMI": 0.5, "ARI": 0.25}, "HVG + PCA": {"NMI": 0.75}}
    figure = plot_scores(scores, {"kept apart": ["NMI", "ARI"], "mixed": ["iLISI"]}, title="cells")
    texts = {text.get_text(): text.get_weight() for text in figure.axes[0].texts}
    assert texts["0.750"] == "bold"
    assert texts["0.500"] == "normal"
    assert {"–", "kept apart", "X_scgpt", "cells"} <= texts.keys()
    assert "mixed" not in texts
    assert is_inside(figure)
    with pytest.raises(ValueError, match="NMI"):
        plot_scores({"a": {}}, {"all": ["NMI"]})
