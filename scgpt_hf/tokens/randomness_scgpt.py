"""Random numbers that belong to a gene of a cell, not to the order in which anything was computed.

Every number is a pure function of (seed, epoch, purpose, cell id, gene), so it does not move when threads, ranks,
batches or neighbours do. What the numbers decide is said in `binning_scgpt`, `tokenizing_scgpt` and `masking_scgpt`.
"""

from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

# Purposes: the same cell draws independent numbers for each of them.
TIES, SAMPLING, MASKING, MASK_RATIO = 1, 2, 3, 4

GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLY_1, _MULTIPLY_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
_UNUSED_BITS, _STEP = np.uint64(11), 2.0**-53


class SparseCounts(Protocol):
    """A CSR matrix (cells, genes), as scipy makes it; scipy itself is not needed here."""

    @property
    def data(self) -> npt.NDArray[Any]:
        """Values of the stored entries."""

    @property
    def indices(self) -> npt.NDArray[Any]:
        """Their columns."""

    @property
    def indptr(self) -> npt.NDArray[Any]:
        """Where each row begins and ends, (cells + 1,)."""

    @property
    def shape(self) -> tuple[int, int]:
        """Number of cells and of genes."""


def scramble(words: UInt64Array) -> UInt64Array:
    """Return well-mixed words; different words stay different. Any shape but (), whose overflow numpy warns about.

    Source: the finaliser of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195.
    """
    words = (words ^ (words >> _SHIFT_1)) * _MULTIPLY_1
    words = (words ^ (words >> _SHIFT_2)) * _MULTIPLY_2
    return words ^ (words >> _SHIFT_3)


def cell_keys(cell_ids: Int64Array, *, seed: int, epoch: int, purpose: int) -> UInt64Array:
    """Return one key per cell, from which `gene_words` derives the numbers of its genes. Shape (cells,)."""
    return scramble((_key(seed, epoch, purpose) ^ cell_ids.astype(np.int64).view(np.uint64)) + GOLDEN)


@lru_cache(maxsize=64)
def _key(seed: int, epoch: int, purpose: int) -> np.uint64:
    key = np.zeros(1, np.uint64)
    for word in (seed, epoch, purpose):
        key = scramble((key ^ np.uint64(word & 0xFFFFFFFFFFFFFFFF)) + GOLDEN)
    return np.uint64(key[0])


def gene_words(keys: UInt64Array, genes: npt.NDArray[np.integer]) -> UInt64Array:
    """Return 64 random bits per gene; the genes of one cell never share a word, so ranks have no ties.

    Args:
        keys: the key of the cell of each gene, or one key for all. Shape (tokens,) or (1,).
        genes: vocabulary ids. Shape (tokens,).
    """
    return scramble(keys + GOLDEN * (genes.astype(np.uint64) + np.uint64(1)))


def uniform(words: UInt64Array) -> npt.NDArray[np.float64]:
    """Return each word as a number in [0, 1): its upper 53 bits."""
    return (words >> _UNUSED_BITS).astype(np.float64) * _STEP


def content_ids(counts: SparseCounts, gene_ids: Int64Array) -> Int64Array:
    """Return a number per cell that depends on its known genes and their counts, and on nothing else.

    It stands in for a cell id where there is none: the same cell draws the same numbers in any file, order or batch,
    whatever the order of the columns, and whether counts are stored as integers or floats.

    Args:
        counts: expression, no duplicate entries. Shape (cells, genes).
        gene_ids: vocabulary id of each column, −1 where unknown. Shape (genes,).
    """
    genes = gene_ids[counts.indices]
    bits = counts.data.astype(np.float32).view(np.uint32).astype(np.uint64)
    words = scramble(((bits << np.uint64(32)) | genes.astype(np.uint32)) + GOLDEN)
    words[(genes < 0) | (counts.data == 0)] = 0
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(words, dtype=np.uint64)])  # wraps around, as intended
    ids: Int64Array = (sums[counts.indptr[1:]] - sums[counts.indptr[:-1]]).view(np.int64)
    return ids
