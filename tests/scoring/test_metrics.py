"""Integration metrics: against slow, simple versions, and when they cannot be computed."""

import sys

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples

from scgpt_hf.scoring.metrics import BATCH, BIO, NotComputable, add_averages, integration_scores

rng = np.random.default_rng(0)
cell_labels = np.repeat(["a", "b", "c"], [50, 40, 30])
cell_batches = np.tile(["x", "y"], 60)
CELLS = (rng.normal(size=(120, 5)) + 2 * rng.normal(size=(3, 5))[np.repeat([0, 1, 2], [50, 40, 30])]).astype(np.float32)


def slow_asw_batch() -> float:
    """Mean over labels of 1 - |silhouette of the batches within the label|."""
    inside = [cell_labels == one for one in np.unique(cell_labels)]
    return float(np.mean([1 - np.abs(silhouette_samples(CELLS[own], cell_batches[own])).mean() for own in inside]))


def slow_graph_connectivity() -> float:
    """Mean over labels of the share of cells in the largest strongly connected component of the neighbor graph."""
    distances = np.linalg.norm(CELLS[:, None] - CELLS[None], axis=2)
    nearest = np.argsort(distances, axis=1)[:, :15]
    shares = []
    for one in np.unique(cell_labels):
        inside = set(np.flatnonzero(cell_labels == one).tolist())
        reached = {start: {start} for start in inside}
        for start in inside:
            front = [start]
            while front:
                steps = {int(cell) for cell in nearest[front.pop()]} & inside - reached[start]
                reached[start] |= steps
                front += steps
        shares.append(max(sum(a in reached[b] for b in reached[a]) for a in inside) / len(inside))
    return float(np.mean(shares))


@pytest.fixture(scope="module")
def scores() -> dict[str, float]:
    return integration_scores(CELLS, cell_labels, cell_batches)


def test_all_scores_and_averages_are_in_range_and_deterministic(scores: dict[str, float]) -> None:
    assert list(scores) == [*BIO, *BATCH, "bio", "batch", "total"]
    assert all(0 <= score <= 1 for score in scores.values())
    assert integration_scores(CELLS, cell_labels, cell_batches) == scores


def test_silhouettes_and_connectivity_equal_slow_versions(scores: dict[str, float]) -> None:
    assert scores["ASW label"] == pytest.approx((silhouette_samples(CELLS, cell_labels).mean() + 1) / 2, abs=1e-5)
    assert scores["ASW batch"] == pytest.approx(slow_asw_batch(), abs=1e-5)
    assert scores["graph connectivity"] == pytest.approx(slow_graph_connectivity())


def test_averages_are_those_of_scib(scores: dict[str, float]) -> None:
    assert scores["bio"] == pytest.approx(np.mean([scores[name] for name in BIO]))
    assert scores["batch"] == pytest.approx(np.mean([scores[name] for name in BATCH]))
    assert scores["total"] == pytest.approx(0.6 * scores["bio"] + 0.4 * scores["batch"])


def test_an_average_with_a_missing_part_is_not_computed() -> None:
    assert add_averages(dict.fromkeys(BIO[1:], 1.0)) == dict.fromkeys(BIO[1:], 1.0)


def test_separated_cell_types_score_one() -> None:
    apart = CELLS * 0.01 + 100 * np.eye(5, dtype=np.float32)[np.repeat([0, 1, 2], [50, 40, 30])]
    perfect = integration_scores(apart, cell_labels, cell_batches, ["NMI", "ARI", "ASW label"])
    assert perfect["NMI"] == pytest.approx(1)
    assert perfect["ARI"] == pytest.approx(1)
    assert perfect["ASW label"] > 0.99


@pytest.mark.parametrize(
    ("metric", "labels", "batches", "cause"),
    [
        ("NMI", ["a"] * 120, cell_batches, "it needs at least two label values, found only 'a'"),
        ("ARI", ["a"] * 120, cell_batches, "found only"),
        ("ASW label", ["a"] * 120, cell_batches, "found only"),
        ("cLISI", ["a"] * 120, cell_batches, "found only"),
        ("iLISI", cell_labels, ["x"] * 120, "it needs at least two batch values, found only 'x'"),
        ("ASW batch", cell_labels, ["x"] * 120, "found only"),
        ("ASW batch", cell_labels, cell_labels, "no label has cells of two batches"),
        ("ASW label", ["rare", *cell_labels[1:]], cell_batches, "1 labels have only one cell, e.g. 'rare'"),
        ("graph connectivity", ["rare", *cell_labels[1:]], cell_batches, "'rare'"),
    ],
)
def test_a_metric_that_cannot_be_computed_raises_with_the_cause(
    metric: str, labels: list[str], batches: list[str], cause: str
) -> None:
    with pytest.raises(NotComputable, match=f"{metric} cannot be computed: .*{cause}") as caught:
        integration_scores(CELLS, labels, batches, [metric])
    assert caught.value.metric == metric


@pytest.mark.parametrize("metric", ["cLISI", "iLISI", "graph connectivity"])
def test_metrics_of_neighbors_need_more_cells_than_neighbors(metric: str) -> None:
    with pytest.raises(NotComputable, match=r"needs .* neighbors of each cell, found 12 cells"):
        integration_scores(CELLS[:12], ["a", "b"] * 6, ["x"] * 6 + ["y"] * 6, [metric])


@pytest.mark.parametrize(
    ("cells", "labels", "metrics", "message"),
    [
        (CELLS, cell_labels, ["AMI"], "unknown metric AMI; expected NMI, ARI"),
        (CELLS[:9], cell_labels, ["NMI"], r"shape \(120, features\), not empty, found \(9, 5\)"),
        (CELLS[:, :0], cell_labels, ["NMI"], "not empty"),
        (
            np.where(np.arange(120)[:, None] < 2, np.nan, CELLS),
            cell_labels,
            ["NMI"],
            "2 of 120 cells have NaN or infinity",
        ),
        (CELLS, cell_labels[:5], ["NMI"], r"a label and a batch for each cell, found shapes \(5,\), \(120,\)"),
    ],
)
def test_invalid_input_raises(cells: np.ndarray, labels: np.ndarray, metrics: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integration_scores(cells, labels, cell_batches, metrics)


def test_missing_scib_metrics_raise_with_the_command_to_install_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "scgpt_hf\[metrics\]"'):
        integration_scores(CELLS, cell_labels, cell_batches, ["NMI"])
