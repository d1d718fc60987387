"""Ranks of genes within cells."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_matrix
from scipy.stats import rankdata

from scgpt_hf.scoring.ranks import rank_genes


@given(arrays(np.int64, st.tuples(st.integers(1, 5), st.integers(1, 12)), elements=st.integers(0, 4)), st.data())
def test_ranks_are_those_of_the_dense_cell(counts: np.ndarray, data: st.DataObject) -> None:
    columns = np.array(sorted(data.draw(st.sets(st.integers(0, counts.shape[1] - 1), min_size=1))))
    expected = np.stack([rankdata(cell) for cell in counts]) / counts.shape[1]
    np.testing.assert_allclose(rank_genes(csr_matrix(counts), columns), expected[:, columns], rtol=1e-6)


def test_ranks_do_not_change_with_depth(other_cells) -> None:
    columns = np.arange(50)
    deeper = other_cells.counts * 3
    np.testing.assert_array_equal(rank_genes(deeper, columns), rank_genes(other_cells.counts, columns))
