"""Which cells teach a classifier and which hold it to account: labels in, cells of each part out.

Nothing is left out in silence: unlabelled cells and rare labels are counted, and the counts go to the summary.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pandas as pd

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.selection.splits import split_cells

logger = logging.getLogger(__name__)

# Seeds tried for a split of whole donors, of which the one with most labels on both sides is taken.
_SPLITS = 20


@dataclass(frozen=True, eq=False)
class LabelledCells:
    """The cells a classifier learns from and is judged by.

    Attributes:
        parts: "train" and "validation" → cell ids, ascending.
        labels: names of the classes, sorted, in the order of their ids.
        label_of: name of each cell's label, indexed by cell id; cells that were left out are not in it.
        donor_key: obs column whose values were held out whole; None where single cells were held out.
        left_out: why → how many cells.
        rare: labels left out for having too few cells → how many they have.
    """

    parts: dict[str, Int64Array]
    labels: list[str]
    label_of: pd.Series
    donor_key: str | None
    left_out: dict[str, int]
    rare: dict[str, int]

    def classes(self, part: str) -> Int64Array:
        """Return the class of each cell of a part, in the order of its ids. Shape (cells,)."""
        return np.searchsorted(self.labels, self.label_of.reindex(self.parts[part]).to_numpy(str)).astype(np.int64)


def choose_labelled(
    obs: pd.DataFrame,
    label: str,
    *,
    donor_key: str | None,
    validation_fraction: float,
    label_fraction: float,
    ignore: Sequence[str],
    min_cells: int,
    seed: int,
) -> LabelledCells:
    """Return the cells with a label that can be learned, split into training and validation.

    Whole donors (values of `donor_key`) are held out: of twenty random splits the first one with most labels on both
    sides. With a single donor, or none recorded, cells are held out instead, the same share of every label and at least
    one cell of each; what is then measured says nothing about new donors. A label that only held-out donors have cannot
    be learned, and is not scored either.

    Args:
        obs: one row for each cell, index = cell ids, with the columns `label` and, if given, `donor_key`.
        label: column with the labels.
        donor_key: column whose values stay together; None for `donor_id` where obs has it.
        validation_fraction: share of the labelled cells held out, in (0, 1).
        label_fraction: share of the training cells of each label that is kept, at least one cell each; in (0, 1].
        ignore: values that are no labels. Missing and empty values never are.
        min_cells: labels with fewer cells are left out, at least 2.
        seed: settles split and share.

    Raises:
        ValueError: fewer than two labels are left, or cells have no value in `donor_key`.
    """
    text = obs[label].astype(object)
    labelled = (text.notna() & ~text.astype(str).isin(["", *ignore])).to_numpy()
    n_cells = text[labelled].astype(str).value_counts().sort_index()
    rare = {str(name): int(n) for name, n in n_cells[n_cells < min_cells].items()}
    label_of = text[labelled].astype(str)
    label_of = label_of[~label_of.isin(list(rare)).to_numpy()]
    _require_labels(label_of, label, len(obs), ignore, rare, min_cells)
    if donor_key is None and "donor_id" in obs and obs.loc[label_of.index, "donor_id"].nunique() > 1:
        donor_key = "donor_id"
    parts = _split(obs.loc[label_of.index], label_of, donor_key, validation_fraction, seed)
    learned = set(label_of.reindex(parts["train"]))
    lost = ~label_of.reindex(parts["validation"]).isin(learned).to_numpy()
    parts["validation"], lost_cells = parts["validation"][~lost], parts["validation"][lost]
    n_train = len(parts["train"])
    parts["train"] = keep_share(label_of.reindex(parts["train"]), label_fraction, seed)
    left_out = {
        "unlabelled": int((~labelled).sum()),
        "rare label": sum(rare.values()),
        "label of held-out donors only": len(lost_cells),
        "label not used (label_fraction)": n_train - len(parts["train"]),
    }
    if len(learned) < 2:
        raise ValueError(
            f"of {label!r}, training cells have only {sorted(learned)}; hold out other cells (--donor_key)"
        )
    _report(left_out, rare, sorted(set(label_of.reindex(lost_cells))), donor_key)
    label_of = label_of.reindex(np.concatenate(list(parts.values())))
    return LabelledCells(parts, sorted(learned), label_of, donor_key, left_out, rare)


def keep_share(label_of: pd.Series, share: float, seed: int) -> Int64Array:
    """Return a random share of the cells of each label, rounded up, as ascending ids.

    A smaller share of the same cells is part of a larger one.
    """
    order = label_of.iloc[np.random.default_rng([seed, 1]).permutation(len(label_of))]
    rank, size = order.groupby(order).cumcount(), order.groupby(order).transform("size")
    return np.sort(order.index.to_numpy(np.int64)[(rank < np.ceil(share * size - 1e-9)).to_numpy()])


def split_within(groups: pd.Series, fraction: float, seed: int) -> dict[str, Int64Array]:
    """Return "train" and "validation": a share of each group held out, at least one cell and never all.

    Args:
        groups: group of each cell, indexed by cell id. Shape (cells,).
        fraction: share held out, in (0, 1).
        seed: settles which.
    """
    order = groups.iloc[np.random.default_rng([seed, 0]).permutation(len(groups))]
    rank, size = order.groupby(order).cumcount(), order.groupby(order).transform("size")
    held_out = (rank < np.clip(np.rint(fraction * size), 1, size - 1)).to_numpy()
    ids = order.index.to_numpy(np.int64)
    return {"train": np.sort(ids[~held_out]), "validation": np.sort(ids[held_out])}


def balanced_weights(classes: Int64Array, n_classes: int) -> npt.NDArray[np.float32]:
    """Return the weight of each class, n / (n_classes * n_class), so that classes weigh the same and the mean cell 1.

    Source: King & Zeng 2001, Political Analysis 9:137; "balanced" in scikit-learn.
    """
    n_cells = np.bincount(classes, minlength=n_classes)
    return (len(classes) / (n_classes * n_cells)).astype(np.float32)


def _require_labels(
    label_of: pd.Series, label: str, n_cells: int, ignore: Sequence[str], rare: dict[str, int], min_cells: int
) -> None:
    names = sorted(set(label_of))
    if len(names) < 2:
        found = f"only {names[0]!r} ({len(label_of):,} cells)" if names else "none"
        few = f"; too few cells (fewer than min_cells {min_cells}) have {rare}" if rare else ""
        raise ValueError(
            f"a classifier needs two labels or more; of {n_cells:,} cells, obs[{label!r}] has {found}, not counting "
            f"missing values and {list(ignore)}{few}; choose another column (--labels_key)"
        )


def _split(
    obs: pd.DataFrame, label_of: pd.Series, donor_key: str | None, fraction: float, seed: int
) -> dict[str, Int64Array]:
    if donor_key is None:
        return split_within(label_of, fraction, seed)
    fractions = {"train": 1 - fraction, "validation": fraction}
    best: dict[str, Int64Array] = {}
    most = -1
    for attempt in range(_SPLITS):
        parts = split_cells(obs, fractions, donor_key=donor_key, seed=seed + attempt)
        n_shared = len(set(label_of.reindex(parts["train"])) & set(label_of.reindex(parts["validation"])))
        if n_shared > most:
            best, most = parts, n_shared
        if most == label_of.nunique():
            break
    return best


def _report(left_out: dict[str, int], rare: dict[str, int], lost: list[str], donor_key: str | None) -> None:
    if donor_key is None:
        logger.warning(
            "there is one donor only, or none is recorded: cells are held out, the same share of every label; the "
            "scores say nothing about new donors (--donor_key COLUMN holds out the values of another column)"
        )
    if rare:
        logger.warning("left out for having too few cells: %s", rare)
    if lost:
        logger.warning("labels of held-out donors only, neither learned nor scored: %s", lost)
    logger.info("cells left out: %s", left_out)
