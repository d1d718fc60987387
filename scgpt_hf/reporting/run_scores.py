"""Score the baselines of a finished run on the labelled cells that its validations scored the model on."""

from pathlib import Path

from scgpt_hf.analysis.evaluation.run_baselines import TRAINING_PCA, available_baselines, run_features
from scgpt_hf.cells.source import CellSource
from scgpt_hf.scoring.embedding_scores import LabelledCells, score_embedding


def score_run_baselines(
    folder: Path, source: CellSource, cells: LabelledCells, seed: int
) -> dict[str, dict[str, float]]:
    """Return baseline → name → score, as validations log them. PCA is left out: its scores are in the log.

    Args:
        folder: run folder with `best_model` and `baselines`.
        source: source of the cells.
        cells: the cells.
        seed: determines the folds of a single donor.
    """
    names = [name for name in available_baselines(folder) if name != TRAINING_PCA]
    features = run_features(folder, source, cells.cell_ids, names)
    return {name: score_embedding(features[name], cells, seed)[0] for name in features}
