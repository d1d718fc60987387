"""Read a perturbation screen: raw counts become log1p values, and obs columns become conditions and batches."""

import logging
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pandas as pd
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.missing import fill_missing, has_value
from scgpt_hf.cells.obs import require_named_columns
from scgpt_hf.cells.source import Address, CellSource, open_source
from scgpt_hf.perturbation.conditions import CONTROL, name_condition, nearest_names, parse_condition
from scgpt_hf.perturbation.pairing import require_controls
from scgpt_hf.perturbation.pseudobulk import Names

logger = logging.getLogger(__name__)

TARGET_SUM = 1e4
"""Counts per cell after normalizing, as in scanpy's tutorials, if `total_key` names the total of each cell."""


@dataclass(frozen=True, kw_only=True)
class ScreenColumns:
    """The obs columns of a screen.

    Attributes:
        condition_key: the condition of each cell, written as in GEARS.
        control: name of the control in it.
        batch_key: experimental batch, e.g. replicate; cells are compared with controls of their own batch.
        context_key: what an effect may differ between, e.g. cell line; also a batch.
        total_key: total counts of each cell; None sums the counts of the data.
    """

    condition_key: str = "condition"
    control: str = CONTROL
    batch_key: str | None = None
    context_key: str | None = None
    total_key: str | None = None


@dataclass(frozen=True, eq=False)
class Screen:
    """The cells of a screen, with their values in memory. A cell is a row; `cell_ids` are those of the source.

    Attributes:
        values: log1p of counts scaled to `target_sum`, float32. Shape (cells, genes).
        conditions: name of the condition of each cell, `ctrl` for controls. Shape (cells,).
        batches: experimental batch of each cell, within its context. Shape (cells,).
        contexts: context of each cell. Shape (cells,).
        genes: `feature_id` and `feature_name` of each column.
        cell_ids: id of each cell in the source. Shape (cells,).
        target_sum: counts per cell after normalizing.
        columns: the obs columns.
        source: where the counts come from.
    """

    values: csr_matrix
    conditions: Names
    batches: Names
    contexts: Names
    genes: pd.DataFrame
    cell_ids: Int64Array
    target_sum: float
    columns: ScreenColumns
    source: CellSource
    _rows: dict[tuple[str, str], Int64Array] = field(default_factory=dict)

    @property
    def controls(self) -> Int64Array:
        """Return the rows of the control cells."""
        return np.flatnonzero(self.conditions == CONTROL)

    @property
    def items(self) -> list[tuple[str, str]]:
        """Return every (condition, context) with perturbed cells, in alphabetical order."""
        perturbed = self.conditions != CONTROL
        pairs = zip(self.conditions[perturbed].tolist(), self.contexts[perturbed].tolist(), strict=True)
        return sorted(set(pairs))

    def rows_of(self, item: tuple[str, str]) -> Int64Array:
        """Return the rows of a (condition, context)."""
        if item not in self._rows:
            condition, context = item
            self._rows[item] = np.flatnonzero((self.conditions == condition) & (self.contexts == context))
        return self._rows[item]


def read_screen(
    data: Address,
    columns: ScreenColumns,
    *,
    layer: str | None = None,
    round_counts: bool = False,
    target_sum: float | None = None,
) -> Screen:
    """Read the cells of a screen and normalize them.

    Args:
        data: raw counts: an AnnData, or files; genes by Ensembl id or symbol.
        columns: names of the obs columns. Cells without a condition are left out.
        layer: layer with the raw counts; by default the one that has them.
        round_counts: round fractional counts.
        target_sum: counts per cell after normalizing; by default 10,000 with `total_key`, and the median of the sums of
            the cells without, because the sum over a panel of genes is far below 10,000.

    Raises:
        ValueError: the counts are not raw, a column is missing, a condition is invalid, there is no control cell, or a
            batch has none.
    """
    source = open_source(data, layer=layer, primary_only=False, round_counts=round_counts)
    named = {f"--{name}": getattr(columns, name) for name in ("condition_key", "batch_key", "context_key", "total_key")}
    require_named_columns(named, source.obs_columns)
    obs = source.obs([column for column in dict.fromkeys(named.values()) if column is not None])
    obs = obs.loc[has_value(obs[columns.condition_key])]
    conditions = _read_conditions(obs[columns.condition_key], columns)
    contexts = _text(obs, columns.context_key)
    batches = _join(contexts, _text(obs, columns.batch_key))
    where = " and ".join(key for key in (columns.context_key, columns.batch_key) if key) or None
    require_controls(batches, conditions == CONTROL, where)
    cell_ids = obs.index.to_numpy(np.int64)
    counts = source.read(cell_ids).counts
    totals = read_totals(obs, columns.total_key, counts)
    if target_sum is None:
        target_sum = TARGET_SUM if columns.total_key else float(np.median(totals))
    values = log_values(counts, totals, target_sum)
    logger.info(
        "%d cells, %d of them controls, %d conditions, %d batches; log1p of counts scaled to %.6g",
        *(len(cell_ids), int((conditions == CONTROL).sum()), len(np.unique(conditions)) - 1, len(np.unique(batches))),
        target_sum,
    )
    return Screen(values, conditions, batches, contexts, source.genes, cell_ids, target_sum, columns, source)


def log_values(counts: csr_matrix, totals: npt.NDArray[np.float64], target_sum: float) -> csr_matrix:
    """Return log1p(counts · target_sum / total) as float32. Cells without counts stay zero.

    Args:
        counts: raw counts. Shape (cells, genes).
        totals: total of each cell. Shape (cells,).
        target_sum: counts per cell after normalizing.
    """
    values = csr_matrix(counts, dtype=np.float32, copy=True)
    factors = np.divide(target_sum, totals, out=np.zeros_like(totals), where=totals > 0)
    values.data = np.log1p(values.data * np.repeat(factors, np.diff(values.indptr))).astype(np.float32)
    return values


def _read_conditions(column: "pd.Series[str]", columns: ScreenColumns) -> Names:
    """Return the name of the condition of each cell, whatever the order of its genes in the data."""
    texts = column.astype(str)
    name_of = {text: name_condition(parse_condition(text, columns.control)) for text in texts.unique()}
    names = np.asarray(texts.map(name_of), dtype=np.str_)
    if CONTROL not in name_of.values():
        near = nearest_names(columns.control, name_of) or sorted(name_of)[:5]
        raise ValueError(
            f"no cell is a control: obs[{columns.condition_key!r}] has no {columns.control!r}; the nearest of its "
            f"{len(name_of)} values are {near}; name the control with control=... (--control)"
        )
    if len(set(name_of.values())) < 2:
        raise ValueError(f"all cells are controls: obs[{columns.condition_key!r}] has no other value")
    return names


def read_totals(obs: pd.DataFrame, total_key: str | None, counts: csr_matrix) -> npt.NDArray[np.float64]:
    """Return the total counts of each cell: the sum of its counts, or the number in an obs column. Shape (cells,).

    Raises:
        ValueError: the number is smaller than the sum, or missing.
    """
    sums = np.asarray(counts.sum(axis=1, dtype=np.float64)).ravel()
    if total_key is None:
        return sums
    totals = pd.to_numeric(obs[total_key], errors="coerce").to_numpy(np.float64)
    wrong = ~(totals >= sums) | ~(totals > 0)
    if wrong.any():
        first = int(np.flatnonzero(wrong)[0])
        raise ValueError(
            f"obs[{total_key!r}] is not the total of {int(wrong.sum()):,} cells: it is {totals[first]} where the "
            f"counts sum to {sums[first]:.0f}; expected a number that is at least the sum"
        )
    return totals


def _text(obs: pd.DataFrame, key: str | None) -> Names:
    return np.asarray([""] * len(obs) if key is None else fill_missing(obs[key]).astype(str), dtype=np.str_)


def _join(contexts: Names, batches: Names) -> Names:
    """Return batches within contexts. Shape (cells,)."""
    return np.asarray(
        [" | ".join(part for part in pair if part) for pair in zip(contexts, batches, strict=True)], dtype=np.str_
    )
