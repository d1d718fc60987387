"""Integration metrics: does an embedding separate cell types (bio) and mix batches (batch)?

    NMI                 normalized mutual information of the labels and k-means clusters, k = number of labels
    ARI                 adjusted Rand index of the same two partitions; 0 by chance, and can be negative
    ASW label           (s + 1) / 2, with s the mean silhouette of the labels
    cLISI               (L - median LISI) / (L - 1), with L labels: 1 if all neighbors have the same label
    ASW batch           mean over labels of 1 - |silhouette of the batches within the label|
    iLISI               (median LISI - 1) / (B - 1), with B batches: 1 if neighbors come from all batches equally
    graph connectivity  mean over labels of the share of cells in the label's largest connected component, in the graph
                        of 15 nearest neighbors

Silhouettes use Euclidean distances. LISI, the local inverse Simpson's index, is the effective number of labels or
batches among 90 nearest neighbors. For all metrics higher is better, and 1 is the highest value. A metric that cannot
be computed raises `NotComputable` with the cause; it is never reported as 0. `probing.py` measures how well cell types
are predicted.

Source: Luecken et al. 2022, Nature Methods 19:41 (scIB: choice of the metrics, averages); Korsunsky et al. 2019, Nature
Methods 16:1289 (LISI). The metrics are computed by scib-metrics (https://github.com/YosefLab/scib-metrics), which
`pip install "scgpt_hf[metrics]"` installs. It clusters with k-means, where scIB optimizes a Louvain clustering.
"""

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from scgpt_hf.cells.block import FloatArray

Labels = npt.NDArray[np.str_]

BIO = ("NMI", "ARI", "ASW label", "cLISI")
BATCH = ("ASW batch", "iLISI", "graph connectivity")
AVERAGES = {"bio": BIO, "batch": BATCH, "total": ("bio", "batch")}
TOTAL_WEIGHTS = {"bio": 0.6, "batch": 0.4}  # Source: Luecken et al. 2022
_LISI_NEIGHBORS, _GRAPH_NEIGHBORS = 90, 15  # Source: scib_metrics.benchmark.Benchmarker


class NotComputable(ValueError):
    """A metric cannot be computed for the given cells.

    Attributes:
        metric: name of the metric.
        cause: what the cells lack.
    """

    def __init__(self, metric: str, cause: str) -> None:
        """Build the message from the metric and the cause."""
        super().__init__(f"{metric} cannot be computed: {cause}")
        self.metric, self.cause = metric, cause


def integration_scores(
    embedding: npt.ArrayLike, labels: npt.ArrayLike, batches: npt.ArrayLike, metrics: Sequence[str] = BIO + BATCH
) -> dict[str, float]:
    """Compute integration metrics and their averages. The result is deterministic.

    Args:
        embedding: embedding of the cells, finite. Shape (cells, features).
        labels: cell type of each cell. Shape (cells,).
        batches: batch of each cell, whose effect should be removed: a donor, a dataset. Shape (cells,).
        metrics: names from `BIO` and `BATCH`.

    Returns:
        Metric → score. The averages "bio", "batch" and "total" are included if all their parts are.

    Raises:
        NotComputable: one of the metrics cannot be computed for these cells.
        ValueError: a metric is unknown, the embedding is not finite, or the shapes differ.
        ModuleNotFoundError: scib-metrics is not installed.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> labels, batches = np.repeat(["T cell", "B cell"], 50), np.tile(["donor 1", "donor 2"], 50)
        >>> embedding = rng.normal(size=(100, 8)) + 5 * (labels == "B cell")[:, None]
        >>> integration_scores(embedding, labels, batches, ["NMI", "ARI"])  # doctest: +SKIP
        {'NMI': 1.0, 'ARI': 1.0}
    """
    scorers = integration_scorers(embedding, labels, batches)
    if unknown := sorted(set(metrics) - set(scorers)):
        raise ValueError(f"unknown metric {', '.join(unknown)}; expected {', '.join(scorers)}")
    return add_averages({name: scorers[name]() for name in metrics})


def integration_scorers(
    embedding: npt.ArrayLike, labels: npt.ArrayLike, batches: npt.ArrayLike
) -> dict[str, Callable[[], float]]:
    """Return a function for each metric of `BIO` and `BATCH`, which computes it when called.

    The functions share neighbors and clusters. For the arguments and errors see `integration_scores`.
    """
    cells = _Cells(embedding, labels, batches)
    return {
        "NMI": lambda: cells.cluster_agreement("NMI"),
        "ARI": lambda: cells.cluster_agreement("ARI"),
        "ASW label": cells.asw_label,
        "cLISI": lambda: cells.lisi("cLISI", cells.labels, "label"),
        "ASW batch": cells.asw_batch,
        "iLISI": lambda: cells.lisi("iLISI", cells.batches, "batch"),
        "graph connectivity": cells.graph_connectivity,
    }


def add_averages(scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores with the averages whose parts are all among them.

    "bio" and "batch" are plain means; total = 0.6 bio + 0.4 batch.

    Source: Luecken et al. 2022.
    """
    averaged = dict(scores)
    for name, parts in AVERAGES.items():
        if all(part in averaged for part in parts):
            weights = [TOTAL_WEIGHTS.get(part, 1.0) for part in parts]
            averaged[name] = float(np.average([averaged[part] for part in parts], weights=weights))
    return averaged


def require_embedding(embedding: npt.ArrayLike, n_cells: int) -> FloatArray:
    """Return an embedding as float32 after checking it. Shape (cells, features).

    Raises:
        ValueError: it is not a matrix with a row for each cell, is empty, or is not finite.
    """
    embedding = np.asarray(embedding, dtype=np.float32)
    if embedding.ndim != 2 or len(embedding) != n_cells or not embedding.size:
        raise ValueError(f"expected an embedding of shape ({n_cells:,}, features), not empty, found {embedding.shape}")
    if n_wrong := int((~np.isfinite(embedding)).any(axis=1).sum()):
        raise ValueError(
            f"{n_wrong:,} of {n_cells:,} cells have NaN or infinity in their embedding; leave them out or embed again"
        )
    return embedding


class _Cells:
    """The cells to score. Neighbors and clusters are computed once, when a metric first needs them."""

    def __init__(self, embedding: npt.ArrayLike, labels: npt.ArrayLike, batches: npt.ArrayLike) -> None:
        self.labels, self.batches = np.asarray(labels, dtype=str), np.asarray(batches, dtype=str)
        if self.labels.shape != self.batches.shape:
            raise ValueError(
                f"expected a label and a batch for each cell, found shapes {self.labels.shape}, {self.batches.shape}"
            )
        self.embedding = require_embedding(embedding, len(self.labels))
        self._neighbors: tuple[npt.NDArray[np.int64], FloatArray] | None = None
        self._cluster_agreement: dict[str, float] | None = None

    def cluster_agreement(self, metric: str) -> float:
        """Return NMI or ARI of the labels and k-means clusters."""
        self._require_two(metric, self.labels, "label")
        if self._cluster_agreement is None:
            self._cluster_agreement = _scib().nmi_ari_cluster_labels_kmeans(self.embedding, self.labels)
        return _require_score(metric, self._cluster_agreement[metric.lower()])

    def asw_label(self) -> float:
        self._require_two("ASW label", self.labels, "label")
        self._require_no_single_cell("ASW label")
        return _require_score("ASW label", _scib().silhouette_label(self.embedding, self.labels))

    def asw_batch(self) -> float:
        """Return the silhouette of the batches within each label. Labels with one batch say nothing about mixing."""
        self._require_two("ASW batch", self.batches, "batch")
        # A silhouette needs at least two clusters, and one of them with two cells.
        scorable = [
            name
            for name in np.unique(self.labels)
            if 1 < len(set(self.batches[self.labels == name])) < (self.labels == name).sum()
        ]
        if not scorable:
            raise NotComputable("ASW batch", "no label has cells of two batches, one of them with two cells")
        score = _scib().silhouette_batch(self.embedding, self.labels, self.batches)
        return _require_score("ASW batch", score)

    def lisi(self, metric: str, values: Labels, kind: str) -> float:
        """Return cLISI for labels, or iLISI for batches."""
        self._require_two(metric, values, kind)
        self._require_neighbors(metric, _LISI_NEIGHBORS)
        compute = {"cLISI": _scib().clisi_knn, "iLISI": _scib().ilisi_knn}[metric]
        return _require_score(metric, compute(self._nearest(_LISI_NEIGHBORS), values))

    def graph_connectivity(self) -> float:
        self._require_no_single_cell("graph connectivity")
        self._require_neighbors("graph connectivity", _GRAPH_NEIGHBORS)
        score = _scib().graph_connectivity(self._nearest(_GRAPH_NEIGHBORS), self.labels)
        return _require_score("graph connectivity", score)

    def _nearest(self, n_neighbors: int) -> Any:
        """Return the exact nearest neighbors of each cell, the first of which is the cell itself."""
        from scib_metrics.nearest_neighbors import NeighborsResults
        from sklearn.neighbors import NearestNeighbors

        if self._neighbors is None:
            most = min(_LISI_NEIGHBORS, len(self.labels))
            distances, indices = NearestNeighbors(n_neighbors=most).fit(self.embedding).kneighbors(self.embedding)
            self._neighbors = indices, distances
        indices, distances = (array[:, :n_neighbors] for array in self._neighbors)
        return NeighborsResults(indices=indices, distances=distances)

    def _require_neighbors(self, metric: str, n_neighbors: int) -> None:
        if len(self.labels) <= n_neighbors:
            raise NotComputable(
                metric, f"it needs {n_neighbors} neighbors of each cell, found {len(self.labels):,} cells"
            )

    def _require_two(self, metric: str, values: Labels, kind: str) -> None:
        if len(names := np.unique(values)) < 2:
            raise NotComputable(metric, f"it needs at least two {kind} values, found only {str(names[0])!r}")

    def _require_no_single_cell(self, metric: str) -> None:
        names, sizes = np.unique(self.labels, return_counts=True)
        if (single := names[sizes == 1]).size:
            raise NotComputable(
                metric, f"{len(single)} labels have only one cell, e.g. {str(single[0])!r}; leave them out"
            )


def _require_score(metric: str, score: Any) -> float:
    """Return a score. Raise NotComputable if it is out of range: scib-metrics can return NaN, or a LISI below 1."""
    if not (-1 if metric == "ARI" else -1e-6) <= score <= 1 + 1e-6:
        raise NotComputable(metric, f"scib-metrics returned {score}")
    return float(score)


def _scib() -> Any:
    """Import scib-metrics only when it is needed, because the import takes seconds."""
    try:
        with warnings.catch_warnings():  # umap warns if tensorflow is not installed, which nothing here needs
            warnings.simplefilter("ignore", ImportWarning)
            import scib_metrics
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'{error.name} is not installed, which integration metrics need: pip install "scgpt_hf[metrics]"'
        ) from error
    return scib_metrics
