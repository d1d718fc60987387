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


def number_texts(column: pd.Series) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return the number of each cell's value in a column of obs, and the values as sorted texts.

    Each different value is looked at once, so a column of 100 million cells takes seconds; as texts, it would take
    gigabytes.

    Args:
        column: text, categories, numbers or booleans. Shape (cells,).

    Returns:
        Numbers from 0 in the order of the texts, −1 where a value is missing, shape (cells,); and the texts of those
        values that occur, as `fill_missing` writes them.

    Example:
        >>> numbers, texts = number_texts(pd.Series(["T cell", None, "B cell", "T cell", ""]))
        >>> numbers.tolist(), texts
        ([1, -1, 0, 1, -1], ['B cell', 'T cell'])
    """
    codes, values = pd.factorize(column)  # the code of a null is −1
    text_of_code = [_text_of(value) for value in values]
    texts = sorted({text for text in text_of_code if text.strip() not in _TEXTS_OF_NULLS})
    place = {text: number for number, text in enumerate(texts)}
    return np.array([*(place.get(text, -1) for text in text_of_code), -1], np.int32)[codes], texts


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
    return number_texts(column)[0] >= 0


def has_label(column: pd.Series, ignore: Sequence[str] = ()) -> npt.NDArray[np.bool_]:
    """Return whether each cell has a label in a column of obs: a value, but not "unknown". Shape (cells,).

    Args:
        column: the labels. Shape (cells,).
        ignore: further values that are not labels.
    """
    numbers, texts = number_texts(column)
    is_label = [text not in {UNKNOWN, *ignore} for text in texts]
    return np.array([*is_label, False], dtype=np.bool_)[numbers]


def fill_missing(column: pd.Series) -> pd.Series:
    """Return a column of obs as text, with "unknown" where a value is missing. Shape (cells,).

    A whole number has no decimals, so that clusters 0, 1, 2 have the same names whether or not some cells have none:
    pandas reads integers with gaps as floats.

    Example:
        >>> fill_missing(pd.Series([1, 2.5, None])).tolist()
        ['1', '2.5', 'unknown']
    """
    numbers, texts = number_texts(column)
    return pd.Series(np.array([*texts, UNKNOWN], object)[numbers], index=column.index, name=column.name, dtype=str)


def _text_of(value: object) -> str:
    return str(int(value)) if isinstance(value, float | np.floating) and value.is_integer() else str(value)
