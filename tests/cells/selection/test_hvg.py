"""Highly variable genes: the same as scanpy's and the Census library's, and each step against a slow version."""

import logging

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.cells.selection import hvg
from scgpt_hf.cells.selection.counts import add_sums
from scgpt_hf.cells.selection.hvg import (
    expected_std,
    highly_variable_genes,
    moments,
    rank_genes,
    standardized_variances,
)
from scgpt_hf.cells.source import open_source
from tests.support.memory_source import MemorySource, make_cells

law = settings(deadline=None, max_examples=30)


@pytest.mark.parametrize("n_cells", [[400], [150, 260, 120]])
def test_genes_are_those_of_scanpy(small_reads, n_cells):
    source = make_cells(n_cells, n_genes=600)
    adata = ad.AnnData(source.counts, obs=source.table.set_axis(source.table.index.astype(str)))
    expected = sc.pp.highly_variable_genes(
        adata, flavor="seurat_v3", batch_key="donor_id", n_top_genes=80, inplace=False
    )
    found = highly_variable_genes(source, source.cell_ids[::-1], 80)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, np.flatnonzero(expected["highly_variable"]))
    assert max(source.reads) <= 64


def test_genes_of_real_cells_differ_from_scanpy_only_where_variances_are_equal(shared):
    adata = ad.read_h5ad(shared / "data" / "blood" / "pbmc3k_10x.h5ad")
    adata = adata[:, np.asarray(adata.X.sum(axis=0)).ravel() >= 10].copy()
    source = MemorySource(adata.X.toarray(), ["donor"] * len(adata))
    expected = sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=1200, inplace=False)
    found = highly_variable_genes(source, source.cell_ids, 1200)
    assert np.isin(found, np.flatnonzero(expected["highly_variable"])).sum() >= 1195
    threshold = np.sort(expected["variances_norm"])[-1200]
    np.testing.assert_allclose(expected["variances_norm"].iloc[found].min(), threshold, rtol=1e-6)


@pytest.mark.slow  # cellxgene_census compiles for 15 seconds
def test_genes_are_those_of_the_census_library(small_census):
    import tiledbsoma as soma
    from cellxgene_census.experimental.pp import highly_variable_genes as census_highly_variable_genes

    with open_source(small_census) as source:
        found = highly_variable_genes(source, source.obs().index.to_numpy(), 40, min_cells=1)
    with soma.Experiment.open(source.describe()["uri"]) as experiment:
        primary = soma.AxisQuery(value_filter="is_primary_data == True")
        with experiment.axis_query("RNA", obs_query=primary) as query:
            expected = census_highly_variable_genes(query, n_top_genes=40, batch_key="donor_id", max_loess_jitter=0)
    np.testing.assert_array_equal(found, np.flatnonzero(expected["highly_variable"]))


def test_genes_are_chosen_among_the_candidates(small_reads):
    source = make_cells([150, 200])
    candidates = np.arange(0, 300, 2)
    found = highly_variable_genes(source, source.cell_ids, 40, candidates=candidates[::-1])
    assert len(found) == 40
    assert (np.diff(found) > 0).all()
    assert np.isin(found, candidates).all()
    only_candidates = MemorySource(source.counts.toarray()[:, ::2], source.table["donor_id"].to_numpy())
    expected = candidates[highly_variable_genes(only_candidates, only_candidates.cell_ids, 40)]
    np.testing.assert_array_equal(found, expected)


def test_cells_that_are_not_given_have_no_influence():
    source = make_cells([150, 200])
    changed_counts = source.counts.toarray()
    changed_counts[150:, 7] += np.random.default_rng(0).integers(0, 500, 200)
    changed = MemorySource(changed_counts, source.table["donor_id"].to_numpy())
    first = source.cell_ids[:150]
    np.testing.assert_array_equal(highly_variable_genes(source, first, 40), highly_variable_genes(changed, first, 40))


def test_donors_with_few_cells_are_ranked_together(caplog):
    source = make_cells([120, 7, 150, 3, 1])
    with caplog.at_level(logging.INFO):
        found = highly_variable_genes(source, source.cell_ids, 30, min_cells=100)
    assert "pooled 4 of 5 donors, 131 cells, to rank genes: some donors have fewer than 100 cells" in caplog.text
    pooled = source.table["donor_id"].map(lambda donor: "d2" if donor == "d2" else "rest")
    same_cells = MemorySource(source.counts.toarray(), pooled.to_numpy())
    np.testing.assert_array_equal(found, highly_variable_genes(same_cells, same_cells.cell_ids, 30))


@law
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), min_cells=st.integers(1, 40))
def test_pooling_leaves_no_small_batch_and_keeps_large_donors_apart(sizes, min_cells):
    obs = pd.DataFrame({"donor_id": np.repeat([f"d{donor:02d}" for donor in range(len(sizes))], sizes)})
    batch = hvg._pool_small_donors(obs, "donor_id", min_cells)
    n_cells = np.bincount(batch)
    assert n_cells.min() >= min(min_cells, len(obs))
    batches_of_donor = pd.Series(batch).groupby(obs["donor_id"]).nunique()
    assert (batches_of_donor == 1).all()
    if min(sizes) >= min_cells:
        assert len(n_cells) == len(sizes)


def test_genes_can_be_ranked_over_all_cells():
    source = make_cells([100, 100])
    one_donor = MemorySource(source.counts.toarray(), ["one"] * 200)
    found = highly_variable_genes(source, source.cell_ids, 30, batch_key=None)
    np.testing.assert_array_equal(found, highly_variable_genes(one_donor, one_donor.cell_ids, 30))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_genes": 301}, r"found 300 genes .* 301 highly variable genes .* choose --n_hvg in \[1, 300\]"),
        ({"n_genes": 11, "candidates": np.arange(10)}, "found 10 genes"),
        ({"n_genes": 0}, "0 highly variable genes"),
        ({"n_genes": 3, "batch_key": "patient"}, "no column"),
    ],
)
def test_highly_variable_genes_rejects_invalid_arguments(arguments, message):
    source = make_cells([60, 60])
    with pytest.raises(ValueError, match=message):
        highly_variable_genes(source, source.cell_ids, **arguments)


def test_a_cell_without_a_donor_raises():
    source = make_cells([60])
    source.table.loc[8, "donor_id"] = None
    with pytest.raises(ValueError, match="1 of 60 cells have no donor_id"):
        highly_variable_genes(source, source.cell_ids, 5)


def test_genes_that_do_not_vary_are_not_chosen():
    constant = MemorySource(np.ones((50, 20), int), ["a"] * 50)
    with pytest.raises(ValueError, match="found 0 genes that vary"):
        highly_variable_genes(constant, constant.cell_ids, 5)


@law
@given(seed=st.integers(0, 2**32), n_cells=st.integers(2, 30), n_batches=st.integers(1, 4), clipped=st.booleans())
def test_moments_and_standardized_variances_equal_slow_ones(seed, n_cells, n_batches, clipped):
    rng = np.random.default_rng(seed)
    batch = np.concatenate([np.arange(n_batches).repeat(2), rng.integers(0, n_batches, n_cells)])
    counts = rng.poisson(rng.lognormal(0, 2, 6), (len(batch), 6)) * rng.integers(0, 2, (len(batch), 6))
    size = np.bincount(batch)
    sums = np.zeros((2, n_batches, 6))
    add_sums(csr_matrix(counts), batch, sums)
    means, variances = moments(sums, size)
    std = rng.uniform(0.5, 2, (n_batches, 6))
    clip = means + rng.uniform(0, 2, (n_batches, 6)) if clipped else np.full((n_batches, 6), np.inf)
    clipped_sums = np.zeros((2, n_batches, 6))
    add_sums(csr_matrix(counts), batch, clipped_sums, clip)
    standardized = standardized_variances(clipped_sums, size, means, std)
    for number in range(n_batches):
        own = counts[batch == number]
        np.testing.assert_allclose(means[number], own.mean(axis=0))
        np.testing.assert_allclose(variances[number], own.var(axis=0, ddof=1), atol=1e-9)
        slow = (np.minimum(own, clip[number]) - means[number]) ** 2 / std[number] ** 2
        np.testing.assert_allclose(standardized[number], slow.sum(axis=0) / (size[number] - 1), atol=1e-9)


def test_ranking_takes_the_median_over_the_batches_that_rank_a_gene():
    variances = np.array([[9.0, 8, 7, 1, 0], [1.0, 8, 9, 7, 0]])
    assert rank_genes(variances, 2).tolist() == [0, 2]  # ranks 0, 1, none and none, 1, 0: medians 0, 1, 0
    assert rank_genes(variances, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"found 4 genes that vary .* 5 highly variable genes .*--n_hvg"):
        rank_genes(variances, 5)
    assert rank_genes(np.ones((3, 9)), 4).tolist() == [0, 1, 2, 3]


def test_a_fit_on_equal_means_gets_the_same_noise_each_time(caplog):
    counts = (np.random.default_rng(0).random((60, 4000)) < 1 / 60) * 1.0
    means, variances = counts.mean(axis=0), counts.var(axis=0, ddof=1)
    with caplog.at_level(logging.DEBUG, "scgpt_hf.cells.selection.hvg"):
        std = expected_std(means, variances)
    assert "the fit failed with jitter 0" in caplog.text
    assert np.isfinite(std).all()
    np.testing.assert_array_equal(std, expected_std(means, variances))


def test_the_spread_of_constant_genes_is_one():
    assert (expected_std(np.ones(2), np.zeros(2)) == 1).all()


def test_a_fit_that_is_impossible_raises():
    with pytest.raises(ValueError, match=r"found 2 genes that vary .* at least 30 .*lower --min_gene_counts.*--hvg"):
        expected_std(np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match=r"cannot fit .* to 40 varying genes .*higher --min_gene_counts.*--hvg"):
        expected_std(np.full(40, np.nan), np.ones(40))
