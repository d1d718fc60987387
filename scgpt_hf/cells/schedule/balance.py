"""Draw rare groups of cells more often: decide which cells an epoch visits, and how often.

In natural order every cell is visited once an epoch, so frequent cell types, tissues or donors dominate. A `Balance`
draws as many cells, but shares them out between groups by n^(1 − power), n cells in the group: 0 is the natural share,
1 the same share for every group. Within its group no cell is drawn more often than another, but for one draw:

    cells of the groups       900   90   10
    draws, power 0            900   90   10      each cell once
    draws, power 0.5          699  221   74      e.g. each of the 10 cells 7 or 8 times (rounding varies by epoch)
    draws, power 1            333  333  333

A *draw* is a cell with the number of its repeat, in one number, `repeat * REPEAT + cell id`. So draws are unique and
ascend; a plan of an epoch (`epoch.py`) schedules them as if they were cells. The repeats of a cell are in different
chunks, which spreads them over the epoch, and have different random numbers, so that each shows other masks, ties and
sampled genes. The first draw of a cell is its id.
"""

from dataclasses import dataclass
from functools import lru_cache
from hashlib import sha256
from typing import Any

import numpy as np
import pandas as pd

from scgpt_hf.cells.block import Float64Array, Int64Array
from scgpt_hf.cells.missing import has_label
from scgpt_hf.cells.schedule.epoch import EpochPlan, plan_epoch
from scgpt_hf.cells.schedule.tokens import REPEAT


@dataclass(frozen=True, eq=False)
class Balance:
    """How often each group of cells is drawn. Create it with `balance_groups`.

    Attributes:
        cell_ids: ids of the training cells, ascending. Shape (cells,).
        names: name of each group, ascending.
        sizes: number of cells of each group. Shape (groups,).
        order: positions of the cells, sorted by group; those without a group come first. Shape (cells,).
        power: 0 draws groups by their size, 1 equally often.
    """

    cell_ids: Int64Array
    names: tuple[str, ...]
    sizes: Int64Array
    order: Int64Array
    power: float

    @property
    def n_without(self) -> int:
        """Number of cells without a group. Each is drawn once an epoch, as in natural order."""
        return len(self.order) - int(self.sizes.sum())

    @property
    def expected_draws(self) -> Float64Array:
        """Mean number of draws of each group in an epoch. Shape (groups,)."""
        weights = self.sizes.astype(np.float64) ** (1 - self.power)
        expected: Float64Array = weights * (self.sizes.sum() / weights.sum())
        return expected

    def fingerprint(self) -> str:
        """Return a hash of the groups of all cells; a resumed run must have the same."""
        content = sha256("\n".join(self.names).encode())
        content.update(self.sizes.tobytes() + self.order.tobytes())
        return content.hexdigest()[:16]

    def draw(self, *, seed: int, epoch: int) -> Int64Array:
        """Return the draws of one epoch: as many as there are cells.

        Args:
            seed: seed of the run.
            epoch: number of the epoch. Each epoch draws other cells of a group that is not shown completely.

        Returns:
            Draws, ascending, without repeats; `split_draws` finds their cells. Shape (cells,).
        """
        # [seed, epoch] and [seed, epoch, window + 1] shuffle the epoch; see `EpochPlan.window`.
        rng = np.random.default_rng([seed, epoch, 0, 1])
        # One random offset for all groups rounds each expectation up or down with the right probability, and keeps
        # their sum: systematic sampling.
        bounds = np.cumsum(self.expected_draws)
        bounds[-1] = self.sizes.sum()
        draws_of_group = np.diff(np.floor(bounds + rng.random()).astype(np.int64), prepend=0)
        n_draws = np.ones(len(self.cell_ids), np.int64)
        start = self.n_without
        for size, n in zip(self.sizes.tolist(), draws_of_group.tolist(), strict=True):
            own = self.order[start : start + size]
            n_draws[own] = n // size
            n_draws[rng.choice(own, n % size, replace=False, shuffle=False)] += 1
            start += size
        firsts = np.cumsum(n_draws) - n_draws
        repeats = np.arange(len(n_draws)) - np.repeat(firsts, n_draws)
        return np.sort(repeats * REPEAT + np.repeat(self.cell_ids, n_draws))


def balance_groups(labels: pd.Series, power: float) -> Balance:
    """Return how often each group of cells is drawn.

    Args:
        labels: group of each training cell, by ascending cell id, the index. Cells without a label, or with the label
            "unknown", belong to no group.
        power: 0 draws groups by their size, 1 equally often.

    Raises:
        ValueError: there are fewer than two groups, or more cells than draws can number.

    Source: sampling by n^(1 − power) as between the languages of Conneau and Lample 2019, arXiv:1901.07291, section
        3.1, where the exponent is 0.5.

    Example:
        >>> labels = pd.Series(["T cell"] * 8 + ["B cell"] * 2)
        >>> balance = balance_groups(labels, power=1.0)
        >>> dict(zip(balance.names, balance.expected_draws.tolist()))
        {'B cell': 5.0, 'T cell': 5.0}
        >>> cells, rows = split_draws(balance.draw(seed=0, epoch=0))
        >>> np.bincount(cells[rows], minlength=10)[8:]  # the two B cells
        array([2, 3])
    """
    if len(labels) >= 1 << 29 or labels.index.max() >= REPEAT:
        raise ValueError(
            f"balanced sampling needs fewer than {1 << 29:,} cells with ids below {REPEAT:,}, found {len(labels):,} "
            f"cells with ids up to {labels.index.max():,}; train on fewer cells (max_cells)"
        )
    known = has_label(labels)
    codes, names = pd.factorize(labels.astype(object).astype(str).where(known), sort=True)  # −1 where not known
    if len(names) < 2:
        raise ValueError(
            f"expected at least two groups of cells to balance, found {list(names)} and {int((~known).sum()):,} cells "
            "without a label; balance by another column (balance_by)"
        )
    sizes = np.bincount(codes[codes >= 0]).astype(np.int64)
    order = np.argsort(codes, kind="stable").astype(np.int64)
    return Balance(labels.index.to_numpy(np.int64), tuple(map(str, names)), sizes, order, power)


def split_draws(draws: Int64Array) -> tuple[Int64Array, Int64Array]:
    """Return the cells to read for some draws, and the row of each draw among them.

    Args:
        draws: draws in any order. Shape (draws,).

    Returns:
        Cell ids without repeats, shape (cells,), in the order of the draws if these are cells in natural order, else
        ascending; and rows, shape (draws,).
    """
    if not (draws >= REPEAT).any():
        return draws, np.arange(len(draws))
    cells, rows = np.unique(draws % REPEAT, return_inverse=True)
    return cells, rows


@dataclass(frozen=True, eq=False)
class BalancedPlan(EpochPlan):
    """A plan that visits the draws of an epoch instead of its cells. Create it with `plan_balanced`.

    It has as many steps and windows as the natural order, whose plan the other attributes describe. The draws are
    computed when the first window is read and forgotten in later epochs: they take 80 MB for 10 million cells, and a
    run plans all its epochs before it starts.

    Attributes:
        balance: draws the cells.
        order: arguments of `plan_epoch`, as names with values.
    """

    balance: Balance
    order: tuple[tuple[str, Any], ...]

    @property
    def drawn(self) -> EpochPlan:
        """The plan of the draws."""
        return _plan_draws(self.balance, self.order)

    def window(self, index: int) -> Int64Array:
        """Return the draws of one shuffle window, one row for each global step; see `EpochPlan.window`."""
        return self.drawn.window(index)


def plan_balanced(balance: Balance, **order: Any) -> BalancedPlan:
    """Plan one epoch over drawn cells.

    Args:
        balance: draws the cells.
        order: arguments of `plan_epoch`, with `seed`, `epoch` and `batch_size`.

    Raises:
        ValueError: see `plan_epoch`.
    """
    natural = plan_epoch(balance.cell_ids, **order)
    return BalancedPlan(**vars(natural), balance=balance, order=tuple(order.items()))


@lru_cache(maxsize=2)  # the next epoch is read ahead while the last window of this one is trained on
def _plan_draws(balance: Balance, order: tuple[tuple[str, Any], ...]) -> EpochPlan:
    arguments = dict(order)
    return plan_epoch(balance.draw(seed=arguments["seed"], epoch=arguments["epoch"]), **arguments)
