"""Select the labelled cells that a classifier is trained and validated on.

Every cell that is left out is counted, by reason, and the counts go into the summary of the run.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.missing import fill_missing, has_label, has_value
from scgpt_hf.cells.selection.splits import split_cells, split_within

logger = logging.getLogger(__name__)

# Splits of whole donors to try. With few donors, a random split often leaves a label on one side only.
_N_SPLITS = 20

_RARE_SHOWN = 10  # labels that messages list
# Subtracted before rounding up, so that the rounding error of a product (0.07 * 100 > 7) does not add a cell.
_ROUNDING_TOLERANCE = 1e-9


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """The cells that a classifier is trained and validated on.

    Attributes:
        parts: "train" and "validation" → cell ids, ascending. Shape (cells of the part,).
        class_names: labels, sorted; the position of a label is its class id.
        label_of_cell: name of each cell's label, indexed by cell id. Cells that were left out are missing.
        donor_key: obs column whose values were held out completely; None if single cells were held out.
        left_out: reason → number of cells.
        rare: labels that were left out because they have too few cells → number of their cells.
    """

    parts: dict[str, Int64Array]
    class_names: list[str]
    label_of_cell: pd.Series
    donor_key: str | None
    left_out: dict[str, int]
    rare: dict[str, int]

    def classes(self, part: str) -> Int64Array:
        """Return the class id of each cell of a part, in the order of its cell ids. Shape (cells,)."""
        return self.classes_of(self.parts[part])

    def classes_of(self, ids: Int64Array) -> Int64Array:
        """Return the class id of each of these cells. Shape (cells,)."""
        return np.searchsorted(self.class_names, self.label_of_cell.reindex(ids).to_numpy(str)).astype(np.int64)


def select_labelled(
    obs: pd.DataFrame,
    labels_key: str,
    *,
    donor_key: str | None,
    validation_fraction: float,
    label_fraction: float,
    ignore_labels: Sequence[str],
    min_cells: int,
    seed: int,
) -> LabelledCells:
    """Select the cells whose label can be learned, and split them into training and validation cells.

    Whole donors are held out. Of several random splits, the one is used that has training cells of the most labels, and
    among these the one with the most labels in both parts. If there is only one donor, or none is recorded, single
    cells are held out instead, the same share of every label and at least one cell of each. Scores then say nothing
    about new donors. A label that only held-out donors have cannot be learned, so its cells are left out.

    Args:
        obs: one row for each cell, indexed by cell id, with the columns `labels_key` and, if given, `donor_key`.
        labels_key: column with the labels.
        donor_key: column whose values stay together; None for `donor_id` if obs has it.
        validation_fraction: share of the labelled cells to hold out, in (0, 1).
        label_fraction: share of the training cells of each label to keep, at least one cell each; in (0, 1].
        ignore_labels: further values that are not labels, besides missing values and "unknown"; see `has_label`.
        min_cells: leave out labels with fewer cells; at least 2.
        seed: determines the split and the cells that `label_fraction` keeps.

    Raises:
        ValueError: fewer than two labels are left, or a cell has no value in `donor_key`.
    """
    labelled = has_label(obs[labels_key], ignore_labels)
    label_of_cell = fill_missing(obs[labels_key][labelled])
    n_cells = label_of_cell.value_counts().sort_index()
    rare = {str(name): int(n) for name, n in n_cells[n_cells < min_cells].items()}
    label_of_cell = label_of_cell[~label_of_cell.isin(list(rare)).to_numpy()]
    _require_labels(label_of_cell, labels_key, len(obs), ignore_labels, rare, min_cells)
    if donor_key is None and "donor_id" in obs:
        donors = obs.loc[label_of_cell.index, "donor_id"]
        donor_key = "donor_id" if donors[has_value(donors)].nunique() > 1 else None
    parts = _split(obs.loc[label_of_cell.index], label_of_cell, donor_key, validation_fraction, seed)
    learned = set(label_of_cell.reindex(parts["train"]))
    unseen = ~label_of_cell.reindex(parts["validation"]).isin(learned).to_numpy()
    parts["validation"], unseen_cells = parts["validation"][~unseen], parts["validation"][unseen]
    n_train = len(parts["train"])
    parts["train"] = keep_share(label_of_cell.reindex(parts["train"]), label_fraction, seed)
    left_out = {
        "unlabelled": int((~labelled).sum()),
        "rare label": sum(rare.values()),
        "label of held-out donors only": len(unseen_cells),
        "training cells dropped by label_fraction": n_train - len(parts["train"]),
    }
    if len(learned) < 2:
        raise ValueError(
            f"of {labels_key!r}, the training cells have only {sorted(learned)}; hold out other cells (--donor_key)"
        )
    if not len(parts["validation"]):
        raise ValueError(
            f"no held-out cell has a label that the training cells have: in obs[{donor_key!r}], the labels of "
            f"{labels_key!r} hardly occur in more than one donor; hold out the values of another column (--donor_key)"
        )
    _log_left_out(left_out, rare, sorted(set(label_of_cell.reindex(unseen_cells))), donor_key)
    label_of_cell = label_of_cell.reindex(np.concatenate(list(parts.values())))
    return LabelledCells(parts, sorted(learned), label_of_cell, donor_key, left_out, rare)


def keep_share(label_of_cell: pd.Series, share: float, seed: int) -> Int64Array:
    """Return the ids of a random share of the cells of each label, rounded up, ascending. Shape (kept cells,).

    With the same seed, a smaller share is a subset of a larger one.

    Args:
        label_of_cell: label of each cell, indexed by cell id. Shape (cells,).
        share: share to keep, in (0, 1].
        seed: determines which cells.
    """
    order = label_of_cell.iloc[np.random.default_rng([seed, 1]).permutation(len(label_of_cell))]
    rank, size = order.groupby(order).cumcount(), order.groupby(order).transform("size")
    return np.sort(order.index.to_numpy(np.int64)[(rank < np.ceil(share * size - _ROUNDING_TOLERANCE)).to_numpy()])


def balanced_weights(classes: Int64Array, n_classes: int) -> npt.NDArray[np.float32]:
    """Return the weight of each class, n_cells / (n_classes * n_cells_of_class). Shape (classes,).

    All classes then have the same total weight, and the mean weight over cells is 1.

    Args:
        classes: class id of each cell; every class occurs. Shape (cells,).
        n_classes: number of classes.

    Source: King & Zeng 2001, Political Analysis 9:137; "balanced" in scikit-learn.
    """
    n_cells = np.bincount(classes, minlength=n_classes)
    return (len(classes) / (n_classes * n_cells)).astype(np.float32)


def _require_labels(
    label_of_cell: pd.Series,
    labels_key: str,
    n_cells: int,
    ignore_labels: Sequence[str],
    rare: dict[str, int],
    min_cells: int,
) -> None:
    names = sorted(set(label_of_cell))
    if len(names) < 2:
        found = f"only {names[0]!r} ({len(label_of_cell):,} cells)" if names else "none"
        few = f"; too few cells (fewer than min_cells {min_cells}) have {_first(rare)}" if rare else ""
        raise ValueError(
            f"a classifier needs two or more labels; of {n_cells:,} cells, obs[{labels_key!r}] has {found}, not "
            f"counting missing values and {list(ignore_labels)}{few}; choose another column (--labels_key)"
        )


def _split(
    obs: pd.DataFrame, label_of_cell: pd.Series, donor_key: str | None, fraction: float, seed: int
) -> dict[str, Int64Array]:
    if donor_key is None:
        return split_within(label_of_cell, fraction, seed)
    fractions = {"train": 1 - fraction, "validation": fraction}
    best: dict[str, Int64Array] = {}
    most = (-1, -1)
    for attempt in range(_N_SPLITS):
        parts = split_cells(obs, fractions, donor_key=donor_key, seed=seed + attempt)
        learned, held_out = (set(label_of_cell.reindex(ids)) for ids in parts.values())
        # A label without training cells is lost, and one without held-out cells is only not scored.
        if (found := (len(learned), len(learned & held_out))) > most:
            best, most = parts, found
        if most[1] == label_of_cell.nunique():
            break
    return best


def _log_left_out(left_out: dict[str, int], rare: dict[str, int], unseen: list[str], donor_key: str | None) -> None:
    if donor_key is None:
        logger.warning(
            "the cells are of a single donor, or no donor is recorded: single cells are held out, the same share of "
            "every label, so the scores say nothing about new donors (--donor_key COLUMN holds out the values of "
            "another column)"
        )
    if rare:
        logger.warning("labels with too few cells, left out: %s", _first(rare))
    if unseen:
        logger.warning("labels of held-out donors only, neither trained nor scored: %s", unseen)
    logger.info("cells left out: %s", left_out)


def _first(rare: dict[str, int]) -> str:
    """Return rare labels with their number of cells, shortened: a column of numbers has one label for each cell."""
    first = dict(list(rare.items())[:_RARE_SHOWN])
    return str(first) if len(first) == len(rare) else f"{first} and {len(rare) - len(first):,} more"
