"""Thinned counts: inputs as if the cell had been sequenced less deeply, and the second view of the objective "views".

Every molecule of a cell is kept with the same probability, as if the cell had been sequenced less deeply. The count of
each gene is then binomial. The numbers depend on the seed, the epoch, the cell and the gene only.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .counts_scgpt import SparseCounts, count_known_genes
from .randomness_scgpt import (
    SPACING,
    THINNING,
    THINNING_NORMAL,
    UNUSED_BITS,
    VIEW_KEEP,
    Int64Array,
    cell_keys,
    random_words,
    to_uniform,
)
from .sampling_scgpt import COMPILED, Array, compiled, random_word

_Floats = npt.NDArray[np.float64]

LARGEST_EXACT = 100
"""Larger counts are thinned by the normal approximation, which is close to the binomial there (np ≥ 5 for p ≥ .05)."""


class _Thinned:
    """Counts in CSR form with other values; see `SparseCounts`."""

    def __init__(self, counts: SparseCounts, data: npt.NDArray[np.float32]) -> None:
        self.data, self.indices, self.indptr, self.shape = data, counts.indices, counts.indptr, counts.shape


def thin_counts(
    counts: SparseCounts,
    gene_ids: Int64Array,
    keep: Sequence[float],
    *,
    cell_ids: Int64Array,
    seed: int,
    epoch: int,
) -> SparseCounts:
    """Keep each molecule of a cell with one probability, which is drawn for the cell.

    A cell of which no known gene would be left keeps all its counts, so that every cell has a view.

    Args:
        counts: whole counts without repeated entries or genes, from `validate_counts`. Shape (cells, genes).
        gene_ids: vocabulary id of each column, −1 where unknown. Shape (genes,).
        keep: probabilities in (0, 1]; one is drawn for each cell.
        cell_ids: id of each cell. Shape (cells,).
        seed: seed of the run.
        epoch: number of the epoch.

    Returns:
        Counts with the same entries, of which some may be 0; float32.

    Raises:
        ValueError: `keep` is empty or contains a number outside (0, 1].
    """
    choices = np.asarray(keep, np.float64)
    if choices.ndim != 1 or not choices.size or not ((choices > 0) & (choices <= 1)).all():
        raise ValueError(f"expected at least one share of counts to keep, each in (0, 1]; found {keep!r}")
    drawn = to_uniform(cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=VIEW_KEEP))
    choice = (drawn * len(choices)).astype(np.int64)
    genes = gene_ids[counts.indices]
    # Genes that the vocabulary does not know count for the total of a cell. Their columns stand for them.
    genes = np.where(genes >= 0, genes, len(gene_ids) + gene_ids.max(initial=0) + counts.indices.astype(np.int64))
    entries = np.asarray(counts.data, np.float64)
    keys = cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=THINNING)
    # Draw the rarer of "kept" and "lost": it needs fewer steps, and its probability of 0 does not underflow.
    rarer = np.minimum(choices, 1 - choices)
    # The probability that none of n molecules is drawn, for each choice and n.
    none: _Floats = (1 - rarer[:, None]) ** np.arange(LARGEST_EXACT + 1)
    drawer = _draw_compiled if COMPILED else _draw
    number = drawer(entries, genes, np.asarray(counts.indptr, np.int64), keys, choice, none, rarer / (1 - rarer))
    lengths = np.diff(counts.indptr)
    share = np.repeat(choices[choice], lengths)
    if (large := entries > LARGEST_EXACT).any():
        more_keys = cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=THINNING_NORMAL)
        first, second = (
            to_uniform(random_words(np.repeat(one, lengths)[large], genes[large])) for one in (keys, more_keys)
        )
        number[large] = _normal(first, second, entries[large], np.minimum(share, 1 - share)[large])
    thinned = _Thinned(counts, np.where(share <= 0.5, number, entries - number).astype(np.float32))
    emptied = np.repeat(count_known_genes(thinned, gene_ids) == 0, lengths)
    thinned.data[emptied] = entries[emptied]
    return thinned


def _draw(
    entries: _Floats, genes: Any, indptr: Int64Array, keys: Any, choice: Int64Array, none: _Floats, odds: _Floats
) -> _Floats:
    """Draw a binomial number for each entry: the smallest k whose distribution function exceeds a uniform number.

    Args:
        entries: counts; those above `LARGEST_EXACT` get 0. Shape (entries,).
        genes: gene of each entry. Shape (entries,).
        indptr: offsets of the cells. Shape (cells + 1,).
        keys: key of each cell. Shape (cells,).
        choice: probability of each cell, as a row of `none`. Shape (cells,).
        none: probability that k is 0, for each probability and count. Shape (choices, LARGEST_EXACT + 1).
        odds: p / (1 - p). Shape (choices,).
    """
    lengths = np.diff(indptr)
    k = np.zeros(len(entries))
    # Entries leave the loop when they are done; counts are small, so few take many turns.
    open_ = np.flatnonzero(entries <= LARGEST_EXACT)
    row = np.repeat(choice, lengths)[open_]
    probability = none[row, entries[open_].astype(np.int64)]
    uniform = to_uniform(random_words(np.repeat(keys, lengths)[open_], genes[open_]))
    rest = uniform - probability  # what the distribution function still lacks
    while True:
        going = (rest >= 0) & (k[open_] < entries[open_])
        open_, row, probability, rest = open_[going], row[going], probability[going], rest[going]
        if not len(open_):
            return k
        k[open_] += 1
        done, all_of = k[open_], entries[open_]
        probability = probability * (all_of - done + 1) / done * odds[row]
        rest = rest - probability


@compiled
def _draw_compiled(
    entries: Array, genes: Array, indptr: Array, keys: Array, choice: Array, none: Array, odds: Array
) -> Array:
    """Compute the numbers of `_draw`, equal to the bit, at many times its speed."""
    number = np.zeros(len(entries))
    for cell in range(len(keys)):
        row = choice[cell]
        for i in range(indptr[cell], indptr[cell + 1]):
            n = entries[i]
            if n > LARGEST_EXACT:
                continue
            uniform = float(random_word(keys[cell], genes[i]) >> UNUSED_BITS) * SPACING
            k, probability = 0.0, none[row, int(n)]
            rest = uniform - probability
            while rest >= 0 and k < n:
                k += 1.0
                if k == n:  # saves the division for counts of 1, the most frequent ones
                    break
                probability = probability * (n - k + 1) / k * odds[row]
                rest -= probability
            number[i] = k
    return number


def _normal(first: _Floats, second: _Floats, n: _Floats, p: _Floats) -> _Floats:
    """Return binomial numbers by the normal approximation, from two uniform numbers each.

    Source: the transform of Box and Muller 1958, doi:10.1214/aoms/1177706645.
    """
    normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    number: _Floats = np.clip(np.rint(n * p + np.sqrt(n * p * (1 - p)) * normal), 0, n)
    return number
