"""Score the embedding of held-out labelled cells with a few metrics that take seconds, to watch a training.

The metrics are those of an evaluation (`metrics.py`, `probing.py`), under names that fit a log.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from scgpt_hf.scoring.metrics import Labels, NotComputable, integration_scorers
from scgpt_hf.scoring.normalization import keep_torch_threads
from scgpt_hf.scoring.probing import predict_held_out

# Name in the log → name in an evaluation. For all of them, higher is better.
EMBEDDING_SCORES = {"knn_macro_f1": "kNN macro-F1", "nmi": "NMI", "asw_label": "ASW label", "ilisi": "iLISI"}


class LabelledCells(NamedTuple):
    """Labelled cells to score embeddings on.

    Attributes:
        cell_ids: their ids, ascending, int64 (cells,).
        labels: their cell types. Shape (cells,).
        donors: their donors; types are predicted for donors that the classifier was not trained on. Shape (cells,).
        batches: their experimental batches, whose mixing is measured. Shape (cells,).
    """

    cell_ids: npt.NDArray[np.int64]
    labels: Labels
    donors: Labels
    batches: Labels


@keep_torch_threads()
def score_embedding(
    embedding: npt.NDArray[np.float32], cells: LabelledCells, seed: int = 0
) -> tuple[dict[str, float], dict[str, str]]:
    """Compute the scores of `EMBEDDING_SCORES`.

    Args:
        embedding: finite, float32 (cells, features).
        cells: the embedded cells.
        seed: determines the folds of a single donor.

    Returns:
        Name → score, and name → why a score cannot be computed.

    Raises:
        ValueError: the embedding is not finite, or has another number of rows.
        ModuleNotFoundError: scib-metrics is not installed.
    """
    integration = integration_scorers(embedding, cells.labels, cells.batches)
    scorers: dict[str, Callable[[], float]] = {
        name: integration[metric] for name, metric in EMBEDDING_SCORES.items() if metric in integration
    }
    scorers["knn_macro_f1"] = lambda: predict_held_out(embedding, cells.labels, cells.donors, "kNN", seed=seed).macro_f1
    scores, reasons = {}, {}
    for name in EMBEDDING_SCORES:
        try:
            scores[name] = scorers[name]()
        except NotComputable as error:
            reasons[name] = error.cause
    return scores, reasons
