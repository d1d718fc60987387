"""Predict cell types from features: of cells of held-out donors, or of a query from a labelled reference.

There are two simple classifiers, so that the scores measure the features and not the classifier: the 15 nearest
neighbors, and a linear probe (logistic regression). A third one belongs to the baseline of ranked genes: it chooses
genes by ANOVA and reduces them by PCA before the linear probe. No cell is predicted by a classifier that was trained on
its donor. Cells of a type that the classifier was not trained on are counted but not scored: no prediction could be
right.
"""

import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
from sklearn.decomposition import PCA
from sklearn.feature_selection import SelectKBest, f_classif
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scgpt_hf.cells.block import FloatArray
from scgpt_hf.scoring.classification import f1_by_type
from scgpt_hf.scoring.metrics import Labels, NotComputable, require_embedding

Positions = npt.NDArray[np.int64]
Classifier = Literal["kNN", "linear probe", "ANOVA probe"]
CLASSIFIERS: tuple[Classifier, ...] = ("kNN", "linear probe")
N_FOLDS = 5
N_NEIGHBORS = 15  # Source: default of scanpy.pp.neighbors
_MAX_ITERATIONS = 2_000  # sklearn's default of 100 can be too few for 2,000 genes
_ANOVA_GENES, _ANOVA_COMPONENTS = 1_000, 50  # our choice; arXiv:2602.16696 describes the steps


@dataclass(frozen=True)
class Predictions:
    """Predicted types of the cells that can be scored.

    Attributes:
        cells: positions of the scored cells among the given cells, ascending. Shape (scored cells,).
        true: their true types. Shape (scored cells,).
        predicted: their predicted types. Shape (scored cells,).
        confidence: the classifier's probability of the predicted type. Shape (scored cells,).
        protocol: which cells the classifier was trained on, in words.
        left_out: true type → number of its cells that are not scored.
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
        """Share of the scored cells whose prediction is right."""
        return float(np.mean(self.true == self.predicted))


def predict_held_out(
    features: npt.ArrayLike, labels: npt.ArrayLike, donors: npt.ArrayLike, classifier: Classifier, *, seed: int = 0
) -> Predictions:
    """Predict the type of each cell with a classifier that was trained on other donors (cross-validation).

    Donors are divided into five folds with about equal numbers of cells, or into one fold for each donor if there are
    fewer than five. If there is only one donor, its cells are divided into five folds, stratified by type, and
    `Predictions.protocol` states that effects of the donor are not tested.

    Args:
        features: features of the cells, finite. Shape (cells, features).
        labels: type of each cell. Shape (cells,).
        donors: donor of each cell. Shape (cells,).
        classifier: "kNN", "linear probe" or "ANOVA probe".
        seed: determines the folds of a single donor.

    Returns:
        Predictions for the cells whose type also occurs in the training cells of their fold.

    Raises:
        NotComputable: fewer than two types can be predicted.
        ValueError: the features are not finite, or the shapes differ.
    """
    labels, donors = np.asarray(labels, dtype=str), np.asarray(donors, dtype=str)
    if labels.shape != donors.shape:
        raise ValueError(f"expected a label and a donor for each cell, found shapes {labels.shape}, {donors.shape}")
    features = require_embedding(features, len(labels))
    folds = list(_folds(labels, donors, seed))
    parts = []
    for train, test in folds:
        if len(set(labels[train])) > 1 and len(test := test[np.isin(labels[test], labels[train])]):
            parts.append((test, *_predict(features[train], labels[train], features[test], classifier)))
    n_donors = len(set(donors))
    across_donors = f"{len(folds)} folds by donor ({n_donors} donors)"
    within_donor = f"{len(folds)} folds of cells of one donor, so effects of the donor are not tested"
    return _collect(parts, labels, classifier, across_donors if n_donors > 1 else within_donor)


def predict_query(
    reference: npt.ArrayLike,
    reference_labels: npt.ArrayLike,
    query: npt.ArrayLike,
    query_labels: npt.ArrayLike,
    classifier: Classifier,
) -> Predictions:
    """Predict the type of each query cell with a classifier that was trained on the reference.

    Query cells of types that the reference lacks are not scored; `Predictions.left_out` counts them.

    Args:
        reference: features of the reference cells, finite. Shape (reference cells, features).
        reference_labels: their types. Shape (reference cells,).
        query: features of the query cells, computed in the same way. Shape (query cells, features).
        query_labels: the true types of the query cells. Shape (query cells,).
        classifier: "kNN", "linear probe" or "ANOVA probe".

    Returns:
        Predictions for the query cells whose type occurs in the reference.

    Raises:
        NotComputable: reference and query have no type in common, or the reference has only one type.
        ValueError: features are not finite, or reference and query have different numbers of features.
    """
    known, labels = np.asarray(reference_labels, dtype=str), np.asarray(query_labels, dtype=str)
    reference, query = require_embedding(reference, len(known)), require_embedding(query, len(labels))
    if reference.shape[1] != query.shape[1]:
        raise ValueError(
            f"the reference has {reference.shape[1]} features, the query {query.shape[1]}; embed both with one model"
        )
    metric = f"{classifier} macro-F1"
    if not (shared := np.isin(labels, known)).any():
        found = f"{np.unique(known)[:5].tolist()} and {np.unique(labels)[:5].tolist()}"
        raise NotComputable(metric, f"reference and query have no type in common: {found}; use the same names in both")
    if len(set(known)) < 2:
        raise NotComputable(metric, f"the reference has only one type: {str(known[0])!r}")
    part = (np.flatnonzero(shared), *_predict(reference, known, query[shared], classifier))
    return _collect([part], labels, classifier, f"trained on {len(known):,} cells of the reference")


def _folds(labels: Labels, donors: Labels, seed: int) -> Iterator[tuple[Positions, Positions]]:
    """Yield (training cells, test cells) of each fold; nothing if a single donor has one cell of each type."""
    if (n_donors := len(set(donors))) > 1:
        yield from GroupKFold(min(N_FOLDS, n_donors)).split(labels, labels, donors)
    elif (n_folds := min(N_FOLDS, max(Counter(labels).values()))) > 1:
        with warnings.catch_warnings():
            # A type with fewer cells than folds is in some folds only, and is scored in those.
            warnings.filterwarnings("ignore", "The least populated class", UserWarning)
            yield from StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(labels, labels)


def _predict(train: FloatArray, labels: Labels, test: FloatArray, classifier: Classifier) -> tuple[Labels, FloatArray]:
    """Return the predicted types and their probabilities, both (test cells,)."""
    probe = LogisticRegression(max_iter=_MAX_ITERATIONS)
    if classifier == "kNN":
        model = KNeighborsClassifier(min(N_NEIGHBORS, len(train)))
    elif classifier == "linear probe":
        model = make_pipeline(StandardScaler(), probe)
    else:
        n_genes = min(_ANOVA_GENES, train.shape[1])
        components = PCA(min(_ANOVA_COMPONENTS, n_genes, len(train)), random_state=0)
        chosen = SelectKBest(_f_scores, k=n_genes)
        model = make_pipeline(StandardScaler(), chosen, components, StandardScaler(), probe)
    probabilities = model.fit(train, labels).predict_proba(test)
    # Rounding can make a probability exceed 1 by 1e-16, which the calibration would reject.
    return model.classes_[probabilities.argmax(axis=1)], np.minimum(probabilities.max(axis=1), 1)


def _f_scores(features: FloatArray, labels: Labels) -> FloatArray:
    """Return the F statistic of each feature between the labels; 0 for a constant one. Shape (features,)."""
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        warnings.filterwarnings("ignore", "Features .* are constant", UserWarning)
        scores: FloatArray = f_classif(features, labels)[0]
    scores[np.isnan(scores)] = 0.0
    return scores


def _collect(
    parts: list[tuple[Positions, Labels, FloatArray]], labels: Labels, classifier: Classifier, protocol: str
) -> Predictions:
    """Join the predictions of all folds, in the order of the cells.

    Args:
        parts: positions, predicted types and probabilities of each fold.
        labels: true type of each cell, also of those without a prediction. Shape (cells,).
        classifier: name of the classifier.
        protocol: which cells it was trained on, in words.
    """
    cells, predicted, confidence = (
        map(np.concatenate, zip(*parts, strict=True)) if parts else (np.empty(0, np.int64), labels[:0], np.empty(0))
    )
    if len(set(labels[cells])) < 2:
        cause = "fewer than two types can be predicted; each needs cells of two donors, or two cells of the only donor"
        raise NotComputable(f"{classifier} macro-F1", cause)
    order = np.argsort(cells)
    left_out = Counter(np.delete(labels, cells).tolist())
    return Predictions(
        cells[order], labels[cells[order]], predicted[order], confidence[order], protocol, dict(left_out)
    )
