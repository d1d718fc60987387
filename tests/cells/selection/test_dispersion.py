"""Highly variable genes by dispersion: the genes of scanpy, batches, candidates and errors."""

import numpy as np
import pandas as pd
import pytest
import scanpy
from anndata import AnnData

from scgpt_hf.cells.selection.dispersion import dispersed_genes, dispersion_scores
from tests.support.memory_source import make_cells


def scanpy_genes(source, n_genes, batch_key):
    """Return the columns that scanpy chooses in memory."""
    block = source.read(source.cell_ids, [batch_key] if batch_key else [])
    adata = AnnData(block.counts.copy(), obs=block.obs.set_index(block.obs.index.astype(str)))
    scanpy.pp.normalize_total(adata, target_sum=1e4)
    scanpy.pp.log1p(adata)
    if batch_key:
        adata.obs[batch_key] = pd.Categorical(adata.obs[batch_key])
    scanpy.pp.highly_variable_genes(adata, n_top_genes=n_genes, flavor="seurat", batch_key=batch_key)
    return np.flatnonzero(adata.var["highly_variable"].to_numpy())


@pytest.mark.parametrize("batch_key", [None, "donor_id"])
def test_genes_are_those_of_scanpy(batch_key):
    source = make_cells([150, 130], n_genes=400)
    chosen = dispersed_genes(source, source.cell_ids, 100, batch_key=batch_key, min_cells=1)
    expected = scanpy_genes(source, 100, batch_key)
    assert (np.diff(chosen) > 0).all()
    # scanpy's values are float32, ours are rounded to 1/16: a few genes with nearly equal scores change places.
    assert len(np.intersect1d(chosen, expected)) >= 97


def test_depth_does_not_make_a_gene_variable():
    source = make_cells([200], n_genes=300)
    chosen = dispersed_genes(source, source.cell_ids, 50, batch_key=None)
    depth = np.random.default_rng(0).integers(1, 9, len(source.cell_ids))
    source.counts = source.counts.multiply(depth[:, None]).tocsr()
    assert np.array_equal(dispersed_genes(source, source.cell_ids, 50, batch_key=None), chosen)


def test_the_order_of_the_cells_has_no_influence_and_neither_have_cells_that_are_not_given():
    source = make_cells([150, 130], n_genes=400)
    part = source.cell_ids[:200]
    chosen = dispersed_genes(source, part, 80)
    assert np.array_equal(dispersed_genes(source, part[::-1], 80), chosen)
    other = make_cells([150, 130], n_genes=400)
    dense = other.counts.toarray()
    dense[200:] = dense[200:] * 7 + 1
    other.counts = type(other.counts)(dense)
    assert np.array_equal(dispersed_genes(other, part, 80), chosen)


def test_genes_are_chosen_among_the_candidates():
    source = make_cells([150], n_genes=300)
    candidates = np.arange(0, 300, 3)
    assert np.isin(dispersed_genes(source, source.cell_ids, 40, candidates=candidates), candidates).all()


def test_scores_of_genes_that_do_not_vary_are_nan_and_the_only_gene_of_a_bin_has_score_one():
    means = np.array([1.0, 1.0, 1.0, 0.0, 1e4])
    scores = dispersion_scores(means, np.array([2.0, 3.0, 4.0, 0.0, 5e4]))
    assert np.isnan(scores[3])
    assert scores[4] == 1
    logs = np.log([2, 3, 4])
    assert scores[:3] == pytest.approx((logs - logs.mean()) / logs.std(ddof=1))


def test_more_genes_than_vary_raise():
    source = make_cells([60], n_genes=50)
    with pytest.raises(ValueError, match="found 50 genes to choose from"):
        dispersed_genes(source, source.cell_ids, 51)
    source.counts = type(source.counts)(np.ones((60, 50), np.float32))
    with pytest.raises(ValueError, match="found 0 genes that vary"):
        dispersed_genes(source, source.cell_ids, 5)
