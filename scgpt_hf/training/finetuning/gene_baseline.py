"""Score logistic regression on variable genes, the simple method that a classifier of cells has to beat."""

import logging
import time
from typing import Any

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from scgpt_hf.cells.source import CellSource
from scgpt_hf.scoring.normalization import log_normalize, variable_genes
from scgpt_hf.training.finetuning.classifier import agreement
from scgpt_hf.training.finetuning.labels import LabelledCells

logger = logging.getLogger(__name__)

# With more training cells, the baseline would take longer than the probe by far.
MAX_CELLS = 50_000
_MIN_CELLS_TO_SELECT = 20  # with fewer cells, the variance of a gene is mostly noise, and all expressed genes are used
_MAX_ITERATIONS = 2_000


def score_genes(source: CellSource, cells: LabelledCells) -> dict[str, Any] | None:
    """Fit logistic regression to the variable genes of the training cells, and score it on the held-out cells.

    The recipe is that of `evaluate_embeddings`: counts per 10,000, log1p, 2,000 highly variable genes, standardized,
    scikit-learn's default regularization, no class weights.

    Args:
        source: source of the cells.
        cells: training and held-out cells.

    Returns:
        Accuracy, macro-F1, and the number of genes; None if there are more than `MAX_CELLS` training cells.

    Source: `scgpt_hf/scoring/normalization.py` and `probing.py`.
    """
    started = time.perf_counter()
    key, parts = cells.donor_key, cells.parts
    if len(parts["train"]) > MAX_CELLS:
        logger.info("no baseline on genes, because there are more than %d training cells", MAX_CELLS)
        return None
    blocks = {part: source.read(ids, [] if key is None else [key]) for part, ids in parts.items()}
    features = {part: log_normalize(block.counts) for part, block in blocks.items()}
    if len(parts["train"]) < _MIN_CELLS_TO_SELECT:
        genes = np.flatnonzero(features["train"].getnnz(axis=0))
    else:
        donors = np.zeros(len(parts["train"]), str) if key is None else blocks["train"].obs[key].to_numpy(str)
        genes = variable_genes(features["train"], donors)
    model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=_MAX_ITERATIONS))
    model.fit(features["train"][:, genes].toarray(), cells.classes("train"))
    predicted = model.predict(features["validation"][:, genes].toarray())
    scores = {**agreement(cells.classes("validation"), predicted), "genes": len(genes)}
    logger.info("logistic regression on genes: %s, in %.1f s", scores, time.perf_counter() - started)
    return scores
