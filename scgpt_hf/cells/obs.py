"""Find the cells that match an obs filter: in a SOMA dataframe through TileDB, or in a pandas table.

`obs_filter.py` parses and checks the filter, so one syntax holds for the Census, `.h5ad` files, AnnData and caches.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.obs_filter import CELL_ID, ObsFilter, has_order, in_one_line

logger = logging.getLogger(__name__)

Rows = TypeVar("Rows", pd.DataFrame, pd.Series)

PRIMARY = "is_primary_data == True"


def add_primary_filter(obs_filter: str | None, columns: Sequence[str], *, primary_only: bool) -> str | None:
    """Add `is_primary_data == True` to a filter, if requested and if `obs` has that column.

    Args:
        obs_filter: the user's SOMA value filter, or None for all cells.
        columns: the columns of obs.
        primary_only: keep only cells with `is_primary_data == True`.

    Raises:
        ValueError: the filter alone is not one complete filter.
    """
    clauses = []
    if obs_filter is not None:
        # Checked alone, because "a == 1) or (b == 2" would also be complete within the parentheses added below.
        ObsFilter(obs_filter)
        clauses.append(f"({in_one_line(obs_filter)})")  # a comment would swallow the closing parenthesis
    if primary_only and "is_primary_data" in columns:
        clauses.append(PRIMARY)
    elif primary_only:
        logger.info("obs has no column is_primary_data: all cells count as primary")
    return " and ".join(clauses) or None


def name_columns_as_text(obs: pd.DataFrame, where: str) -> pd.DataFrame:
    """Return the table with text as column names, because settings and files can name no others.

    Args:
        obs: the table; it is not changed.
        where: the name of the file, for the error.

    Raises:
        ValueError: two columns have the same name.
    """
    names = pd.Index([str(name) for name in obs.columns])
    if names.has_duplicates:
        repeated = sorted(set(names[names.duplicated()]))
        raise ValueError(
            f"{where}: expected each column of obs once, found {repeated} more than once; "
            "rename or remove the others, e.g. adata.obs = adata.obs.loc[:, ~adata.obs.columns.duplicated()]"
        )
    return obs.set_axis(names, axis="columns")


def require_columns(columns: Sequence[str], found: Sequence[str]) -> None:
    """Raise a ValueError that lists the columns of obs if a requested column does not exist."""
    if missing := [column for column in columns if column not in found]:
        raise ValueError(f"obs has no column {missing}; its columns are {sorted(found)}")


def require_named_columns(options: Mapping[str, str | None], found: Sequence[str]) -> None:
    """Raise unless obs has the column that each option of the command line names.

    Args:
        options: option → the column that it names, or None. The error names the option.
        found: the columns of obs.

    Raises:
        ValueError: a column does not exist.
    """
    for option, column in options.items():
        if column is not None and column not in found:
            raise ValueError(
                f"obs has no column {column!r}; name another one with {option}; its columns are {sorted(found)}"
            )


def read_matching_obs(frame: Any, obs_filter: str | None, columns: Sequence[str]) -> pd.DataFrame:
    """Read the rows of a SOMA dataframe that match a filter, by ascending cell id.

    Args:
        frame: an open `tiledbsoma.DataFrame` indexed by `soma_joinid`.
        obs_filter: SOMA value filter, or None for all rows.
        columns: columns to return besides the index.

    Returns:
        The columns; index `cell_id`, int64, ascending. Shape (matching cells, columns).

    Raises:
        tiledbsoma.SOMAError: the store cannot be read.
        ValueError: a column does not exist, the filter cannot be applied, or no cell matches it.
    """
    types = {field.name: field.type for field in frame.schema}
    require_columns(columns, [name for name in types if name != CELL_ID])
    soma_filter = None
    if obs_filter is not None:
        ordered = frame.get_enumeration_values([name for name, kind in types.items() if has_order(kind)])
        soma_filter = ObsFilter(obs_filter).to_soma(types, ordered)
    rows = frame.read(value_filter=soma_filter, column_names=[CELL_ID, *columns])
    obs = rows.concat().to_pandas().set_index(CELL_ID).rename_axis("cell_id")[list(columns)]
    _require_matches(len(obs), obs_filter, frame.count)
    return drop_unused_categories(obs if obs.index.is_monotonic_increasing else obs.sort_index())


def take_cells(obs: Rows, cell_ids: Int64Array) -> Rows:
    """Return the rows of some cells from an obs table, in the order of the ids.

    `obs.loc` would build a hash table of all cells: 4 GB for 100 million of them.

    Args:
        obs: a table, or one column, with ascending cell ids as its index. Shape (cells, columns) or (cells,).
        cell_ids: ids of cells of the table. Shape (taken cells,).

    Raises:
        KeyError: the table lacks one of the cells.

    Example:
        >>> take_cells(pd.Series(["a", "b", "c"], index=[2, 5, 7]), np.array([7, 2])).tolist()
        ['c', 'a']
    """
    ids = obs.index.to_numpy(np.int64)
    if len(ids) == len(cell_ids) and (ids == cell_ids).all():
        return obs
    if len(missing := cell_ids[~are_among(cell_ids, ids)]):
        raise KeyError(f"{len(missing):,} of {len(cell_ids):,} cells are not in obs, e.g. {missing[:5].tolist()}")
    return obs.iloc[np.searchsorted(ids, cell_ids)]


def are_among(cell_ids: Int64Array, ascending: Int64Array) -> NDArray[np.bool_]:
    """Return whether each cell is among others, by bisection; NumPy's set functions take minutes for 100 million cells.

    Args:
        cell_ids: ids in any order. Shape (cells,).
        ascending: the other ids, ascending. Shape (other cells,).

    Example:
        >>> are_among(np.array([7, 3]), np.array([2, 5, 7])).tolist()
        [True, False]
    """
    if not len(ascending):
        return np.zeros(len(cell_ids), np.bool_)
    rows = np.searchsorted(ascending, cell_ids)
    found: NDArray[np.bool_] = ascending[np.minimum(rows, len(ascending) - 1)] == cell_ids
    return found


def drop_unused_categories(obs: pd.DataFrame) -> pd.DataFrame:
    """Return the table with only the categories that occur in its rows."""
    obs = obs.copy()
    for name in obs.select_dtypes("category"):
        obs[name] = obs[name].cat.remove_unused_categories()
    return obs


def find_matching_rows(obs: pd.DataFrame, obs_filter: str | None) -> Int64Array:
    """Return the row numbers of a pandas table that match a filter, ascending.

    Args:
        obs: all columns that a filter may use, indexed by cell id.
        obs_filter: SOMA value filter, or None for all rows.

    Raises:
        ValueError: the filter cannot be applied, or no cell matches it.
    """
    if obs_filter is None:
        return np.arange(len(obs), dtype=np.int64)
    rows = np.flatnonzero(ObsFilter(obs_filter).matches(obs))
    _require_matches(len(rows), obs_filter, len(obs))
    return rows


def _require_matches(n_matching: int, obs_filter: str | None, n_cells: int) -> None:
    if not n_matching:
        raise ValueError(f"the obs filter {obs_filter!r} matches none of the {n_cells:,} cells")
