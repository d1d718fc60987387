"""Targets beside the tokens: the complete known counts of each cell, and masked genes that are no tokens."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.tokens.packing_scgpt import IGNORE, Tokens
from scgpt_hf.tokens.targets_scgpt import gather_count_targets, leave_out_masked


@given(seed=st.integers(0, 2**32 - 1), n_cells=st.integers(0, 6), n_genes=st.integers(1, 8))
def test_count_targets_are_the_counts_of_the_known_genes(seed, n_cells, n_genes):
    rng = np.random.default_rng(seed)
    dense = rng.poisson(0.7, size=(n_cells, n_genes)).astype(np.float32)
    gene_ids = rng.permutation(n_genes + 3)[:n_genes].astype(np.int64)
    gene_ids[rng.random(n_genes) < 0.3] = -1
    targets = gather_count_targets(csr_matrix(dense), gene_ids)
    expected = np.zeros((n_cells, n_genes + 3), np.float32)
    expected[:, gene_ids[gene_ids >= 0]] = dense[:, gene_ids >= 0]
    for cell in range(n_cells):
        one = targets[cell : cell + 1]
        found = np.zeros(n_genes + 3, np.float32)
        found[one.ids] = one.counts
        np.testing.assert_array_equal(found, expected[cell])


def test_kept_cells_and_slices_are_numbered_from_zero_in_a_batch():
    counts = csr_matrix(np.array([[1, 0, 2], [0, 0, 0], [0, 3, 0], [4, 0, 0]], np.uint16))
    targets = gather_count_targets(counts, np.array([5, 6, 7])).keep(np.array([True, False, True, True]))
    batch = targets[1:3].as_batch()
    assert batch["count_cells"].tolist() == [0, 1]
    assert batch["count_ids"].tolist() == [6, 5]
    assert torch.equal(batch["count_values"], torch.tensor([3.0, 4.0]))


def test_masked_genes_that_are_left_out_keep_their_cells_and_values():
    ids, labels = np.array([9, 1, 2, 3, 9, 9, 4, 5]), np.array([IGNORE, 7, IGNORE, 8, IGNORE, IGNORE, 6, IGNORE])
    values = np.array([0, -1, 3, -1, 0, 0, -1, 2], np.float32)
    tokens = Tokens(ids, values, labels.astype(np.float32), np.array([0, 4, 5, 8]), np.array([10, 20, 30]))
    visible, masked = leave_out_masked(tokens)
    assert visible.input_ids.tolist() == [9, 2, 9, 9, 5]
    assert visible.values.tolist() == [0, 3, 0, 0, 2]
    assert visible.indptr.tolist() == [0, 2, 3, 5]
    assert (visible.labels, visible.cell_ids.tolist()) == (None, [10, 20, 30])
    batch = masked.as_batch(n_entries=5)
    assert batch["label_ids"].tolist() == [1, 3, 4, 0, 0]
    assert batch["labels"].tolist() == [7, 8, 6, IGNORE, IGNORE]
    assert batch["label_cells"].tolist() == [0, 0, 2, 0, 0]
