"""Which cells a SOMA value filter keeps, and the errors for filters and columns that cannot be answered.

The filter is evaluated by tiledbsoma for every source, so one syntax holds for the Census, h5ad and AnnData alike.
"""

import logging
from collections.abc import Sequence
from typing import Any

import pandas as pd

logger = logging.getLogger(__name__)

PRIMARY = "is_primary_data == True"


def full_filter(obs_filter: str | None, columns: Sequence[str], *, primary_only: bool) -> str | None:
    """Return the filter with `is_primary_data == True` added, unless not asked for or not a column.

    Raises:
        ValueError: the filter alone is not one complete expression.
    """
    if obs_filter is not None:
        try:
            compile(obs_filter.strip(), "<obs filter>", "eval")
        except SyntaxError as error:
            raise ValueError(
                f"cannot parse the obs filter {obs_filter!r}: {error.msg}; expected a SOMA value filter such as "
                "\"tissue_general == 'blood' and disease in ['normal', 'COVID-19']\""
            ) from error
    clauses = [] if obs_filter is None else [f"({obs_filter.strip()})"]
    if primary_only and "is_primary_data" in columns:
        clauses.append(PRIMARY)
    elif primary_only:
        logger.info("obs has no column is_primary_data: all cells are taken as primary")
    return " and ".join(clauses) or None


def require_columns(columns: Sequence[str], found: Sequence[str]) -> None:
    """Raise a ValueError that lists the columns of obs when one that was asked for is not there."""
    if missing := [column for column in columns if column not in found]:
        raise ValueError(f"obs has no column {missing}; its columns are {sorted(found)}")


def select_obs(
    frame: Any, value_filter: str | None, columns: Sequence[str], known_columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Return the rows of a SOMA dataframe that match the filter, by ascending cell id.

    Args:
        frame: an open `tiledbsoma.DataFrame` indexed by `soma_joinid`.
        value_filter: SOMA value filter, or None for all rows.
        columns: columns to return besides the index.
        known_columns: what the user may filter on, where that is more than the frame holds; for the message.

    Returns:
        The columns; index `cell_id`, int64, ascending. Shape (matching cells, columns).

    Raises:
        ValueError: a column does not exist, the filter cannot be evaluated, or no cell matches it.
    """
    from tiledbsoma import SOMAError

    known = [name for name in known_columns or frame.schema.names if name != "soma_joinid"]
    require_columns(columns, known)
    try:
        rows = frame.read(value_filter=value_filter, column_names=["soma_joinid", *columns])
    except SOMAError as error:
        reason = str(error).split("\n\nAt:")[0]
        raise ValueError(f"cannot apply the obs filter {value_filter!r}: {reason}; its columns are {known}") from error
    obs = rows.concat().to_pandas().set_index("soma_joinid").rename_axis("cell_id")
    if obs.empty:
        raise ValueError(f"the obs filter {value_filter!r} matches none of the {frame.count:,} cells")
    for name in obs.select_dtypes("category"):
        obs[name] = obs[name].cat.remove_unused_categories()
    return obs if obs.index.is_monotonic_increasing else obs.sort_index()
