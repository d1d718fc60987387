"""Thinned counts: the second view of each cell for the objective "views".

Every molecule of a cell is kept with the same probability, as if the cell had been sequenced less deeply. The count of
each gene is then binomial. The numbers depend on the seed, the epoch, the cell and the gene only.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from .counts_scgpt import SparseCounts, count_known_genes
from .randomness_scgpt import (
    THINNING,
    THINNING_NORMAL,
    VIEW_KEEP,
    Int64Array,
    UInt64Array,
    cell_keys,
    random_words,
    to_uniform,
)

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
    lengths = np.diff(counts.indptr)
    share = np.repeat(choices[(drawn * len(choices)).astype(np.int64)], lengths)
    genes = gene_ids[counts.indices]
    # Genes that the vocabulary does not know count for the total of a cell. Their columns stand for them.
    genes = np.where(genes >= 0, genes, len(gene_ids) + gene_ids.max(initial=0) + counts.indices.astype(np.int64))

    def words(purpose: int) -> UInt64Array:
        keys = cell_keys(cell_ids, seed=seed, epoch=epoch, purpose=purpose)
        return random_words(np.repeat(keys, lengths), genes)

    entries = np.asarray(counts.data, np.float64)
    large = entries > LARGEST_EXACT
    # Draw the rarer of "kept" and "lost": it needs fewer steps, and its probability of 0 does not underflow.
    rarer = np.minimum(share, 1 - share)
    uniform = to_uniform(words(THINNING))
    number = np.empty(len(entries))
    number[~large] = _binomial(uniform[~large], entries[~large], rarer[~large])
    if large.any():
        second = to_uniform(words(THINNING_NORMAL))
        number[large] = _normal(uniform[large], second[large], entries[large], rarer[large])
    thinned = _Thinned(counts, np.where(share <= 0.5, number, entries - number).astype(np.float32))
    emptied = np.repeat(count_known_genes(thinned, gene_ids) == 0, lengths)
    thinned.data[emptied] = entries[emptied]
    return thinned


def _binomial(uniform: _Floats, n: _Floats, p: _Floats) -> _Floats:
    """Return the smallest k whose binomial distribution function exceeds the uniform number, for each entry."""
    k = np.zeros(len(n))
    # Entries leave the loop when they are done; counts are small, so few take many turns.
    open_ = np.arange(len(n))
    probability = (1 - p) ** n
    rest = uniform - probability  # what the distribution function still lacks
    while True:
        going = (rest >= 0) & (k[open_] < n[open_])
        open_, probability, rest = open_[going], probability[going], rest[going]
        if not len(open_):
            return k
        k[open_] += 1
        done, all_of, odds = k[open_], n[open_], p[open_] / (1 - p[open_])
        probability = probability * (all_of - done + 1) / done * odds
        rest = rest - probability


def _normal(first: _Floats, second: _Floats, n: _Floats, p: _Floats) -> _Floats:
    """Return binomial numbers by the normal approximation, from two uniform numbers each.

    Source: the transform of Box and Muller 1958, doi:10.1214/aoms/1177706645.
    """
    normal = np.sqrt(-2 * np.log1p(-first)) * np.cos(2 * np.pi * second)
    number: _Floats = np.clip(np.rint(n * p + np.sqrt(n * p * (1 - p)) * normal), 0, n)
    return number
