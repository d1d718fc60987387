"""Bin the counts of many cells with the code that tokenizes cells."""

import numpy as np
from scipy.sparse import csr_matrix

from scgpt_hf.tokens.binning_scgpt import Ties
from scgpt_hf.tokens.counts_scgpt import validate_counts
from scgpt_hf.tokens.randomness_scgpt import Int64Array
from scgpt_hf.tokens.tokenizing_scgpt import TokenSettings, tokenize_counts


def bin_cells(
    counts: csr_matrix, *, n_bins: int, ties: Ties, seed: int = 0, cell_ids: Int64Array | None = None
) -> csr_matrix:
    """Return the same matrix with a bin in place of each count. Shape (cells, genes).

    The vocabulary id of a gene is its column.

    Args:
        counts: stored entries are > 0, columns are sorted. Shape (cells, genes).
        n_bins: see `TokenSettings`.
        ties: see `TokenSettings`.
        seed: determines random ties.
        cell_ids: id of each cell, by default its row. Shape (cells,).
    """
    n_cells, n_genes = counts.shape
    settings = TokenSettings(
        n_genes + 1, n_genes, 0.0, max_tokens=n_genes + 1, n_bins=n_bins, ties=ties, include_zeros=False
    )
    ids = np.arange(n_cells) if cell_ids is None else cell_ids
    tokens = tokenize_counts(validate_counts(counts), np.arange(n_genes), settings, cell_ids=ids, seed=seed, epoch=0)
    bins = np.delete(tokens.values, tokens.indptr[:-1])  # without `<cls>`
    return csr_matrix((bins, counts.indices, counts.indptr), counts.shape)
