"""Decide which values of obs are missing. All code that uses a value as a donor, a batch or a label asks this module.

A value is missing if it is null (None, NaN, NaT, <NA>), or a text that is empty or that pandas writes for a null, such
as "nan". Sources return missing values as they are, and a filter of cells treats null as SOMA does; see
`obs_filter.py`.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

# What the Census writes where a text is missing. As a donor or a batch it is a value like any other, never a label.
UNKNOWN = "unknown"
# The texts that `astype(str)` makes of nulls. Files hold them if their columns were converted carelessly.
_TEXTS_OF_NULLS = frozenset({"", "nan", "NaN", "<NA>", "None", "NaT"})


def has_value(column: pd.Series) -> npt.NDArray[np.bool_]:
    """Return whether each cell has a value in a column of obs. Shape (cells,).

    Args:
        column: text, categories, numbers or booleans. Shape (cells,).

    Example:
        >>> has_value(pd.Series(["B cell", None, "", "nan", "unknown"])).tolist()
        [True, False, False, False, True]
    """
    if column.dtype.kind in "biuf":
        return column.notna().to_numpy(np.bool_)
    codes, values = pd.factorize(column)  # checks each value once, not once for each cell; the code of a null is -1
    present = [str(value).strip() not in _TEXTS_OF_NULLS for value in values]
    return np.array([*present, False], dtype=np.bool_)[codes]


def has_label(column: pd.Series, ignore: Sequence[str] = ()) -> npt.NDArray[np.bool_]:
    """Return whether each cell has a label in a column of obs: a value, but not "unknown". Shape (cells,).

    Args:
        column: the labels. Shape (cells,).
        ignore: further values that are not labels.
    """
    return has_value(column) & ~fill_missing(column).isin([UNKNOWN, *ignore]).to_numpy(np.bool_)


def fill_missing(column: pd.Series) -> pd.Series:
    """Return a column of obs as text, with "unknown" where a value is missing. Shape (cells,).

    A whole number has no decimals, so that clusters 0, 1, 2 have the same names whether or not some cells have none:
    pandas reads integers with gaps as floats.

    Example:
        >>> fill_missing(pd.Series([1, 2.5, None])).tolist()
        ['1', '2.5', 'unknown']
    """
    codes, values = pd.factorize(column)
    texts = np.array([*map(_text_of, values), UNKNOWN], dtype=object)[codes]
    return pd.Series(np.where(has_value(column), texts, UNKNOWN), index=column.index, name=column.name, dtype=str)


def _text_of(value: object) -> str:
    return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value)
