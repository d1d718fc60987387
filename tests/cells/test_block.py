"""`CellBlock`, and the validation of raw counts and of cell ids."""

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import CellBlock, gene_hash, name_layers, require_cell_ids, require_counts


def block_of(counts, dtype=np.float32):
    """Return a block with these counts, ids 0, 10, 20, … and one obs column."""
    matrix = csr_matrix(counts)
    arrays = matrix.data.astype(dtype), matrix.indices.astype(np.uint16), matrix.indptr
    cell_ids = np.arange(len(counts), dtype=np.int64) * 10
    return CellBlock(arrays, pd.DataFrame({"label": cell_ids + 1}, index=cell_ids), cell_ids, n_genes=matrix.shape[1])


@given(
    counts=arrays(np.uint16, (5, 4), elements=st.integers(0, 9)),
    positions=st.one_of(st.lists(st.integers(0, 4)), st.sampled_from([[], [1, 2, 3], [0, 1, 2, 3, 4]])),
)
def test_take_returns_the_rows_at_any_positions_with_their_labels_and_their_dtype(counts, positions):
    block = block_of(counts, np.uint16)
    taken = block.take(np.array(positions, np.int64))
    assert (taken.counts.toarray() == counts[positions]).all()
    assert (taken.data.dtype, taken.indices.dtype, taken.shape) == (np.uint16, np.uint16, (len(positions), 4))
    assert taken.cell_ids.tolist() == taken.obs.index.tolist() == [10 * position for position in positions]
    assert taken.obs["label"].tolist() == [10 * position + 1 for position in positions]
    assert len(taken) == len(positions)


def test_counts_are_a_float32_matrix_that_is_built_once():
    block = block_of(np.eye(3, dtype=np.int64), np.uint16)
    assert block.counts is block.counts
    assert (block.counts.dtype, block.counts.indices.dtype) == (np.float32, np.int32)
    assert (block.counts.toarray() == np.eye(3)).all()


def test_a_block_of_a_scipy_matrix_shares_its_arrays():
    matrix = csr_matrix(np.eye(3, dtype=np.float32))
    block = CellBlock.from_scipy(matrix, pd.DataFrame(index=range(3)), np.arange(3))
    assert np.shares_memory(block.data, matrix.data)
    assert np.shares_memory(block.counts.data, matrix.data)
    assert np.shares_memory(block.take(np.array([1, 2])).data, matrix.data)


def test_with_obs_keeps_the_cells_and_drops_the_other_columns():
    block = block_of(np.eye(3))
    without = block.with_obs([])
    assert list(without.obs) == []
    assert list(block.obs) == ["label"]
    assert without.cell_ids is block.cell_ids
    assert (without.counts != block.counts).nnz == 0


@given(counts=arrays(np.float32, (3, 4), elements=st.integers(0, 2**20)))
def test_require_counts_accepts_whole_numbers_sparse_or_dense(counts):
    require_counts(counts, "X")
    require_counts(csr_matrix(counts), "X")
    require_counts(counts.astype(np.uint32), "X")


@given(
    counts=arrays(np.float64, (3, 4), elements=st.integers(0, 100)),
    wrong=st.sampled_from([np.nan, np.inf, -np.inf, -1.0, 0.5, 3.0001]),
    place=st.integers(0, 11),
)
def test_require_counts_raises_on_one_wrong_value_anywhere(counts, wrong, place):
    counts.flat[place] = wrong
    for matrix in (counts, csr_matrix(counts)):
        with pytest.raises(ValueError, match="layer 'X'"):
            require_counts(matrix, "layer 'X'")


def test_the_error_of_require_counts_has_the_value_the_layer_and_the_flag_to_choose_another():
    with pytest.raises(
        ValueError, match=r"found 1\.5 and 1 more fractional values of 3 in layer 'log'; .*: --layer NAME"
    ):
        require_counts(np.array([[1.5, 2.0, 2.5]]), "layer 'log'")


def test_name_layers_lists_the_other_layers_and_those_that_look_raw():
    error = ValueError("found 0.5")
    assert str(name_layers(error, {})) == "found 0.5; there is no other layer"
    assert str(name_layers(error, {"log": False})).endswith("the other layers are ['log'], of which look raw: none")
    assert str(name_layers(error, {"a b": True, "log": False, "umi": True})).endswith(
        "['a b', 'log', 'umi'], of which look raw: --layer='a b' or --layer='umi'"
    )


def test_require_counts_accepts_a_matrix_without_cells():
    require_counts(csr_matrix((0, 5)), "X")


@given(known=arrays(np.bool_, st.integers(0, 20)), cell_ids=st.lists(st.integers(-3, 25), max_size=10))
def test_require_cell_ids_accepts_each_known_id_once_and_nothing_else(known, cell_ids):
    existing = set(np.flatnonzero(known))
    if set(cell_ids) <= existing and len(set(cell_ids)) == len(cell_ids):
        assert require_cell_ids(np.array(cell_ids, dtype=np.int64), known).tolist() == cell_ids
    else:
        with pytest.raises(ValueError, match="cell ids"):
            require_cell_ids(np.array(cell_ids, dtype=np.int64), known)


@pytest.mark.parametrize("cell_ids", [np.array([0.5]), np.array([[1]]), np.array([True])])
def test_require_cell_ids_raises_on_other_dtypes_and_shapes(cell_ids):
    with pytest.raises(ValueError, match="expected cell ids as integers"):
        require_cell_ids(cell_ids, np.ones(3, dtype=bool))


def test_the_errors_of_require_cell_ids_count_and_list_the_ids():
    known = np.array([True, False, True])
    with pytest.raises(
        ValueError, match=r"^2 of 3 cell ids are not among the 2 cells of this source, e.g. \[1, 7\]; use"
    ):
        require_cell_ids(np.array([0, 1, 7]), known)
    with pytest.raises(ValueError, match=r"^1 cell ids are repeated, e.g. \[2\]; pass each id once$"):
        require_cell_ids(np.array([2, 0, 2]), known)


def test_gene_hash_depends_on_the_order_of_the_genes():
    assert gene_hash(["a", "b"]) != gene_hash(["b", "a"])
    assert gene_hash(["a", "b"]) == gene_hash(iter(["a", "b"]))
