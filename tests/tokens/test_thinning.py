"""Thinning counts: its distribution, and that it depends on seed, epoch, cell and gene only."""

import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.stats import binom, chisquare

from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.tokens.thinning_scgpt import LARGEST_EXACT, thin_counts

SEED = {"seed": 3, "epoch": 1}


def thin(counts, keep, cell_ids=None, **changes):
    """Return thinned counts of a dense matrix whose columns are genes 0, 1, …."""
    matrix = csr_matrix(np.asarray(counts, np.float32))
    cell_ids = np.arange(matrix.shape[0]) if cell_ids is None else cell_ids
    thinned = thin_counts(matrix, np.arange(matrix.shape[1]), keep, cell_ids=cell_ids, **(SEED | changes))
    return csr_matrix((thinned.data, thinned.indices, thinned.indptr), thinned.shape).toarray()


@pytest.mark.parametrize("keep", [0.05, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("count", [1, 7, LARGEST_EXACT])
def test_small_counts_are_binomial(count, keep):
    found = thin(np.full((20, 1000), count), [keep]).ravel().astype(int)
    expected = binom.pmf(np.arange(count + 1), count, keep) * len(found)
    common = expected > 5
    observed = np.bincount(found, minlength=count + 1)[common]
    assert chisquare(observed, expected[common] * observed.sum() / expected[common].sum()).pvalue > 1e-4
    assert found.max() <= count


@pytest.mark.parametrize("keep", [0.1, 0.75])
def test_large_counts_have_the_mean_and_variance_of_a_binomial(keep):
    found = thin(np.full((200, 100), 5000), [keep]).ravel()
    assert found.mean() == pytest.approx(5000 * keep, rel=2e-3)
    assert found.var() == pytest.approx(5000 * keep * (1 - keep), rel=0.05)
    assert (found == np.rint(found)).all()


def test_a_count_depends_on_its_seed_epoch_cell_and_gene_only():
    counts = np.random.default_rng(0).poisson(3, (6, 40))
    whole = thin(counts, [0.25, 0.5])
    np.testing.assert_array_equal(thin(counts[2:4], [0.25, 0.5], cell_ids=np.array([2, 3])), whole[2:4])
    order = np.random.default_rng(1).permutation(40)
    shuffled = csr_matrix(counts[:, order].astype(np.float32))
    again = thin_counts(shuffled, order, [0.25, 0.5], cell_ids=np.arange(6), **SEED)
    again = csr_matrix((again.data, again.indices, again.indptr), again.shape).toarray()
    np.testing.assert_array_equal(again, whole[:, order])
    for change in ({"seed": 4}, {"epoch": 2}, {"cell_ids": np.arange(6) + 10}):
        assert (thin(counts, [0.25, 0.5], **change) != whole).any()


def test_a_cell_keeps_its_counts_if_nothing_would_be_left():
    thinned = thin(np.eye(200), [0.01])
    np.testing.assert_array_equal(thinned, np.eye(200))
    assert thin(np.ones((50, 50)), [0.02]).sum(1).min() >= 1


def test_all_counts_may_be_kept():
    counts = np.random.default_rng(0).poisson(30, (4, 20)) * np.array([1, 100] * 10)
    np.testing.assert_array_equal(thin(counts, [1.0]), counts)


@pytest.mark.parametrize("keep", [[], [0.0], [1.5], [np.nan]])
def test_shares_out_of_range_raise(keep):
    with pytest.raises(ValueError, match=r"each in \(0, 1\]"):
        thin(np.ones((1, 2)), keep)


def test_a_view_has_the_cells_of_the_first_view_and_other_genes():
    rng = np.random.default_rng(0)
    processor = ScGPTProcessor.from_genes([f"g{gene}" for gene in range(50)], max_tokens=21)
    counts = rng.poisson(2, (30, 50))
    counts[[4, 9]] = 0  # cells without a gene
    cells = {"cell_ids": np.arange(30), **SEED}
    first = processor.tokenize(csr_matrix(counts), np.arange(50), **cells)
    view = processor.tokenize_view(csr_matrix(counts), np.arange(50), keep=[0.5], **cells)
    np.testing.assert_array_equal(view.cell_ids, first.cell_ids)
    assert len(view) == 28
    genes = [{*tokens[cell : cell + 1].input_ids.tolist()} for cell in range(28) for tokens in (first, view)]
    assert all(one != other for one, other in zip(genes[::2], genes[1::2], strict=True))
