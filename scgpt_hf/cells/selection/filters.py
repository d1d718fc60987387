"""Choose cells and genes before training: sample donors, and drop cells and genes with too few counts.

`splits.py` then decides which of the chosen cells train; `hvg.py` chooses highly variable genes. Genes are chosen
from training cells only, so that validation cells have no influence on the vocabulary.
"""

import logging
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.missing import has_value
from scgpt_hf.cells.obs import take_cells
from scgpt_hf.cells.selection.counts import counts_per_gene, genes_per_cell
from scgpt_hf.cells.selection.splits import find_donors

if TYPE_CHECKING:
    from scgpt_hf.cells.source import CellSource

logger = logging.getLogger(__name__)


def cells_with_value(obs: pd.DataFrame, column: str = "donor_id") -> Int64Array:
    """Return the ids of the cells that have a value in a column, and log how many have none.

    Args:
        obs: one row for each cell, index = cell ids. Shape (cells, columns).
        column: column of `obs`. `has_value` decides which values are missing.

    Returns:
        int64 cell ids, in the order of `obs`.

    Raises:
        ValueError: there is no such column, or no cell has a value.
    """
    if column not in obs:
        raise ValueError(f"obs has no column {column!r}; its columns are {list(obs.columns)}")
    kept = has_value(obs[column])
    _log_dropped("cells", kept, f"no {column}")
    return obs.index.to_numpy(np.int64)[kept]


def sample_donors(obs: pd.DataFrame, max_cells: int, *, seed: int, donor_key: str = "donor_id") -> Int64Array:
    """Sample donors at random and return all their cells, at most `max_cells`.

    Donors are taken in random order. A donor whose cells would exceed `max_cells` is skipped and the next one is
    tried. So the total comes close to `max_cells`, and very large donors are chosen less often than small ones.

    Args:
        obs: one row for each cell, index = cell ids, with column `donor_key`. Shape (cells, columns).
        max_cells: highest number of cells to return.
        seed: determines the order of the donors.
        donor_key: column with the donors.

    Returns:
        int64 cell ids, ascending.

    Raises:
        ValueError: there is no such column, a cell has no donor, or even the smallest donor has too many cells.

    Example:
        >>> import pandas as pd
        >>> from scgpt_hf.cells.selection.filters import sample_donors
        >>> obs = pd.DataFrame({"donor_id": ["a", "a", "a", "b", "b", "c"]})
        >>> sample_donors(obs, 3, seed=0).tolist()
        [3, 4, 5]
    """
    donor_of_cell, donors = find_donors(obs, donor_key)
    n_cells = np.bincount(donor_of_cell, minlength=len(donors))
    taken, n_left = np.zeros(len(donors), bool), max_cells
    for donor in np.random.default_rng(seed).permutation(len(donors)):
        if n_cells[donor] <= n_left:
            taken[donor], n_left = True, n_left - n_cells[donor]
    if not taken.any():
        smallest = int(n_cells.argmin())
        raise ValueError(
            f"no donor has at most {max_cells:,} cells: the smallest, {donors[smallest]!r}, has {n_cells[smallest]:,}; "
            "raise max_cells (--max_cells)"
        )
    logger.info("sampled %d of %d donors: %d of %d cells", taken.sum(), len(donors), max_cells - n_left, len(obs))
    return np.sort(obs.index.to_numpy(np.int64)[taken[donor_of_cell]])


def filter_cells(source: "CellSource", cell_ids: Int64Array, min_genes: int) -> Int64Array:
    """Return the cells that express at least `min_genes` genes, and log how many do not.

    Args:
        source: where to read the cells.
        cell_ids: cells to filter, in any order. Shape (cells,).
        min_genes: lowest number of expressed genes. With 0, nothing is read and all cells are returned.

    Returns:
        int64 cell ids, ascending.

    Raises:
        ValueError: no cell is left.
    """
    cell_ids = np.sort(cell_ids)
    if min_genes <= 0:
        return cell_ids
    n_genes = recorded_genes_per_cell(source, cell_ids)
    if n_genes is None:
        n_genes = genes_per_cell(source, cell_ids)
    kept = n_genes >= min_genes
    _log_dropped("cells", kept, f"fewer than {min_genes:,} expressed genes (--min_genes)")
    return cell_ids[kept]


def filter_genes(source: "CellSource", cell_ids: Int64Array, min_counts: int) -> Int64Array:
    """Return the columns of the genes with at least `min_counts` counts in the cells, and log how many have fewer.

    Args:
        source: where to read the cells.
        cell_ids: training cells only. Shape (cells,).
        min_counts: lowest number of counts, summed over all these cells. With 0, nothing is read and all genes are
            returned.

    Returns:
        int64 columns of `source.genes`, ascending.

    Raises:
        ValueError: no gene is left.
    """
    if min_counts <= 0:
        return np.arange(len(source.genes))
    kept = counts_per_gene(source, cell_ids) >= min_counts
    _log_dropped("genes", kept, f"fewer than {min_counts:,} counts in {len(cell_ids):,} cells (--min_gene_counts)")
    return np.flatnonzero(kept)


def cells_expressing(source: "CellSource", cell_ids: Int64Array, genes: Int64Array) -> Int64Array:
    """Return the ids of the cells that express at least one of the genes, and log how many do not.

    Args:
        source: where to read the cells.
        cell_ids: cells to filter. Shape (cells,).
        genes: columns of `source.genes`. Shape (genes,).

    Returns:
        int64 cell ids, in the order given.

    Raises:
        ValueError: no cell expresses any of the genes.
    """
    ascending = np.sort(cell_ids)
    expressing = ascending[genes_per_cell(source, ascending, genes) > 0]
    kept = np.isin(cell_ids, expressing)
    _log_dropped("cells", kept, f"none of the {len(genes):,} chosen genes expressed")
    return cell_ids[kept]


def recorded_genes_per_cell(source: "CellSource", cell_ids: Int64Array) -> Int64Array | None:
    """Return the numbers of expressed genes that a Census records in obs `nnz`, or None if it records none."""
    described = source.describe()
    if described["kind"] != "census" or described["layer"] != "raw":  # nnz is counted in the layer `raw`
        return None
    try:
        return take_cells(source.obs(["nnz"])["nnz"], cell_ids).to_numpy(np.int64)
    except ValueError:
        logger.info("obs has no nnz (a Census before 2023-12-15): counting expressed genes")
        return None


def _log_dropped(what: str, kept: npt.NDArray[np.bool_], reason: str) -> None:
    """Log how many cells or genes are dropped and why; raise ValueError if none is left."""
    n_dropped = len(kept) - int(kept.sum())
    if n_dropped == len(kept):
        raise ValueError(
            f"all {len(kept):,} {what} would be dropped: {reason}; lower the threshold or widen the filter "
            "(--obs_filter)"
        )
    level = logging.INFO if n_dropped else logging.DEBUG
    logger.log(level, "dropped %d of %d %s: %s", n_dropped, len(kept), what, reason)
