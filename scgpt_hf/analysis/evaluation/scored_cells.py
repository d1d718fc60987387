"""Which cells of a labelled AnnData are scored: those with a label, at most 50,000 of them, counted as they go.

Nothing leaves in silence: every cell that is not scored is counted under the reason. The scores are made by
`evaluation.py`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pandas as pd

from scgpt_hf.analysis.evaluation.metrics import FloatArray, Labels, require_embedding

if TYPE_CHECKING:
    from anndata import AnnData

Rows = npt.NDArray[np.int64]

MAX_CELLS = 50_000
KEPT_PER_LABEL = 20  # cells of each label that a sample keeps, if it has them


@dataclass(frozen=True, eq=False)
class ScoredCells:
    """The cells of an AnnData that are scored.

    Attributes:
        rows: where they are in the AnnData, ascending. Shape (cells,).
        labels: their cell types. Shape (cells,).
        batches: their donors, or other batches. Shape (cells,).
        embeddings: key of obsm → float32 (cells, features).
        left_out: reason → number of cells that are not scored.
    """

    rows: Rows
    labels: Labels
    batches: Labels
    embeddings: Mapping[str, FloatArray]
    left_out: Mapping[str, int]


def choose_scored(
    adata: "AnnData",
    keys: Sequence[str],
    label: str,
    batch: str,
    *,
    unlabelled: Sequence[str] = ("unknown",),
    max_cells: int = MAX_CELLS,
    seed: int = 0,
) -> ScoredCells:
    """Return the cells that can be scored, with their embeddings.

    Left out, and counted, are cells without a label, cells alone of their label, and what exceeds `max_cells`; see
    `sample_cells`.

    Args:
        adata: cells with labels and embeddings, in memory or backed.
        keys: embeddings in obsm.
        label: obs column with cell types.
        batch: obs column with donors.
        unlabelled: values of the label that mean there is none; missing and empty values always do.
        max_cells: most cells that are scored.
        seed: of the sample.

    Raises:
        ValueError: no cell, no such column or embedding, an embedding that is not finite, a cell without a batch, or no
            label occurs twice.
    """
    if not adata.n_obs:
        raise ValueError("the AnnData is empty: it has no cells; nothing can be scored")
    for column in (label, batch):
        if column not in adata.obs:
            raise ValueError(f"obs has no column {column!r}; it has {sorted(map(str, adata.obs))}")
    if unknown := [key for key in keys if key not in adata.obsm]:
        raise ValueError(f"obsm has no {unknown[0]!r}; it has {sorted(adata.obsm)}; scripts/embed.py makes X_scgpt")
    labels, batches = (adata.obs[column].astype(object) for column in (label, batch))
    if n_missing := int(batches.isna().sum()):
        raise ValueError(
            f"{n_missing:,} of {adata.n_obs:,} cells have no {batch!r}; name their batch or leave them out"
        )
    told = (labels.notna() & ~labels.astype(str).isin(["", *unlabelled])).to_numpy()
    names = labels.astype(str).to_numpy(str)
    sizes = pd.Series(names[told]).value_counts()
    alone = told & np.isin(names, sizes.index[sizes == 1].to_numpy(str))
    rows = np.flatnonzero(told & ~alone)
    if not len(rows):
        raise ValueError(f"no label of {label!r} has two cells: {told.sum():,} of {adata.n_obs:,} cells have a label")
    groups = batches.astype(str).to_numpy(str)
    chosen = rows[sample_cells(names[rows], groups[rows], max_cells, seed)]
    left_out = {
        "without a label": int((~told).sum()),
        "alone of their label": int(alone.sum()),
        f"beyond a sample of {max_cells:,}": len(rows) - len(chosen),
    }
    return ScoredCells(
        rows=chosen,
        labels=names[chosen],
        batches=groups[chosen],
        embeddings={key: _rows_of(adata, key, chosen) for key in keys},
        left_out={reason: number for reason, number in left_out.items() if number},
    )


def sample_cells(labels: Labels, batches: Labels, max_cells: int, seed: int) -> Rows:
    """Return positions of at most `max_cells` cells, ascending: all, or a sample stratified by label and batch.

    Each label keeps 20 cells, or all it has, so that rare types stay; the rest are drawn so that each label of each
    batch has its share, to within one cell. The same seed gives the same cells.

    Args:
        labels: shape (cells,).
        batches: shape (cells,).
        max_cells: at least 20 for each label.
        seed: of the draw.

    Raises:
        ValueError: `max_cells` has no room for 20 cells of each label.
    """
    if len(labels) <= max_cells:
        return np.arange(len(labels))
    chance = np.random.default_rng(seed).random(len(labels))
    cells = pd.DataFrame({"label": labels, "batch": batches, "chance": chance})
    kept = (cells.groupby("label")["chance"].rank(method="first") <= KEPT_PER_LABEL).to_numpy()
    n_rest = max_cells - int(kept.sum())
    if n_rest < 0:
        raise ValueError(f"a sample of {max_cells:,} cells has no room for 20 cells of each label; raise max_cells")
    rest = cells[~kept].sort_values(["label", "batch", "chance"]).index.to_numpy()
    evenly = ((np.arange(n_rest) + 0.5) * len(rest) / max(n_rest, 1)).astype(np.int64)
    return np.sort(np.concatenate([np.flatnonzero(kept), rest[evenly]]))


def _rows_of(adata: "AnnData", key: str, rows: Rows) -> FloatArray:
    try:
        return require_embedding(np.asarray(adata.obsm[key])[rows], len(rows))
    except ValueError as error:
        raise ValueError(f"obsm[{key!r}]: {error}") from error
