"""Select the cells of a labelled AnnData that an evaluation uses: those with a label, at most 50,000 of them.

No cell is dropped silently: every cell that is not used is counted under its reason.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from scgpt_hf.analysis.embed import embedding_of
from scgpt_hf.cells.block import FloatArray
from scgpt_hf.cells.missing import fill_missing, has_label, has_value
from scgpt_hf.cells.obs import require_named_columns
from scgpt_hf.scoring.metrics import Labels, require_embedding
from scgpt_hf.scoring.sampling import Rows, sample_cells

if TYPE_CHECKING:
    from anndata import AnnData

MAX_CELLS = 50_000  # silhouettes and neighbors of more cells take many minutes


@dataclass(frozen=True, eq=False)
class SelectedCells:
    """The cells of an AnnData that an evaluation uses.

    Attributes:
        rows: their rows in the AnnData, ascending. Shape (cells,).
        labels: their cell types. Shape (cells,).
        batches: their batches, usually donors. Shape (cells,).
        embeddings: key of obsm → float32 embedding, shape (cells, features).
        left_out: reason → number of cells that are not used.
    """

    rows: Rows
    labels: Labels
    batches: Labels
    embeddings: Mapping[str, FloatArray]
    left_out: Mapping[str, int]


def select_cells(
    adata: "AnnData",
    embedding_keys: Sequence[str],
    labels_key: str,
    batch_key: str,
    *,
    unlabeled_categories: Sequence[str] = ("unknown",),
    max_cells: int = MAX_CELLS,
    seed: int = 0,
) -> SelectedCells:
    """Select the cells that can be evaluated, with their embeddings.

    Cells without a label, cells that are the only one of their label, and cells beyond `max_cells` are left out and
    counted.

    Args:
        adata: cells with labels and embeddings, in memory or backed.
        embedding_keys: keys of obsm.
        labels_key: obs column with cell types.
        batch_key: obs column with batches, usually donors.
        unlabeled_categories: values of `labels_key` that mean a cell has no label. Missing values and "unknown" always
            do.
        max_cells: highest number of cells; if there are more, they are sampled with `sample_cells`.
        seed: seed of the sample.

    Returns:
        The selected cells.

    Raises:
        ValueError: there are no cells, a column or an embedding does not exist, an embedding is not finite, a cell has
            no batch, or no label has two cells.
    """
    if not adata.n_obs:
        raise ValueError("the AnnData has no cells; expected at least two cells with the same label")
    require_named_columns({"--labels_key": labels_key, "--batch_key": batch_key}, [str(name) for name in adata.obs])
    if unknown := [key for key in embedding_keys if key not in adata.obsm]:
        raise ValueError(
            f"obsm has no {unknown[0]!r}; its keys are {sorted(adata.obsm)}; compute embeddings with scgpt-hf embed"
        )
    labels, batches = adata.obs[labels_key], adata.obs[batch_key]
    if n_missing := int((~has_value(batches)).sum()):
        raise ValueError(
            f"{n_missing:,} of {adata.n_obs:,} cells have no value in {batch_key!r}; set one, or leave these cells out"
        )
    labelled = has_label(labels, unlabeled_categories)
    names = fill_missing(labels).to_numpy(str)
    sizes = pd.Series(names[labelled]).value_counts()
    single = labelled & np.isin(names, sizes.index[sizes == 1].to_numpy(str))
    rows = np.flatnonzero(labelled & ~single)
    if not len(rows):
        raise ValueError(
            f"no label in {labels_key!r} has two cells: {labelled.sum():,} of {adata.n_obs:,} cells have a label"
        )
    groups = fill_missing(batches).to_numpy(str)
    chosen = rows[sample_cells(names[rows], groups[rows], max_cells, seed)]
    left_out = {
        "without a label": int((~labelled).sum()),
        "the only cell of their label": int(single.sum()),
        f"beyond a sample of {max_cells:,}": len(rows) - len(chosen),
    }
    return SelectedCells(
        rows=chosen,
        labels=names[chosen],
        batches=groups[chosen],
        embeddings={key: _read_embedding(adata, key, chosen) for key in embedding_keys},
        left_out={reason: number for reason, number in left_out.items() if number},
    )


def _read_embedding(adata: "AnnData", key: str, rows: Rows) -> FloatArray:
    """Return the embedding of the given rows as float32, shape (rows, features)."""
    try:
        return require_embedding(embedding_of(adata, key)[rows], len(rows))
    except ValueError as error:
        raise ValueError(f"obsm[{key!r}]: {error}") from error
