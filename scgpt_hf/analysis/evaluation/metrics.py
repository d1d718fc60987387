"""How well an embedding keeps cell types together and batches mixed, by scib-metrics: its scores and their averages.

Every score is a number of which higher is better, at most 1, at least 0 (ARI: 0 is chance, less is possible), or it is
a `NotComputable` that names the metric and the cause: none is ever 0 because it could not be computed. How well types
are predicted, `probing.py` says.

Source of the choice and the averages: Luecken et al. 2022, Nature Methods 19:41 (scIB); the code is scib-metrics,
Gayoso et al., github.com/YosefLab/scib-metrics, an extra: pip install "scgpt_hf[metrics]".
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.floating[Any]]
Labels = npt.NDArray[np.str_]

BIO = ("NMI", "ARI", "ASW label", "cLISI")
BATCH = ("ASW batch", "iLISI", "graph connectivity")
AVERAGES = {"bio": BIO, "batch": BATCH, "total": ("bio", "batch")}
TOTAL_WEIGHTS = {"bio": 0.6, "batch": 0.4}  # Luecken et al. 2022
_LISI_NEIGHBOURS, _GRAPH_NEIGHBOURS = 90, 15  # as scib_metrics.benchmark.Benchmarker


class NotComputable(ValueError):
    """A score that these cells do not allow.

    Attributes:
        metric: its name.
        cause: what the cells lack.
    """

    def __init__(self, metric: str, cause: str) -> None:
        """Name the metric and the cause."""
        super().__init__(f"{metric} is not computable: {cause}")
        self.metric, self.cause = metric, cause


def integration_scores(
    embedding: npt.ArrayLike, labels: npt.ArrayLike, batches: npt.ArrayLike, metrics: Sequence[str] = BIO + BATCH
) -> dict[str, float]:
    """Return the scores by name, and the averages "bio", "batch" and "total" of which every part is among them.

    NMI and ARI compare the labels with k-means clusters, k the number of labels; ASW is the silhouette by Euclidean
    distance, of labels, or of batches within labels; LISI counts the labels or batches among 90 neighbours; graph
    connectivity is the share of each label's cells in its largest part of the graph of 15 neighbours. Deterministic.

    Args:
        embedding: finite. Shape (cells, features).
        labels: cell type of each cell. Shape (cells,).
        batches: batch of each cell, whose effect should be gone: a donor, a data set. Shape (cells,).
        metrics: which scores, of `BIO` and `BATCH`.

    Raises:
        NotComputable: the cells do not allow one of the metrics.
        ValueError: an unknown metric, values that are not finite, or not one label and batch for each cell.
        ModuleNotFoundError: scib-metrics is not installed.
    """
    scorers = integration_scorers(embedding, labels, batches)
    if unknown := sorted(set(metrics) - set(scorers)):
        raise ValueError(f"no metric is called {', '.join(unknown)}; expected {', '.join(scorers)}")
    return with_averages({name: scorers[name]() for name in metrics})


def integration_scorers(
    embedding: npt.ArrayLike, labels: npt.ArrayLike, batches: npt.ArrayLike
) -> dict[str, Callable[[], float]]:
    """Return a function for each metric of `BIO` and `BATCH`, called for its score; see `integration_scores`."""
    cells = _Cells(embedding, labels, batches)
    return {
        "NMI": lambda: cells.agreement("NMI"),
        "ARI": lambda: cells.agreement("ARI"),
        "ASW label": cells.asw_label,
        "cLISI": lambda: cells.lisi("cLISI", cells.labels, "label"),
        "ASW batch": cells.asw_batch,
        "iLISI": lambda: cells.lisi("iLISI", cells.batches, "batch"),
        "graph connectivity": cells.graph_connectivity,
    }


def with_averages(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores and those averages of which every part is among them.

    Source: Luecken et al. 2022: plain means of each kind, total = 0.6 bio + 0.4 batch.
    """
    averaged = dict(scores)
    for name, parts in AVERAGES.items():
        if all(part in averaged for part in parts):
            weights = [TOTAL_WEIGHTS.get(part, 1.0) for part in parts]
            averaged[name] = float(np.average([averaged[part] for part in parts], weights=weights))
    return averaged


def require_embedding(embedding: npt.ArrayLike, n_cells: int) -> FloatArray:
    """Return the embedding as float32 (cells, features), or raise.

    Raises:
        ValueError: it is not a finite matrix with a row for each cell, and at least one of them.
    """
    embedding = np.asarray(embedding, dtype=np.float32)
    if embedding.ndim != 2 or len(embedding) != n_cells or not embedding.size:
        raise ValueError(f"expected an embedding of shape ({n_cells:,}, features), not empty, found {embedding.shape}")
    if n_wrong := int((~np.isfinite(embedding)).any(axis=1).sum()):
        raise ValueError(f"{n_wrong:,} of {n_cells:,} cells have no finite embedding; leave them out or embed again")
    return embedding


class _Cells:
    """Cells that are scored; neighbours and clusters are found when first needed, and kept for the next metric."""

    def __init__(self, embedding: npt.ArrayLike, labels: npt.ArrayLike, batches: npt.ArrayLike) -> None:
        self.labels, self.batches = np.asarray(labels, dtype=str), np.asarray(batches, dtype=str)
        if self.labels.shape != self.batches.shape:
            raise ValueError(
                f"expected a label and a batch for each cell, found {self.labels.shape}, {self.batches.shape}"
            )
        self.embedding = require_embedding(embedding, len(self.labels))
        self._neighbours: tuple[npt.NDArray[np.int64], FloatArray] | None = None
        self._agreement: dict[str, float] | None = None

    def agreement(self, metric: str) -> float:
        """Of k-means clusters and labels."""
        self._require_two(metric, self.labels, "label")
        if self._agreement is None:
            self._agreement = _scib().nmi_ari_cluster_labels_kmeans(self.embedding, self.labels)
        return _checked(metric, self._agreement[metric.lower()])

    def asw_label(self) -> float:
        self._require_two("ASW label", self.labels, "label")
        self._require_no_singleton("ASW label")
        return _checked("ASW label", _scib().silhouette_label(self.embedding, self.labels))

    def asw_batch(self) -> float:
        """Silhouette of batches within each label that has several; labels of one batch say nothing about mixing."""
        self._require_two("ASW batch", self.batches, "batch")
        mixed = [
            name
            for name in np.unique(self.labels)
            if 1 < len(set(self.batches[self.labels == name])) < (self.labels == name).sum()
        ]
        if not mixed:
            raise NotComputable("ASW batch", "no label has cells of several batches, two of one of them")
        score = _scib().silhouette_batch(self.embedding, self.labels, self.batches)
        return _checked("ASW batch", score)

    def lisi(self, metric: str, of: Labels, kind: str) -> float:
        self._require_two(metric, of, kind)
        if len(self.labels) <= _LISI_NEIGHBOURS:
            raise NotComputable(metric, f"it takes {_LISI_NEIGHBOURS} neighbours of a cell, of {len(of):,} cells")
        score = {"cLISI": _scib().clisi_knn, "iLISI": _scib().ilisi_knn}[metric](self._nearest(_LISI_NEIGHBOURS), of)
        return _checked(metric, score)

    def graph_connectivity(self) -> float:
        self._require_no_singleton("graph connectivity")
        if len(self.labels) <= _GRAPH_NEIGHBOURS:
            cause = f"it takes {_GRAPH_NEIGHBOURS} neighbours of a cell, of {len(self.labels):,} cells"
            raise NotComputable("graph connectivity", cause)
        score = _scib().graph_connectivity(self._nearest(_GRAPH_NEIGHBOURS), self.labels)
        return _checked("graph connectivity", score)

    def _nearest(self, n_neighbours: int) -> Any:
        """Return scib-metrics' neighbours, exact, each cell its own first."""
        from scib_metrics.nearest_neighbors import NeighborsResults
        from sklearn.neighbors import NearestNeighbors

        if self._neighbours is None:
            most = min(_LISI_NEIGHBOURS, len(self.labels))
            distances, indices = NearestNeighbors(n_neighbors=most).fit(self.embedding).kneighbors(self.embedding)
            self._neighbours = indices, distances
        indices, distances = (array[:, :n_neighbours] for array in self._neighbours)
        return NeighborsResults(indices=indices, distances=distances)

    def _require_two(self, metric: str, of: Labels, kind: str) -> None:
        if len(names := np.unique(of)) < 2:
            raise NotComputable(metric, f"it compares several, and there is one {kind} alone: {str(names[0])!r}")

    def _require_no_singleton(self, metric: str) -> None:
        names, sizes = np.unique(self.labels, return_counts=True)
        if (alone := names[sizes == 1]).size:
            raise NotComputable(metric, f"{len(alone)} labels have one cell, e.g. {str(alone[0])!r}; leave them out")


def _checked(metric: str, score: Any) -> float:
    """Return the score, if it is one: scib-metrics may give NaN, or a LISI below one."""
    if not (-1 if metric == "ARI" else -1e-6) <= score <= 1 + 1e-6:
        raise NotComputable(metric, f"scib-metrics gave {score}")
    return float(score)


def _scib() -> Any:
    """Import scib-metrics, which takes seconds, when a score is first asked for."""
    try:
        with warnings.catch_warnings():  # umap says that tensorflow is not there, which nobody asked
            warnings.simplefilter("ignore", ImportWarning)
            import scib_metrics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is not installed, which integration scores need: pip install "scgpt_hf[metrics]"'
        ) from error
    return scib_metrics
