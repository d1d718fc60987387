"""Compare predicted with true cell types: confusion counts, and the F1 score of each type.

`probing.py` makes the predictions of an evaluation; `reporting/plots_predictions.py` draws the figures.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import f1_score

Labels = npt.NDArray[np.str_]


def count_confusions(
    true: npt.ArrayLike, predicted: npt.ArrayLike
) -> tuple[list[str], list[str], npt.NDArray[np.int64]]:
    """Count the cells of each pair of true and predicted type.

    Args:
        true: true type of each cell. Shape (cells,).
        predicted: predicted type of each cell. Shape (cells,).

    Returns:
        The true types, most frequent first; the same types followed by those that are only predicted; and the number of
        cells, shape (true types, predicted types).

    Raises:
        ValueError: there are no cells, or the shapes differ.

    Example:
        >>> count_confusions(["B", "T", "T"], ["B", "T", "NK"])
        (['T', 'B'], ['T', 'B', 'NK'], array([[1, 0, 1],
               [0, 1, 0]]))
    """
    table = pd.crosstab(*_require_pairs(true, predicted))
    sizes = table.sum(axis=1)
    types = sorted(table.index, key=lambda name: (-sizes[name], name))
    columns = types + sorted(set(table.columns) - set(types))
    return types, columns, table.reindex(index=types, columns=columns, fill_value=0).to_numpy(np.int64)


def f1_by_type(true: npt.ArrayLike, predicted: npt.ArrayLike) -> dict[str, float]:
    """Return the F1 score of each true type; the mean of all is the macro-F1.

    F1 = 2 TP / (2 TP + FP + FN), and 0 for a type that is never predicted.

    Args:
        true: true type of each cell. Shape (cells,).
        predicted: predicted type of each cell. Shape (cells,).

    Raises:
        ValueError: there are no cells, or the shapes differ.

    Source: sklearn.metrics.f1_score.
    """
    true, predicted = _require_pairs(true, predicted)
    types = np.unique(true)
    scores = f1_score(true, predicted, labels=types, average=None, zero_division=0.0)
    return dict(zip(types.tolist(), scores.tolist(), strict=True))


def _require_pairs(true: npt.ArrayLike, predicted: npt.ArrayLike) -> tuple[Labels, Labels]:
    """Return both as text after checking that there is a true and a predicted type for each cell."""
    true, predicted = np.asarray(true, dtype=str), np.asarray(predicted, dtype=str)
    if true.shape != predicted.shape or not true.size:
        raise ValueError(
            f"expected a true and a predicted type for each cell, found shapes {true.shape}, {predicted.shape}"
        )
    return true, predicted
