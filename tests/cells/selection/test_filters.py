"""Choosing cells and genes: whole donors, thresholds, variable genes; streamed results against slow ones in memory."""

import logging
from collections.abc import Sequence
from typing import Any

import anndata as ad
import numpy as np
import pandas as pd
import pytest
import scanpy as sc
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_matrix

from scgpt_hf.cells.block import CellBlock
from scgpt_hf.cells.selection import filters as select
from scgpt_hf.cells.selection.filters import (
    filter_cells,
    filter_genes,
    gene_totals,
    highly_variable_genes,
    null_free,
    sample_donors,
)
from scgpt_hf.cells.selection.hvg import add_sums, expected_std, moments, rank_genes, standardized_variances
from scgpt_hf.cells.source import open_source

law = settings(deadline=None, max_examples=30)


class MemorySource:
    """Cells in memory with ids 5, 8, 11, ...; remembers how many were read at once."""

    def __init__(self, counts: np.ndarray, donors: Sequence[Any], kind: str = "memory", **columns: Any) -> None:
        self.counts = csr_matrix(counts.astype(np.float32))
        self.cell_ids = np.arange(len(counts)) * 3 + 5
        self.table = pd.DataFrame({"donor_id": donors, **columns}, pd.Index(self.cell_ids, name="cell_id"))
        self.kind, self.reads = kind, []

    @property
    def genes(self) -> pd.DataFrame:
        names = [f"ENSG{gene:011d}" for gene in range(self.counts.shape[1])]
        return pd.DataFrame({"feature_id": names, "feature_name": names})

    def obs(self, columns: Sequence[str] = ()) -> pd.DataFrame:
        if missing := set(columns) - set(self.table):
            raise ValueError(f"obs has no column {missing}")
        return self.table[list(columns)]

    def read(self, cell_ids: np.ndarray, columns: Sequence[str] = ()) -> CellBlock:
        self.reads.append(len(cell_ids))
        counts = self.counts[np.searchsorted(self.cell_ids, cell_ids)]
        return CellBlock.from_scipy(counts, self.obs(columns).loc[cell_ids], cell_ids)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.kind, "layer": "raw"}


def make_cells(n_cells: Sequence[int], n_genes: int = 300, seed: int = 0) -> MemorySource:
    """Donors of so many cells; genes of widely different mean and spread, shifted a little between donors."""
    rng = np.random.default_rng(seed)
    means = rng.lognormal(0.5, 1.3, n_genes)
    spread = rng.uniform(0.3, 6, n_genes)
    donors = np.repeat([f"d{donor}" for donor in range(len(n_cells))], n_cells)
    shift = np.repeat(rng.lognormal(0, 0.3, (len(n_cells), n_genes)), n_cells, axis=0)
    counts = rng.poisson(rng.gamma(spread, means / spread * shift))
    return MemorySource(counts, donors)


@pytest.fixture
def small_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_CELLS_PER_READ", 64)
    monkeypatch.setattr(select, "CHUNK_SIZE", 32)


# Cells


@law
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20), max_cells=st.integers(1, 300), seed=st.integers(0))
def test_sampled_donors_are_whole_and_no_other_would_fit(sizes, max_cells, seed):
    index = pd.Index(np.arange(sum(sizes)) * 2, name="cell_id")
    donors = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    obs = pd.DataFrame({"donor_id": donors}, index)
    if max_cells < min(sizes):
        with pytest.raises(ValueError, match="no donor has at most"):
            sample_donors(obs, max_cells, seed=seed)
        return
    cell_ids = sample_donors(obs, max_cells, seed=seed)
    assert cell_ids.dtype == np.int64
    assert (np.diff(cell_ids) > 0).all()
    taken = set(obs.loc[cell_ids, "donor_id"])
    assert len(cell_ids) == sum(sizes[donor] for donor in taken) <= max_cells
    assert all(len(cell_ids) + sizes[donor] > max_cells for donor in set(donors) - taken)
    np.testing.assert_array_equal(cell_ids, sample_donors(obs.copy(), max_cells, seed=seed))


def test_seeds_sample_other_donors_in_any_kind_of_column():
    obs = pd.DataFrame({"donor_id": pd.Categorical(np.repeat(list("abcdefgh"), 5))})
    assert len({tuple(sample_donors(obs, 20, seed=seed)) for seed in range(8)}) > 4
    as_text = obs.astype(str).rename(columns={"donor_id": "sample"})
    np.testing.assert_array_equal(
        sample_donors(obs, 20, seed=3), sample_donors(as_text, 20, seed=3, donor_key="sample")
    )


def test_sample_donors_names_the_smallest_donor():
    obs = pd.DataFrame({"donor_id": ["big"] * 9 + ["small"] * 7})
    with pytest.raises(ValueError, match=r"at most 5 cells: the smallest, 'small', has 7; raise .*--max_cells"):
        sample_donors(obs, 5, seed=0)
    with pytest.raises(ValueError, match="no column 'patient'"):
        sample_donors(obs, 5, seed=0, donor_key="patient")
    with pytest.raises(ValueError, match="found no cells"):
        sample_donors(obs[:0], 5, seed=0)


def test_cells_without_a_donor_are_dropped_and_counted(caplog):
    obs = pd.DataFrame({"donor_id": pd.Categorical(["a", None, "", "b"])}, index=[3, 4, 6, 9])
    with caplog.at_level(logging.INFO):
        assert null_free(obs).tolist() == [3, 9]
    assert "dropped 2 of 4 cells: no donor_id" in caplog.text
    with pytest.raises(ValueError, match="all 2 cells would be dropped: no donor_id"):
        null_free(obs[1:3])
    with pytest.raises(ValueError, match="no column 'patient'"):
        null_free(obs, "patient")


def test_cells_with_few_genes_are_dropped_whether_counted_or_known(small_reads, caplog):
    source = make_cells([50, 83])
    n_genes = (source.counts.toarray() > 0).sum(axis=1)
    least = int(np.median(n_genes))
    wanted = source.cell_ids[n_genes >= least]
    shuffled = np.random.default_rng(0).permutation(source.cell_ids)
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(filter_cells(source, shuffled, least), wanted)
    assert f"dropped {133 - len(wanted)} of 133 cells: fewer than {least} expressed genes" in caplog.text
    assert sum(source.reads) == 133
    assert max(source.reads) <= 64

    known = MemorySource(source.counts.toarray(), source.table["donor_id"].to_numpy(), "census", nnz=n_genes)
    np.testing.assert_array_equal(filter_cells(known, shuffled, least), wanted)
    assert known.reads == []
    old = MemorySource(source.counts.toarray(), source.table["donor_id"].to_numpy(), "census")
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(filter_cells(old, shuffled, least), wanted)
    assert "a Census before 2023-12-15" in caplog.text


def test_a_threshold_of_zero_reads_nothing_and_one_that_leaves_nothing_raises():
    source = make_cells([20])
    np.testing.assert_array_equal(filter_cells(source, source.cell_ids[::-1], 0), source.cell_ids)
    assert filter_genes(source, source.cell_ids, 0).tolist() == list(range(300))
    assert source.reads == []
    with pytest.raises(ValueError, match=r"all 20 cells .* fewer than 301 expressed genes \(--min_genes\); lower"):
        filter_cells(source, source.cell_ids, 301)
    with pytest.raises(ValueError, match=r"all 300 genes .* 1,000,000 counts in 20 cells \(--min_gene_counts\)"):
        filter_genes(source, source.cell_ids, 1_000_000)


# Genes


def test_totals_are_those_of_the_cells_asked_for_and_exact(small_reads, caplog):
    source = make_cells([150, 90])
    some = np.random.default_rng(1).choice(source.cell_ids, 130, replace=False)
    totals = source.counts.toarray()[np.isin(source.cell_ids, some)].sum(axis=0)
    np.testing.assert_array_equal(gene_totals(source, some), totals)
    with caplog.at_level(logging.INFO):
        kept = filter_genes(source, some, 200)
    np.testing.assert_array_equal(kept, np.flatnonzero(totals >= 200))
    assert kept.dtype == np.int64
    assert f"dropped {300 - len(kept)} of 300 genes: fewer than 200 counts in 130 cells" in caplog.text
    deep = MemorySource(np.full((9, 1), 16_777_215), ["a"] * 9)
    assert gene_totals(deep, deep.cell_ids).tolist() == [9 * 16_777_215]


def test_no_band_is_read_twice(small_reads):
    source = make_cells([300])
    chunks = []
    read = source.read
    source.read = lambda ids, columns=(): chunks.append(set(ids // 32)) or read(ids, columns)
    gene_totals(source, source.cell_ids)
    assert len(chunks) > 3
    assert len(set.union(*chunks)) == sum(len(touched) for touched in chunks)


@pytest.mark.parametrize("n_cells", [[400], [150, 260, 120]])
def test_variable_genes_are_those_of_scanpy(small_reads, n_cells):
    source = make_cells(n_cells, n_genes=600)
    adata = ad.AnnData(source.counts, obs=source.table.set_axis(source.table.index.astype(str)))
    expected = sc.pp.highly_variable_genes(
        adata, flavor="seurat_v3", batch_key="donor_id", n_top_genes=80, inplace=False
    )
    found = highly_variable_genes(source, source.cell_ids[::-1], 80)
    assert found.dtype == np.int64
    np.testing.assert_array_equal(found, np.flatnonzero(expected["highly_variable"]))
    assert max(source.reads) <= 64


def test_variances_are_those_of_scanpy_on_real_cells_and_ties_alone_part_the_genes(shared):
    adata = ad.read_h5ad(shared / "data" / "blood" / "pbmc3k_10x.h5ad")
    adata = adata[:, np.asarray(adata.X.sum(axis=0)).ravel() >= 10].copy()
    source = MemorySource(adata.X.toarray(), ["donor"] * len(adata))
    expected = sc.pp.highly_variable_genes(adata, flavor="seurat_v3", n_top_genes=1200, inplace=False)
    found = highly_variable_genes(source, source.cell_ids, 1200)
    assert np.isin(found, np.flatnonzero(expected["highly_variable"])).sum() >= 1195
    threshold = np.sort(expected["variances_norm"])[-1200]
    np.testing.assert_allclose(expected["variances_norm"].iloc[found].min(), threshold, rtol=1e-6)


@pytest.mark.slow  # the library compiles for 15 seconds
def test_variable_genes_are_those_of_the_census_library(small_census):
    import tiledbsoma as soma
    from cellxgene_census.experimental.pp import highly_variable_genes as of_census

    with open_source(small_census) as source:
        found = highly_variable_genes(source, source.obs().index.to_numpy(), 40, min_cells=1)
    with soma.Experiment.open(source.describe()["uri"]) as experiment:
        primary = soma.AxisQuery(value_filter="is_primary_data == True")
        with experiment.axis_query("RNA", obs_query=primary) as query:
            expected = of_census(query, n_top_genes=40, batch_key="donor_id", max_loess_jitter=0)
    np.testing.assert_array_equal(found, np.flatnonzero(expected["highly_variable"]))


def test_genes_per_cell_known_to_a_census_are_those_of_its_counts(small_census):
    with open_source(small_census) as source:
        cell_ids = source.obs().index.to_numpy()
        n_genes = np.diff(source.read(cell_ids).counts.indptr)
        least = int(np.median(n_genes))
        np.testing.assert_array_equal(filter_cells(source, cell_ids, least), cell_ids[n_genes >= least])


def test_variable_genes_come_from_the_candidates_and_from_the_cells_asked_for(small_reads):
    source = make_cells([150, 200])
    candidates = np.arange(0, 300, 2)
    found = highly_variable_genes(source, source.cell_ids, 40, candidates=candidates[::-1])
    assert len(found) == 40
    assert (np.diff(found) > 0).all()
    assert np.isin(found, candidates).all()
    alone = MemorySource(source.counts.toarray()[:, ::2], source.table["donor_id"].to_numpy())
    np.testing.assert_array_equal(found, candidates[highly_variable_genes(alone, alone.cell_ids, 40)])
    disturbed = source.counts.toarray()
    disturbed[150:, 7] += np.random.default_rng(0).integers(0, 500, 200)
    disturbed = MemorySource(disturbed, source.table["donor_id"].to_numpy())
    first = source.cell_ids[:150]
    np.testing.assert_array_equal(highly_variable_genes(source, first, 40), highly_variable_genes(disturbed, first, 40))


def test_donors_with_few_cells_are_ranked_together(caplog):
    source = make_cells([120, 7, 150, 3, 1])
    with caplog.at_level(logging.INFO):
        found = highly_variable_genes(source, source.cell_ids, 30, min_cells=100)
    assert "ranked genes of 4 of 5 donors together, 131 cells: some have fewer than 100" in caplog.text
    pooled = source.table["donor_id"].map(lambda donor: "d2" if donor == "d2" else "rest")
    twin = MemorySource(source.counts.toarray(), pooled.to_numpy())
    np.testing.assert_array_equal(found, highly_variable_genes(twin, twin.cell_ids, 30))


@law
@given(sizes=st.lists(st.integers(1, 30), min_size=1, max_size=12), min_cells=st.integers(1, 40))
def test_pooling_leaves_no_small_batch_and_keeps_large_donors_apart(sizes, min_cells):
    obs = pd.DataFrame({"donor_id": np.repeat([f"d{donor:02d}" for donor in range(len(sizes))], sizes)})
    batch = select._pool_donors(obs, "donor_id", min_cells)
    n_cells = np.bincount(batch)
    assert n_cells.min() >= min(min_cells, len(obs))
    batches_of_donor = pd.Series(batch).groupby(obs["donor_id"]).nunique()
    assert (batches_of_donor == 1).all()
    if min(sizes) >= min_cells:
        assert len(n_cells) == len(sizes)


def test_genes_may_be_ranked_over_all_cells():
    source = make_cells([100, 100])
    twin = MemorySource(source.counts.toarray(), ["one"] * 200)
    found = highly_variable_genes(source, source.cell_ids, 30, batch_key=None)
    np.testing.assert_array_equal(found, highly_variable_genes(twin, twin.cell_ids, 30))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"n_genes": 301}, r"asked for 301 highly variable genes of 300; choose --n_hvg in \[1, 300\]"),
        ({"n_genes": 11, "candidates": np.arange(10)}, "asked for 11 highly variable genes of 10"),
        ({"n_genes": 0}, "asked for 0"),
        ({"n_genes": 3, "batch_key": "patient"}, "no column"),
    ],
)
def test_highly_variable_genes_refuses(arguments, message):
    source = make_cells([60, 60])
    with pytest.raises(ValueError, match=message):
        highly_variable_genes(source, source.cell_ids, **arguments)


def test_cells_without_a_donor_or_without_variation_are_refused():
    source = make_cells([60])
    source.table.loc[8, "donor_id"] = None
    with pytest.raises(ValueError, match="1 of 60 cells have no donor_id"):
        highly_variable_genes(source, source.cell_ids, 5)
    flat = MemorySource(np.ones((50, 20), int), ["a"] * 50)
    with pytest.raises(ValueError, match="asked for 5 highly variable genes, but only 0 vary"):
        highly_variable_genes(flat, flat.cell_ids, 5)


# The arithmetic


@law
@given(seed=st.integers(0, 2**32), n_cells=st.integers(2, 30), n_batches=st.integers(1, 4), clipped=st.booleans())
def test_streamed_moments_and_clipped_variances_equal_the_slow_ones(seed, n_cells, n_batches, clipped):
    rng = np.random.default_rng(seed)
    batch = np.concatenate([np.arange(n_batches).repeat(2), rng.integers(0, n_batches, n_cells)])
    counts = rng.poisson(rng.lognormal(0, 2, 6), (len(batch), 6)) * rng.integers(0, 2, (len(batch), 6))
    size = np.bincount(batch)
    sums = np.zeros((2, n_batches, 6))
    for part in np.array_split(rng.permutation(len(batch)), 3):
        add_sums(csr_matrix(counts[part]), batch[part], sums)
    means, variances = moments(sums, size)
    std = rng.uniform(0.5, 2, (n_batches, 6))
    clip = means + rng.uniform(0, 2, (n_batches, 6)) if clipped else np.full((n_batches, 6), np.inf)
    sums = np.zeros((2, n_batches, 6))
    add_sums(csr_matrix(counts), batch, sums, clip)
    standardized = standardized_variances(sums, size, means, std)
    for number in range(n_batches):
        mine = counts[batch == number]
        np.testing.assert_allclose(means[number], mine.mean(axis=0))
        np.testing.assert_allclose(variances[number], mine.var(axis=0, ddof=1), atol=1e-9)
        slow = (np.minimum(mine, clip[number]) - means[number]) ** 2 / std[number] ** 2
        np.testing.assert_allclose(standardized[number], slow.sum(axis=0) / (size[number] - 1), atol=1e-9)


def test_ranking_takes_the_median_over_the_batches_that_rank_a_gene():
    variances = np.array([[9.0, 8, 7, 1, 0], [1.0, 8, 9, 7, 0]])
    assert rank_genes(variances, 2).tolist() == [0, 2]  # ranks 0, 1, none and none, 1, 0: medians 0, 1, 0
    assert rank_genes(variances, 4).tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match=r"asked for 5 highly variable genes, but only 4 vary .*--n_hvg"):
        rank_genes(variances, 5)
    assert rank_genes(np.ones((3, 9)), 4).tolist() == [0, 1, 2, 3]


def test_a_fit_on_equal_means_gets_the_same_noise_each_time(caplog):
    counts = (np.random.default_rng(0).random((60, 4000)) < 1 / 60) * 1.0
    means, variances = counts.mean(axis=0), counts.var(axis=0, ddof=1)
    with caplog.at_level(logging.DEBUG, "scgpt_hf.cells.selection.hvg"):
        std = expected_std(means, variances)
    assert "fit failed with jitter 0" in caplog.text
    assert np.isfinite(std).all()
    np.testing.assert_array_equal(std, expected_std(means, variances))
    assert (expected_std(np.ones(2), np.zeros(2)) == 1).all()


def test_a_fit_that_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match=r"found 2 genes that vary .* at least 30 .*lower --min_gene_counts.*--hvg"):
        expected_std(np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match=r"cannot fit .* to 40 varying genes .*higher --min_gene_counts.*--hvg"):
        expected_std(np.full(40, np.nan), np.ones(40))
