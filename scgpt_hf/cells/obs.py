"""Which cells a SOMA value filter keeps, and the errors for filters and columns that cannot be answered.

The filter is evaluated by tiledbsoma for every source, so one syntax holds for the Census, h5ad and AnnData alike.
"""

import ast
import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.soma.memory import TILEDB_CONFIG

logger = logging.getLogger(__name__)

PRIMARY = "is_primary_data == True"
_MENTIONS = (ast.Name, ast.Constant)  # a column by its name, or as attr("name with a dot")


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
        reason, _, raised_in_python = str(error).partition("\n\nAt:")
        if not raised_in_python:  # the store failed, not the filter
            raise
        raise ValueError(f"cannot apply the obs filter {value_filter!r}: {reason}; its columns are {known}") from error
    obs = rows.concat().to_pandas().set_index("soma_joinid").rename_axis("cell_id")[list(columns)]
    if not len(obs):
        raise ValueError(f"the obs filter {value_filter!r} matches none of the {frame.count:,} cells")
    return drop_unused_categories(obs if obs.index.is_monotonic_increasing else obs.sort_index())


def drop_unused_categories(obs: pd.DataFrame) -> pd.DataFrame:
    """Return the table with only the categories that its own rows have."""
    obs = obs.copy()
    for name in obs.select_dtypes("category"):
        obs[name] = obs[name].cat.remove_unused_categories()
    return obs


def select_rows(obs: pd.DataFrame, value_filter: str | None) -> Int64Array:
    """Return the row numbers of a pandas table that match a SOMA value filter, ascending; raise as `select_obs` does.

    tiledbsoma itself evaluates the filter, on the columns it mentions, written to a SOMA dataframe in memory.
    """
    import tiledbsoma as soma

    rows = np.arange(len(obs), dtype=np.int64)
    if value_filter is None:
        return rows
    nodes = ast.walk(ast.parse(value_filter, mode="eval"))
    mentioned = {getattr(node, "id", getattr(node, "value", None)) for node in nodes if isinstance(node, _MENTIONS)}
    columns = obs[[name for name in obs if name in mentioned]].assign(soma_joinid=rows)
    table = pa.Table.from_pandas(columns, preserve_index=False)
    # mem:// belongs to its context, and only a context with a setting of its own is not the one all share
    context = soma.SOMATileDBContext(tiledb_config={"sm.compute_concurrency_level": 1, **TILEDB_CONFIG})
    uri, domain = "mem://obs", [[0, max(len(obs) - 1, 0)]]
    # writing adds the categories by a second schema; of two from the same millisecond TileDB may read the first
    soma.DataFrame.create(uri, schema=table.schema, domain=domain, context=context, tiledb_timestamp=1).close()
    with soma.DataFrame.open(uri, "w", context=context, tiledb_timestamp=2) as frame:
        frame.write(table)
    with soma.DataFrame.open(uri, context=context, tiledb_timestamp=3) as frame:
        return np.asarray(select_obs(frame, value_filter, (), [str(name) for name in obs]).index, dtype=np.int64)
