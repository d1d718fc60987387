"""Streamed sums of counts equal slow ones over all cells in memory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.cells.selection.counts import add_sums, counts_per_gene, genes_per_cell, stream_blocks, sums_per_batch
from tests.support.memory_source import MemorySource, make_cells


def test_blocks_hold_all_cells_in_ascending_order_and_no_chunk_is_read_twice(small_reads):
    source = make_cells([300])
    blocks = list(stream_blocks(source, np.random.default_rng(0).permutation(source.cell_ids), "reading"))
    np.testing.assert_array_equal(np.concatenate([block.cell_ids for block in blocks]), source.cell_ids)
    assert max(source.reads) <= 64
    chunks = [set(block.cell_ids // 32) for block in blocks]
    assert len(chunks) > 3
    assert len(set.union(*chunks)) == sum(len(own) for own in chunks)


def test_counts_per_gene_are_summed_over_the_given_cells_only(small_reads):
    source = make_cells([150, 90])
    some = np.random.default_rng(1).choice(source.cell_ids, 130, replace=False)
    expected = source.counts.toarray()[np.isin(source.cell_ids, some)].sum(axis=0)
    np.testing.assert_array_equal(counts_per_gene(source, some), expected)


def test_counts_per_gene_are_exact_beyond_the_precision_of_float32():
    source = MemorySource(np.full((9, 1), 16_777_215), ["a"] * 9)
    assert counts_per_gene(source, source.cell_ids).tolist() == [9 * 16_777_215]


@pytest.mark.parametrize("genes", [None, np.array([4, 0, 7])])
def test_genes_per_cell_counts_expressed_genes(small_reads, genes):
    source = make_cells([50, 83])
    expressed = source.counts.toarray() > 0
    expected = (expressed if genes is None else expressed[:, genes]).sum(axis=1)
    np.testing.assert_array_equal(genes_per_cell(source, source.cell_ids, genes), expected)


def test_no_cells_have_no_sums():
    source, none = make_cells([5]), np.empty(0, np.int64)
    assert genes_per_cell(source, none).tolist() == []
    assert counts_per_gene(source, none).tolist() == [0] * 300
    assert source.reads == []


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**32), n_cells=st.integers(2, 30), n_batches=st.integers(1, 4), clipped=st.booleans())
def test_sums_of_batches_do_not_depend_on_the_blocks(seed, n_cells, n_batches, clipped):
    rng = np.random.default_rng(seed)
    batch = rng.integers(0, n_batches, n_cells)
    counts = rng.poisson(rng.lognormal(0, 2, 6), (n_cells, 6)) * rng.integers(0, 2, (n_cells, 6))
    clip = rng.uniform(0, 9, (n_batches, 6)) if clipped else None
    sums = np.zeros((2, n_batches, 6))
    for part in np.array_split(rng.permutation(n_cells), 3):
        add_sums(csr_matrix(counts[part]), batch[part], sums, clip)
    values = counts if clip is None else np.minimum(counts, clip[batch])
    for number in range(n_batches):
        np.testing.assert_allclose(sums[0, number], values[batch == number].sum(axis=0))
        np.testing.assert_allclose(sums[1, number], (values[batch == number] ** 2).sum(axis=0))


def test_sums_per_batch_are_streamed(small_reads):
    source, genes = make_cells([150, 90]), np.array([3, 5, 200])
    batch = np.repeat([1, 0], [150, 90])
    counts = source.counts.toarray()[:, genes].astype(float)
    sums = sums_per_batch(source, source.cell_ids, genes, batch)
    for number in (0, 1):
        np.testing.assert_array_equal(sums[0, number], counts[batch == number].sum(axis=0))
        np.testing.assert_array_equal(sums[1, number], (counts[batch == number] ** 2).sum(axis=0))
    assert max(source.reads) <= 64
