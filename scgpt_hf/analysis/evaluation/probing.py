"""Predicts cell types from features: for cells of other donors, or of a query from a reference.

Two plain classifiers, so that the scores speak about the features: the 15 nearest neighbours, and a linear probe
(logistic regression). No cell is predicted by a classifier that saw its donor, and no cell is scored whose type its
classifier never saw: it could not be right. What predictions are worth, `classification.py` says.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scgpt_hf.analysis.evaluation.classification import f1_by_type
from scgpt_hf.analysis.evaluation.metrics import FloatArray, Labels, NotComputable, require_embedding

Positions = npt.NDArray[np.int64]
Classifier = Literal["kNN", "linear probe"]
CLASSIFIERS: tuple[Classifier, ...] = ("kNN", "linear probe")
N_FOLDS = 5
N_NEIGHBOURS = 15  # as scanpy.pp.neighbors
_ITERATIONS = 2_000


@dataclass(frozen=True)
class Predictions:
    """Types of the cells that could be scored, and how they came about.

    Attributes:
        cells: positions of the scored cells among those given, ascending. Shape (scored,).
        true: their types. Shape (scored,).
        predicted: types predicted for them. Shape (scored,).
        confidence: the classifier's probability of what it predicted. Shape (scored,).
        protocol: who was trained on whom, in words.
        left_out: types of the cells that were not scored → their number.
    """

    cells: Positions
    true: Labels
    predicted: Labels
    confidence: FloatArray
    protocol: str
    left_out: dict[str, int]

    @property
    def macro_f1(self) -> float:
        """Mean F1 over the types of the scored cells."""
        return float(np.mean(list(f1_by_type(self.true, self.predicted).values())))

    @property
    def accuracy(self) -> float:
        """Share of the scored cells that are right."""
        return float(np.mean(self.true == self.predicted))


def classification_scores(
    embedding: npt.ArrayLike, labels: npt.ArrayLike, donors: npt.ArrayLike, *, seed: int = 0
) -> dict[str, float]:
    """Return macro-F1 and accuracy of both classifiers, e.g. `scores["kNN macro-F1"]`; see `predict_held_out`."""
    scores: dict[str, float] = {}
    for classifier in CLASSIFIERS:
        predictions = predict_held_out(embedding, labels, donors, classifier, seed=seed)
        scores |= {f"{classifier} macro-F1": predictions.macro_f1, f"{classifier} accuracy": predictions.accuracy}
    return scores


def predict_held_out(
    features: npt.ArrayLike, labels: npt.ArrayLike, donors: npt.ArrayLike, classifier: Classifier, *, seed: int = 0
) -> Predictions:
    """Return the type of each cell as predicted by a classifier trained on the other donors.

    Donors are dealt to five folds of about equal size, or to as many as there are donors. Where there is one donor,
    its cells are dealt to five folds, each with its share of every type, and `protocol` says so.

    Args:
        features: finite. Shape (cells, features).
        labels: type of each cell. Shape (cells,).
        donors: donor of each cell. Shape (cells,).
        classifier: "kNN" or "linear probe".
        seed: deals the cells of a single donor.

    Raises:
        NotComputable: fewer than two types can be predicted for any cell.
        ValueError: values that are not finite, or not one label and donor for each cell.
    """
    labels, donors = np.asarray(labels, dtype=str), np.asarray(donors, dtype=str)
    if labels.shape != donors.shape:
        raise ValueError(f"expected a label and a donor for each cell, found {labels.shape}, {donors.shape}")
    features = require_embedding(features, len(labels))
    folds = list(_folds(labels, donors, seed))
    parts = []
    for train, test in folds:
        if len(set(labels[train])) > 1 and len(test := test[np.isin(labels[test], labels[train])]):
            parts.append((test, *_predict(features[train], labels[train], features[test], classifier)))
    n_donors = len(set(donors))
    whole = f"whole donors ({n_donors} donors)"
    single = "the cells of one donor, so effects of the donor are not tested"
    return _collect(parts, labels, classifier, f"{len(folds)} folds of {whole if n_donors > 1 else single}")


def predict_query(
    reference: npt.ArrayLike,
    reference_labels: npt.ArrayLike,
    query: npt.ArrayLike,
    query_labels: npt.ArrayLike,
    classifier: Classifier,
) -> Predictions:
    """Return the type of each query cell as predicted by a classifier trained on the reference.

    Cells of types that the reference lacks are not scored; `left_out` counts them.

    Args:
        reference: finite features of the cells learnt from. Shape (reference cells, features).
        reference_labels: their types. Shape (reference cells,).
        query: finite features of the same meaning. Shape (query cells, features).
        query_labels: the types that should be found. Shape (query cells,).
        classifier: "kNN" or "linear probe".

    Raises:
        NotComputable: reference and query share no type, or the reference has one type alone.
        ValueError: values that are not finite, or reference and query differ in features.
    """
    known, labels = np.asarray(reference_labels, dtype=str), np.asarray(query_labels, dtype=str)
    reference, query = require_embedding(reference, len(known)), require_embedding(query, len(labels))
    if reference.shape[1] != query.shape[1]:
        raise ValueError(
            f"the reference has {reference.shape[1]} features, the query {query.shape[1]}; embed both alike"
        )
    metric = f"{classifier} macro-F1"
    if not (shared := np.isin(labels, known)).any():
        found = f"{np.unique(known)[:5].tolist()} and {np.unique(labels)[:5].tolist()}"
        raise NotComputable(metric, f"reference and query share no type: {found}; give both the same names")
    if len(set(known)) < 2:
        raise NotComputable(metric, f"the reference has one type alone: {str(known[0])!r}")
    part = (np.flatnonzero(shared), *_predict(reference, known, query[shared], classifier))
    return _collect([part], labels, classifier, f"trained on {len(known):,} cells of the reference")


def _folds(labels: Labels, donors: Labels, seed: int) -> Iterator[tuple[Positions, Positions]]:
    """Yield the cells to train on and those to predict; nothing where every cell is alone of its type."""
    if (n_donors := len(set(donors))) > 1:
        yield from GroupKFold(min(N_FOLDS, n_donors)).split(labels, labels, donors)
    elif (n_folds := min(N_FOLDS, max(Counter(labels).values()))) > 1:
        with warnings.catch_warnings():  # a type of fewer cells than folds is in some of them, and scored there
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            yield from StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels)


def _predict(train: FloatArray, labels: Labels, test: FloatArray, classifier: Classifier) -> tuple[Labels, FloatArray]:
    """Return the predicted types and their probabilities, both (test cells,)."""
    if classifier == "kNN":
        model = KNeighborsClassifier(min(N_NEIGHBOURS, len(train)))
    else:
        model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_ITERATIONS))
    probabilities = model.fit(train, labels).predict_proba(test)
    return model.classes_[probabilities.argmax(axis=1)], np.minimum(probabilities.max(axis=1), 1)


def _collect(
    parts: list[tuple[Positions, Labels, FloatArray]], labels: Labels, classifier: Classifier, protocol: str
) -> Predictions:
    """Return the predictions of all folds, each of (positions, types, probabilities), in the order of the cells."""
    cells, predicted, confidence = (
        map(np.concatenate, zip(*parts, strict=True)) if parts else (np.empty(0, np.int64), labels[:0], np.empty(0))
    )
    if len(set(labels[cells])) < 2:
        cause = "fewer than two types can be predicted; each needs cells of two donors, or two cells of a single donor"
        raise NotComputable(f"{classifier} macro-F1", cause)
    order = np.argsort(cells)
    left_out = Counter(np.delete(labels, cells).tolist())
    return Predictions(
        cells[order], labels[cells[order]], predicted[order], confidence[order], protocol, dict(left_out)
    )
