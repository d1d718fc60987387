"""Rank the genes within each cell: a representation that depth and normalization do not change."""

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from scipy.stats import rankdata

RANK_GENES = 5_000  # variable genes whose ranks are kept; classifiers choose among them


def rank_genes(counts: csr_matrix, columns: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
    """Return the rank of each gene among all genes of its cell, as a share of their number.

    Equal counts get the mean of their ranks. Genes that the cell does not express share the lowest rank.

    Args:
        counts: raw counts. Shape (cells, genes).
        columns: genes whose ranks are returned. Shape (chosen,).

    Returns:
        float32 in (0, 1], shape (cells, chosen).

    Example:
        >>> rank_genes(csr_matrix([[0.0, 3.0, 0.0, 9.0]]), np.arange(4))
        array([[0.375, 0.75 , 0.375, 1.   ]], dtype=float32)

    Source: the representation of arXiv:2602.16696.
    """
    counts = csr_matrix(counts, copy=True)
    counts.eliminate_zeros()
    n_cells, n_genes = counts.shape
    place = np.full(n_genes, -1)
    place[columns] = np.arange(len(columns))
    ranks = np.empty((n_cells, len(columns)), np.float32)
    for cell, (start, stop) in enumerate(zip(counts.indptr[:-1], counts.indptr[1:], strict=True)):
        n_zeros = n_genes - (stop - start)
        ranks[cell] = (n_zeros + 1) / 2
        positions = place[counts.indices[start:stop]]
        expressed = n_zeros + rankdata(counts.data[start:stop])
        ranks[cell, positions[positions >= 0]] = expressed[positions >= 0]
    ranks /= max(n_genes, 1)
    return ranks
