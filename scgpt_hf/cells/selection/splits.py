"""Split cells into training and validation by donor, and save the split as a manifest, split.json.

No donor is in two parts: cells of one donor resemble each other, so a loss on other cells of the same donors says
nothing about new donors. `split_within` holds out single cells of each group instead, for data without donors.
`filters.py` decides which cells are considered at all.

The manifest is JSON, so it can be read without this package:

    {"seed": 42, "donor_key": "donor_id", "source": {...},
     "parts": {"train": {"n_cells": 3, "donors": ["d1", "d2"], "cell_ranges": [[0, 2], [5, 6]]}, "validation": {...}}}

Cell ids are stored as ranges [start, stop), because the cells of a donor are mostly contiguous in a Census: one million
cells of 100 donors take 3 kB.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.missing import number_texts
from scgpt_hf.cells.obs import are_among, take_cells

# How many times the donors are placed at random; the placement closest to the fractions is kept.
_N_PLACEMENTS = 300
# A manifest that claims more cells is malformed, and its ids would take all memory.
_MAX_CELLS = 10**10


@dataclass(frozen=True, eq=False)
class Split:
    """The contents of a manifest. Create it with `load_split`.

    Attributes:
        parts: part → its cell ids, int64, ascending.
        donors: part → its donors; empty where cells were split without regard to donors.
        donor_key: obs column whose values stay together, or None.
        seed: seed with which the donors were placed.
        source: provenance of the cells: the result of `CellSource.describe`, and what the caller added to it.
    """

    parts: dict[str, Int64Array]
    donors: dict[str, list[str]]
    donor_key: str | None
    seed: int
    source: dict[str, Any]


def split_cells(
    obs: pd.DataFrame, fractions: Mapping[str, float], *, seed: int, donor_key: str | None = "donor_id"
) -> dict[str, Int64Array]:
    """Split cells into parts, so that no donor is in two parts.

    Donors are placed at random until each part is within one cell of its fraction, at most 300 times; then the closest
    placement is kept. A donor that occurs in several datasets is one donor. Every part with a positive fraction gets
    at least one donor, so a small part is larger than its fraction if all donors are large.

    Args:
        obs: one row for each cell, index = cell ids, with column `donor_key`. Shape (cells, columns).
        fractions: part → its share of the cells, e.g. {"train": 0.97, "validation": 0.03}. They add up to 1.
        seed: determines the placement.
        donor_key: column whose values stay together. None splits single cells. Then donors leak between the parts,
            and the validation loss says nothing about new donors.

    Returns:
        Part → int64 cell ids, ascending.

    Raises:
        ValueError: the fractions are invalid, there is no such column, a cell has no donor, or donors are too few.

    Example:
        >>> import pandas as pd
        >>> from scgpt_hf.cells.selection.splits import split_cells
        >>> obs = pd.DataFrame({"donor_id": ["a", "a", "b", "b", "c", "d"]})
        >>> parts = split_cells(obs, {"train": 0.7, "validation": 0.3}, seed=0)
        >>> {part: cell_ids.tolist() for part, cell_ids in parts.items()}
        {'train': [0, 1, 2, 3], 'validation': [4, 5]}
    """
    _require_fractions(fractions)
    rng = np.random.default_rng(seed)
    if donor_key is None:
        donor_of_cell, donors = np.arange(len(obs), dtype=np.int32), obs.index
    else:
        donor_of_cell, donors = find_donors(obs, donor_key)
    n_parts = sum(fraction > 0 for fraction in fractions.values())
    if len(donors) < n_parts:
        raise ValueError(
            f"found {len(donors)} {donor_key or 'cells'} in {len(obs):,} cells, expected at least {n_parts}: one for "
            f"each of {list(fractions)}; use more cells (a wider --obs_filter, a larger --max_cells), "
            "or keep the values of another obs column together (--donor_key). If there is one donor, write such a "
            "column, e.g. adata.obs['part'] = [str(cell % 5) for cell in range(adata.n_obs)]"
        )
    n_cells = np.bincount(donor_of_cell, minlength=len(donors))
    part_of_donor = _place_donors(n_cells, np.array(list(fractions.values())), rng)
    ids = obs.index.to_numpy(np.int64)
    return {name: np.sort(ids[part_of_donor[donor_of_cell] == part]) for part, name in enumerate(fractions)}


def find_donors(obs: pd.DataFrame, donor_key: str) -> tuple[npt.NDArray[np.int32], pd.Index]:
    """Return the number of each cell's donor, shape (cells,), and the sorted names of the donors, shape (donors,).

    Raises:
        ValueError: there are no cells, there is no column `donor_key`, or a cell has no value in it.
    """
    if not len(obs):
        raise ValueError("found no cells to take donors from; widen the filter (--obs_filter)")
    if donor_key not in obs:
        raise ValueError(f"obs has no column {donor_key!r} with the donors; its columns are {list(obs.columns)}")
    donor_of_cell, donors = number_texts(obs[donor_key])
    if missing := int((donor_of_cell < 0).sum()):
        raise ValueError(
            f"{missing:,} of {len(obs):,} cells have no {donor_key}; choose a column that every cell has "
            "(--donor_key, --hvg_batch_key), or leave these cells out (--obs_filter; `cells_with_value` in Python)"
        )
    return donor_of_cell, pd.Index(donors)


def save_split(
    path: str | Path,
    parts: Mapping[str, Int64Array],
    obs: pd.DataFrame,
    *,
    seed: int,
    source: Mapping[str, Any],
    donor_key: str | None = "donor_id",
) -> None:
    """Write the manifest of a split: donors and cell ids of each part, and where the cells come from.

    The file is written atomically, so a crash never leaves an incomplete manifest.

    Args:
        path: where to write; usually split.json in the run folder.
        parts: part → its cell ids, as returned by `split_cells`.
        obs: one row for each cell, index = cell ids, with column `donor_key`. Shape (cells, columns).
        seed: seed passed to `split_cells`.
        source: result of `CellSource.describe`, and anything else to record. It must be serializable as JSON.
        donor_key: column passed to `split_cells`.
    """
    path = Path(path)
    described = {
        name: {
            "n_cells": len(ids),
            "donors": [] if donor_key is None else number_texts(take_cells(obs[donor_key], ids))[1],
            "cell_ranges": _to_ranges(ids),
        }
        for name, ids in parts.items()
    }
    manifest = {"seed": seed, "donor_key": donor_key, "source": dict(source), "parts": described}
    write_atomically(path, json.dumps(manifest) + "\n")


def load_split(path: str | Path) -> Split:
    """Load and check a manifest written by `save_split`.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not a manifest (the message names the key), or a donor or a cell is in two parts.
    """
    path = Path(path)
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; create the split again") from error
    described = _require_key(manifest, "parts", dict, path)
    parts, donors = {}, {}
    for name, part in described.items():
        where = f"{path}, part {name!r}"
        n_cells = _require_key(part, "n_cells", int, where)
        donors[name] = [str(donor) for donor in _require_key(part, "donors", list, where)]
        parts[name] = _from_ranges(_require_key(part, "cell_ranges", list, where), n_cells, where)
    for one, other in combinations(parts, 2):
        if shared := sorted(set(donors[one]) & set(donors[other])):
            raise ValueError(f"{path}: {len(shared)} donors are both in {one!r} and {other!r}, e.g. {shared[:5]}")
        fewer, more = sorted((parts[one], parts[other]), key=len)
        if len(cells := fewer[are_among(fewer, more)]):
            raise ValueError(f"{path}: {len(cells):,} cells are both in {one!r} and {other!r}, e.g. {cells[:5]}")
    donor_key = _require_key(manifest, "donor_key", str | None, path)
    seed = _require_key(manifest, "seed", int, path)
    return Split(parts, donors, donor_key, seed, _require_key(manifest, "source", dict, path))


def split_within(groups: pd.Series, fraction: float, seed: int) -> dict[str, Int64Array]:
    """Hold out a share of each group: at least one cell, and never all of them.

    Args:
        groups: group of each cell, indexed by cell id. Shape (cells,).
        fraction: share to hold out, in (0, 1).
        seed: determines which cells.

    Returns:
        "train" and "validation" → cell ids, ascending.
    """
    order = groups.iloc[np.random.default_rng([seed, 0]).permutation(len(groups))]
    rank, size = order.groupby(order).cumcount(), order.groupby(order).transform("size")
    held_out = (rank < np.clip(np.rint(fraction * size), 1, size - 1)).to_numpy()
    ids = order.index.to_numpy(np.int64)
    return {"train": np.sort(ids[~held_out]), "validation": np.sort(ids[held_out])}


def _require_fractions(fractions: Mapping[str, float]) -> None:
    wrong = {name: share for name, share in fractions.items() if not 0 <= share <= 1}
    if wrong or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"expected fractions in [0, 1] that add up to 1, found {dict(fractions)}")


def _place_donors(
    n_cells: npt.NDArray[np.intp], fractions: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.intp]:
    """Place the donors at random many times, and return the part of each donor in the best placement.

    Args:
        n_cells: number of cells of each donor. Shape (donors,).
        fractions: fraction of the cells of each part. Shape (parts,).
        rng: random numbers.

    Returns:
        Shape (donors,).
    """
    targets = fractions * n_cells.sum()
    best, smallest_error = np.zeros(len(n_cells), np.intp), np.inf
    for _ in range(_N_PLACEMENTS):
        part_of_donor = _place_once(n_cells, targets, rng.permutation(len(n_cells)))
        error = np.abs(np.bincount(part_of_donor, n_cells, minlength=len(targets)) - targets).max()
        if error < smallest_error:
            best, smallest_error = part_of_donor, error
        if error < 1:
            break
    return best


def _place_once(
    n_cells: npt.NDArray[np.intp], targets: npt.NDArray[np.float64], order: npt.NDArray[np.intp]
) -> npt.NDArray[np.intp]:
    """Fill the parts, smallest first. Each part takes, in the given order, every donor that brings it closer.

    The largest part gets the donors that are left: for a large part, one donor more or less matters least.
    """
    *smaller, largest = [part for part in np.argsort(targets, kind="stable") if targets[part] > 0]
    part_of_donor = np.full(len(n_cells), largest, np.intp)
    left = order.tolist()
    for n_later, part in zip(range(len(smaller), 0, -1), smaller, strict=True):
        missing = targets[part]
        taken: list[int] = []
        for donor in left:
            if len(taken) == len(left) - n_later or missing < 0.5:  # keep one donor for each later part
                break
            if n_cells[donor] < 2 * missing:  # equivalent to: afterwards, |target - cells| is smaller
                missing -= n_cells[donor]
                taken.append(donor)
        taken = taken or [min(left, key=n_cells.__getitem__)]
        part_of_donor[taken] = part
        left = [donor for donor in left if part_of_donor[donor] == largest]
    return part_of_donor


def _to_ranges(ids: Int64Array) -> list[list[int]]:
    """Return ascending ids as [start, stop) of each contiguous range."""
    first = np.diff(ids, prepend=ids[:1] - 2) != 1
    last = np.diff(ids, append=ids[-1:] + 2) != 1
    ranges: list[list[int]] = np.column_stack([ids[first], ids[last] + 1]).tolist()
    return ranges


def _from_ranges(ranges: Sequence[Any], n_cells: int, where: str) -> Int64Array:
    """Return the ids of ranges [start, stop).

    Raises:
        ValueError: the ranges do not ascend or touch each other, or hold another number of cells than `n_cells`.
    """
    bounds = [bound for one in ranges if isinstance(one, list) and len(one) == 2 for bound in one]
    are_pairs = len(bounds) == 2 * len(ranges) and all(type(bound) is int for bound in bounds)
    if not are_pairs or any(after <= before for before, after in pairwise([-1, *bounds])):
        raise ValueError(f"{where}: expected 'cell_ranges' of ascending [start, stop), found {str(ranges)[:80]}")
    if (found := sum(stop - start for start, stop in ranges)) != n_cells or found > _MAX_CELLS:
        raise ValueError(f"{where}: 'cell_ranges' hold {found:,} cells, but 'n_cells' is {n_cells:,}")
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(*one, dtype=np.int64) for one in ranges)])


def _require_key(found: Any, key: str, kind: Any, where: str | Path) -> Any:
    """Return found[key], or raise ValueError unless it is there and of the expected type."""
    if not isinstance(found, dict) or key not in found or not isinstance(found[key], kind):
        value = found.get(key, "nothing") if isinstance(found, dict) else found
        raise ValueError(f"{where}: expected {key!r} as {getattr(kind, '__name__', kind)}, found {str(value)[:80]!r}")
    return found[key]
