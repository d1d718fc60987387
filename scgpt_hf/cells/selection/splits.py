"""Which cells train and which validate: whole donors, so that no donor is seen in two parts; and the manifest of it.

Which donors are considered at all is decided before, in `select.py`.
"""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from scgpt_hf.cells.block import Int64Array

# Random placements of the donors, of which the one closest to the asked fractions is kept.
_PLACEMENTS = 300
_MOST_CELLS = 10**10  # a manifest that claims more is malformed, and would take all memory


@dataclass(frozen=True, eq=False)
class Split:
    """What a manifest holds.

    Attributes:
        parts: cell ids of each part, ascending, int64.
        donors: donors of each part; empty when cells were split without regard to donors.
        donor_key: the obs column whose values stay together, or None.
        seed: that placed the donors.
        source: where the cells come from; what `CellSource.describe` returned, and what the caller added.
    """

    parts: dict[str, Int64Array]
    donors: dict[str, list[str]]
    donor_key: str | None
    seed: int
    source: dict[str, Any]


def split_cells(
    obs: pd.DataFrame, fractions: Mapping[str, float], *, seed: int, donor_key: str | None = "donor_id"
) -> dict[str, Int64Array]:
    """Return the cell ids of each part; no donor is in two parts.

    Donors are placed at random up to 300 times, until each part is within a cell of its fraction of the cells;
    else the closest placement is kept. A donor found in several datasets is one donor. Every part of a positive
    fraction gets a donor, so a small part is larger than asked when all donors are large.

    Args:
        obs: one row for each cell, index = cell ids, with column `donor_key`. Shape (cells, columns).
        fractions: share of the cells of each part, e.g. {"train": 0.97, "validation": 0.03}; they add up to 1.
        seed: settles the placement.
        donor_key: column whose values stay together. None splits single cells, which leaks: cells of one donor resemble
            each other, so the loss on the other part then says nothing about new donors.

    Returns:
        For each part int64 cell ids, ascending.

    Raises:
        ValueError: fractions that are no fractions, no such column, cells without a donor, or too few donors.
    """
    _require_fractions(fractions)
    rng = np.random.default_rng(seed)
    if donor_key is None:
        donor_of_cell, donors = np.arange(len(obs)), obs.index
    else:
        donor_of_cell, donors = find_donors(obs, donor_key)
    n_parts = sum(fraction > 0 for fraction in fractions.values())
    if len(donors) < n_parts:
        raise ValueError(
            f"found {len(donors)} {donor_key or 'cells'} in {len(obs):,} cells, expected at least {n_parts}: one for "
            f"each of {list(fractions)}; take in more of them (a wider --obs_filter, a larger --max_cells), "
            "or keep the values of another obs column together (--donor_key)"
        )
    n_cells = np.bincount(donor_of_cell, minlength=len(donors))
    part_of_donor = _place_donors(n_cells, np.array(list(fractions.values())), rng)
    ids = obs.index.to_numpy(np.int64)
    return {name: np.sort(ids[part_of_donor[donor_of_cell] == part]) for part, name in enumerate(fractions)}


def find_donors(obs: pd.DataFrame, donor_key: str) -> tuple[npt.NDArray[np.intp], pd.Index]:
    """Return the number of each cell's donor, shape (cells,), and the donors by number, sorted, as text.

    Raises:
        ValueError: no cells, no column `donor_key`, or a cell without a value in it.
    """
    if not len(obs):
        raise ValueError("found no cells to take donors from; widen the filter (--obs_filter)")
    if donor_key not in obs:
        raise ValueError(f"obs has no column {donor_key!r} to tell donors apart; its columns are {list(obs.columns)}")
    missing = int(obs[donor_key].isna().sum())
    if missing:
        raise ValueError(
            f"{missing:,} of {len(obs):,} cells have no {donor_key}; choose a column that every cell has "
            "(--donor_key, --hvg_batch_key), or leave these cells out (--obs_filter; `null_free` in Python)"
        )
    donor_of_cell, donors = pd.factorize(obs[donor_key].astype(str), sort=True)
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
    """Write the manifest of a split as JSON: donors, number of cells and cell ids of each part, and their provenance.

    Cell ids are written as runs [start, stop). The file is written beside and renamed, so it is whole or not there.

    Args:
        path: usually `split.json` of the run folder.
        parts: cell ids of each part, as `split_cells` returns them.
        obs: one row for each cell, index = cell ids, with column `donor_key`. Shape (cells, columns).
        seed: that was given to `split_cells`.
        source: what `CellSource.describe` returns, with anything else worth keeping; JSON-able.
        donor_key: that was given to `split_cells`.
    """
    path = Path(path)
    described = {
        name: {
            "n_cells": len(ids),
            "donors": [] if donor_key is None or not len(ids) else find_donors(obs.loc[ids], donor_key)[1].tolist(),
            "runs": _to_runs(ids),
        }
        for name, ids in parts.items()
    }
    manifest = {"seed": seed, "donor_key": donor_key, "source": dict(source), "parts": described}
    beside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        beside.write_text(json.dumps(manifest) + "\n")
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def load_split(path: str | Path) -> Split:
    """Return what `save_split` wrote, checked.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no manifest (the message names the key), or a donor or a cell is in two parts.
    """
    path = Path(path)
    try:
        manifest = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}; make the split anew") from error
    described = _require_key(manifest, "parts", dict, path)
    parts, donors = {}, {}
    for name, part in described.items():
        where = f"{path}, part {name!r}"
        n_cells = _require_key(part, "n_cells", int, where)
        donors[name] = [str(donor) for donor in _require_key(part, "donors", list, where)]
        parts[name] = _from_runs(_require_key(part, "runs", list, where), n_cells, where)
    for one, other in combinations(parts, 2):
        if shared := sorted(set(donors[one]) & set(donors[other])):
            raise ValueError(f"{path}: {len(shared)} donors are both in {one!r} and {other!r}, e.g. {shared[:5]}")
        if len(cells := np.intersect1d(parts[one], parts[other])):
            raise ValueError(f"{path}: {len(cells):,} cells are both in {one!r} and {other!r}, e.g. {cells[:5]}")
    donor_key = _require_key(manifest, "donor_key", str | None, path)
    seed = _require_key(manifest, "seed", int, path)
    return Split(parts, donors, donor_key, seed, _require_key(manifest, "source", dict, path))


def _require_fractions(fractions: Mapping[str, float]) -> None:
    wrong = {name: share for name, share in fractions.items() if not 0 <= share <= 1}
    if wrong or abs(sum(fractions.values()) - 1) > 1e-6:
        raise ValueError(f"expected fractions in [0, 1] that add up to 1, found {dict(fractions)}")


def _place_donors(
    n_cells: npt.NDArray[np.intp], fractions: npt.NDArray[np.float64], rng: np.random.Generator
) -> npt.NDArray[np.intp]:
    """Return the part of each donor, shape (donors,): of many random placements the one closest to the fractions."""
    asked = fractions * n_cells.sum()
    best, smallest_error = np.zeros(len(n_cells), np.intp), np.inf
    for _ in range(_PLACEMENTS):
        part_of_donor = _place_once(n_cells, asked, rng.permutation(len(n_cells)))
        error = np.abs(np.bincount(part_of_donor, n_cells, minlength=len(asked)) - asked).max()
        if error < smallest_error:
            best, smallest_error = part_of_donor, error
        if error < 1:
            break
    return best


def _place_once(
    n_cells: npt.NDArray[np.intp], asked: npt.NDArray[np.float64], order: npt.NDArray[np.intp]
) -> npt.NDArray[np.intp]:
    """Fill the parts from the smallest up; each takes, in the order given, the donors that bring it closer."""
    *smaller, largest = [part for part in np.argsort(asked, kind="stable") if asked[part] > 0]
    part_of_donor = np.full(len(n_cells), largest, np.intp)
    left = order.tolist()
    for n_later, part in zip(range(len(smaller), 0, -1), smaller, strict=True):
        missing = asked[part]
        taken: list[int] = []
        for donor in left:
            if len(taken) == len(left) - n_later or missing < 0.5:
                break
            if n_cells[donor] < 2 * missing:
                missing -= n_cells[donor]
                taken.append(donor)
        taken = taken or [min(left, key=n_cells.__getitem__)]
        part_of_donor[taken] = part
        left = [donor for donor in left if part_of_donor[donor] == largest]
    return part_of_donor


def _to_runs(ids: Int64Array) -> list[list[int]]:
    """Return ascending ids as [start, stop) of each contiguous run."""
    first = np.diff(ids, prepend=ids[:1] - 2) != 1
    last = np.diff(ids, append=ids[-1:] + 2) != 1
    runs: list[list[int]] = np.column_stack([ids[first], ids[last] + 1]).tolist()
    return runs


def _from_runs(runs: Sequence[Any], n_cells: int, where: str) -> Int64Array:
    """Return the ids of runs [start, stop), or raise unless the runs ascend without touching and hold `n_cells`."""
    bounds = [bound for run in runs if isinstance(run, list) and len(run) == 2 for bound in run]
    whole = len(bounds) == 2 * len(runs) and all(type(bound) is int for bound in bounds)
    if not whole or any(after <= before for before, after in pairwise([-1, *bounds])):
        raise ValueError(f"{where}: expected 'runs' of ascending [start, stop), found {str(runs)[:80]}")
    if (found := sum(stop - start for start, stop in runs)) != n_cells or found > _MOST_CELLS:
        raise ValueError(f"{where}: 'runs' hold {found:,} cells, but 'n_cells' is {n_cells:,}")
    return np.concatenate([np.zeros(0, np.int64), *(np.arange(*run, dtype=np.int64) for run in runs)])


def _require_key(found: Any, key: str, kind: Any, where: str | Path) -> Any:
    if not isinstance(found, dict) or key not in found or not isinstance(found[key], kind):
        value = found.get(key, "nothing") if isinstance(found, dict) else found
        raise ValueError(f"{where}: expected {key!r} as {getattr(kind, '__name__', kind)}, found {str(value)[:80]!r}")
    return found[key]
