"""Random numbers that depend on the seed, the epoch, the cell and the gene, and on nothing else.

A generator with state, such as `numpy.random.default_rng`, returns its numbers in the order of the requests. The result
would then change with the number of threads, ranks or batches. A *counter-based* generator has no state. It hashes a
key and a counter. Here the key stands for (seed, epoch, purpose, cell), and the counter is the vocabulary id of a gene:

    >>> keys = cell_keys(np.array([7]), seed=0, epoch=3, purpose=MASKING)
    >>> random_words(keys, np.array([2, 5])).shape  # 64 random bits for genes 2 and 5 of cell 7
    (2,)

`binning_scgpt` resolves ties with these numbers, `tokenizing_scgpt` samples genes, `masking_scgpt` masks them, and
`thinning_scgpt` thins counts.
"""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

UInt64Array = npt.NDArray[np.uint64]
Int64Array = npt.NDArray[np.int64]

# Each purpose has its own keys, so that, for example, the masked genes do not depend on which genes were sampled.
# The golden files depend on these numbers: do not renumber them.
TIES, SAMPLING, MASKING, MASK_RATIO = 1, 2, 3, 4
VIEW_SEED, VIEW_KEEP, THINNING, THINNING_NORMAL = 5, 6, 7, 8
INPUT_SEED = 9
PAIRING, PAIRED_CELLS, PAIRED_GENES, HIDDEN_NAMES, MADE_UP = 21, 22, 23, 24, 25  # of perturbation models

# Constants of SplitMix64; see `mix_bits`. They are numpy scalars because numpy would turn a Python integer of more than
# 63 bits into a float.
GOLDEN_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_MULTIPLIER_1, _MULTIPLIER_2 = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_SHIFT_1, _SHIFT_2, _SHIFT_3 = np.uint64(30), np.uint64(27), np.uint64(31)
UNUSED_BITS, SPACING = np.uint64(11), 2.0**-53  # a float64 holds 53 bits of a 64-bit word


def mix_bits(words: UInt64Array) -> UInt64Array:
    """Mix the bits of each word so that similar inputs give unrelated outputs.

    The function is a bijection: different words stay different.

    Args:
        words: uint64, any shape except (), because numpy warns when a scalar overflows.

    Source: the finaliser of SplitMix64, Steele et al. 2014, doi:10.1145/2660193.2660195.
    """
    words = (words ^ (words >> _SHIFT_1)) * _MULTIPLIER_1
    words = (words ^ (words >> _SHIFT_2)) * _MULTIPLIER_2
    return words ^ (words >> _SHIFT_3)


def cell_keys(cell_ids: Int64Array, *, seed: int, epoch: int, purpose: int) -> UInt64Array:
    """Compute the key of each cell, from which `random_words` derives the numbers of its genes.

    Args:
        cell_ids: any integers that identify the cells, shape (cells,).
        seed: seed of the run.
        epoch: number of the epoch; keys change with it.
        purpose: one of the purposes above.

    Returns:
        uint64 keys, shape (cells,).
    """
    return mix_bits((_run_key(seed, epoch, purpose) ^ cell_ids.astype(np.int64).view(np.uint64)) + GOLDEN_GAMMA)


def view_seed(seed: int) -> int:
    """Return the seed of ties and sampling in the second view of each cell, so that they differ from the first."""
    return int(_run_key(seed, 0, VIEW_SEED))


def input_seed(seed: int) -> int:
    """Return the seed that thins inputs, so that they do not lose the same molecules as the second view."""
    return int(_run_key(seed, 0, INPUT_SEED))


@lru_cache(maxsize=64)
def _run_key(seed: int, epoch: int, purpose: int) -> np.uint64:
    key = np.zeros(1, np.uint64)
    for word in (seed, epoch, purpose):
        key = mix_bits((key ^ np.uint64(word & 0xFFFFFFFFFFFFFFFF)) + GOLDEN_GAMMA)
    return np.uint64(key[0])


def random_words(keys: UInt64Array, genes: npt.NDArray[np.integer]) -> UInt64Array:
    """Compute a word of 64 random bits for each gene.

    The genes of one cell never share a word, because every step is a bijection of the gene's id. The rank of a gene
    among the genes of its cell is therefore unique.

    Args:
        keys: key of each gene's cell, shape (tokens,), or one key for all genes, shape (1,).
        genes: vocabulary ids. Shape (tokens,).

    Returns:
        uint64 words, shape (tokens,).
    """
    return mix_bits(keys + GOLDEN_GAMMA * (genes.astype(np.uint64) + np.uint64(1)))


def to_uniform(words: UInt64Array) -> npt.NDArray[np.float64]:
    """Convert random words to floats in [0, 1), using their upper 53 bits."""
    return (words >> UNUSED_BITS).astype(np.float64) * SPACING
