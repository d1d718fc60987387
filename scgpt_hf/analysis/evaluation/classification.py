"""What predicted cell types are worth: confusions and the F1 of each type.

Who predicts them, and for which cells, `probing.py` decides; the figures are in `plots_types.py`.
"""

import numpy as np
import numpy.typing as npt
import pandas as pd
from sklearn.metrics import f1_score

Labels = npt.NDArray[np.str_]


def count_confusions(
    true: npt.ArrayLike, predicted: npt.ArrayLike
) -> tuple[list[str], list[str], npt.NDArray[np.int64]]:
    """Return the true types by falling number of cells, those and what else is predicted, and counts (true, predicted).

    Raises:
        ValueError: no cell, or not one prediction for each cell.
    """
    table = pd.crosstab(*_pairs(true, predicted))
    sizes = table.sum(axis=1)
    types = sorted(table.index, key=lambda name: (-sizes[name], name))
    columns = types + sorted(set(table.columns) - set(types))
    return types, columns, table.reindex(index=types, columns=columns, fill_value=0).to_numpy(np.int64)


def f1_by_type(true: npt.ArrayLike, predicted: npt.ArrayLike) -> dict[str, float]:
    """Return the F1 of each true type; their mean is the macro-F1. A type that is never predicted has 0.

    Raises:
        ValueError: no cell, or not one prediction for each cell.
    """
    true, predicted = _pairs(true, predicted)
    types = np.unique(true)
    scores = f1_score(true, predicted, labels=types, average=None, zero_division=0.0)
    return dict(zip(types.tolist(), scores.tolist(), strict=True))


def _pairs(true: npt.ArrayLike, predicted: npt.ArrayLike) -> tuple[Labels, Labels]:
    true, predicted = np.asarray(true, dtype=str), np.asarray(predicted, dtype=str)
    if true.shape != predicted.shape or not true.size:
        raise ValueError(f"expected a true and a predicted type for each cell, found {true.shape}, {predicted.shape}")
    return true, predicted
