"""Integration scores: what each one is, against slow obvious versions, and what cannot be computed."""

import sys

import numpy as np
import pytest
from sklearn.metrics import silhouette_samples

from scgpt_hf.analysis.evaluation.metrics import BATCH, BIO, NotComputable, integration_scores, with_averages

rng = np.random.default_rng(0)
cell_labels = np.repeat(["a", "b", "c"], [50, 40, 30])
cell_batches = np.tile(["x", "y"], 60)
CELLS = (rng.normal(size=(120, 5)) + 2 * rng.normal(size=(3, 5))[np.repeat([0, 1, 2], [50, 40, 30])]).astype(np.float32)


def silhouette_of_batches() -> float:
    """Of each label, one minus the mean distance of its batches from lying over each other; the mean of these."""
    inside = [cell_labels == one for one in np.unique(cell_labels)]
    return float(np.mean([1 - np.abs(silhouette_samples(CELLS[own], cell_batches[own])).mean() for own in inside]))


def connectivity() -> float:
    """Of each label, the share of its cells that reach each other over steps to one of 15 nearest neighbours."""
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


def test_every_score_and_average_is_there_and_the_same_again(scores: dict[str, float]) -> None:
    assert list(scores) == [*BIO, *BATCH, "bio", "batch", "total"]
    assert all(0 <= score <= 1 for score in scores.values())
    assert integration_scores(CELLS, cell_labels, cell_batches) == scores


def test_silhouettes_and_connectivity_are_those_of_slow_versions(scores: dict[str, float]) -> None:
    assert scores["ASW label"] == pytest.approx((silhouette_samples(CELLS, cell_labels).mean() + 1) / 2, abs=1e-5)
    assert scores["ASW batch"] == pytest.approx(silhouette_of_batches(), abs=1e-5)
    assert scores["graph connectivity"] == pytest.approx(connectivity())


def test_averages_are_scibs(scores: dict[str, float]) -> None:
    assert scores["bio"] == pytest.approx(np.mean([scores[name] for name in BIO]))
    assert scores["batch"] == pytest.approx(np.mean([scores[name] for name in BATCH]))
    assert scores["total"] == pytest.approx(0.6 * scores["bio"] + 0.4 * scores["batch"])


def test_an_average_of_fewer_parts_is_not_given() -> None:
    assert with_averages(dict.fromkeys(BIO[1:], 1.0)) == dict.fromkeys(BIO[1:], 1.0)


def test_types_far_apart_with_mixed_batches_score_one() -> None:
    apart = CELLS * 0.01 + 100 * np.eye(5, dtype=np.float32)[np.repeat([0, 1, 2], [50, 40, 30])]
    perfect = integration_scores(apart, cell_labels, cell_batches, ["NMI", "ARI", "ASW label"])
    assert perfect["NMI"] == pytest.approx(1)
    assert perfect["ARI"] == pytest.approx(1)
    assert perfect["ASW label"] > 0.99


@pytest.mark.parametrize(
    ("metric", "labels", "batches", "cause"),
    [
        ("NMI", ["a"] * 120, cell_batches, "it compares several, and there is one label alone: 'a'"),
        ("ARI", ["a"] * 120, cell_batches, "one (label|batch) alone"),
        ("ASW label", ["a"] * 120, cell_batches, "one (label|batch) alone"),
        ("cLISI", ["a"] * 120, cell_batches, "one (label|batch) alone"),
        ("iLISI", cell_labels, ["x"] * 120, "it compares several, and there is one batch alone: 'x'"),
        ("ASW batch", cell_labels, ["x"] * 120, "one (label|batch) alone"),
        ("ASW batch", cell_labels, cell_labels, "no label has cells of several batches"),
        ("ASW label", ["rare", *cell_labels[1:]], cell_batches, "1 labels have one cell, e.g. 'rare'"),
        ("graph connectivity", ["rare", *cell_labels[1:]], cell_batches, "'rare'"),
    ],
)
def test_what_cannot_be_computed_names_metric_and_cause(
    metric: str, labels: list[str], batches: list[str], cause: str
) -> None:
    with pytest.raises(NotComputable, match=f"{metric} is not computable: .*{cause}") as caught:
        integration_scores(CELLS, labels, batches, [metric])
    assert caught.value.metric == metric


@pytest.mark.parametrize("metric", ["cLISI", "iLISI", "graph connectivity"])
def test_too_few_cells_for_their_neighbours(metric: str) -> None:
    with pytest.raises(
        NotComputable, match=f"{metric} is not computable: it takes .* neighbours of a cell, of 12 cells"
    ):
        integration_scores(CELLS[:12], ["a", "b"] * 6, ["x"] * 6 + ["y"] * 6, [metric])


@pytest.mark.parametrize(
    ("cells", "labels", "metrics", "message"),
    [
        (CELLS, cell_labels, ["AMI"], "no metric is called AMI; expected NMI, ARI"),
        (CELLS[:9], cell_labels, ["NMI"], r"shape \(120, features\), not empty, found \(9, 5\)"),
        (CELLS[:, :0], cell_labels, ["NMI"], "not empty"),
        (np.where(np.arange(120)[:, None] < 2, np.nan, CELLS), cell_labels, ["NMI"], "2 of 120 cells have no finite"),
        (CELLS, cell_labels[:5], ["NMI"], r"a label and a batch for each cell, found \(5,\), \(120,\)"),
    ],
)
def test_bad_input_raises(cells: np.ndarray, labels: np.ndarray, metrics: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        integration_scores(cells, labels, cell_batches, metrics)


def test_a_missing_scib_metrics_is_named_with_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scib_metrics", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "scgpt_hf\[metrics\]"'):
        integration_scores(CELLS, cell_labels, cell_batches, ["NMI"])
