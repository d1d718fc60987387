"""Choosing cells and genes before training: donors, thresholds, and what is logged about the others."""

import doctest
import logging

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scgpt_hf.cells.selection import filters
from scgpt_hf.cells.selection.filters import (
    cells_expressing,
    cells_with_value,
    filter_cells,
    filter_genes,
    sample_donors,
)
from scgpt_hf.cells.source import open_source
from tests.support.memory_source import MemorySource, make_cells


def test_the_examples_in_the_docstrings_are_right():
    assert doctest.testmod(filters).failed == 0


@settings(deadline=None, max_examples=30)
@given(sizes=st.lists(st.integers(1, 40), min_size=1, max_size=20), max_cells=st.integers(1, 300), seed=st.integers(0))
def test_sampled_donors_are_complete_and_no_other_donor_would_fit(sizes, max_cells, seed):
    index = pd.Index(np.arange(sum(sizes)) * 2, name="cell_id")
    donors = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    obs = pd.DataFrame({"donor_id": donors}, index)
    if max_cells < min(sizes):
        with pytest.raises(ValueError, match="max_cells"):
            sample_donors(obs, max_cells, seed=seed)
        return
    cell_ids = sample_donors(obs, max_cells, seed=seed)
    assert cell_ids.dtype == np.int64
    assert (np.diff(cell_ids) > 0).all()
    taken = set(obs.loc[cell_ids, "donor_id"])
    assert len(cell_ids) == sum(sizes[donor] for donor in taken) <= max_cells
    assert all(len(cell_ids) + sizes[donor] > max_cells for donor in set(donors) - taken)
    np.testing.assert_array_equal(cell_ids, sample_donors(obs.copy(), max_cells, seed=seed))


def test_seeds_sample_different_donors_and_the_type_of_the_column_does_not_matter():
    obs = pd.DataFrame({"donor_id": pd.Categorical(np.repeat(list("abcdefgh"), 5))})
    assert len({tuple(sample_donors(obs, 20, seed=seed)) for seed in range(8)}) > 4
    as_text = obs.astype(str).rename(columns={"donor_id": "sample"})
    np.testing.assert_array_equal(
        sample_donors(obs, 20, seed=3), sample_donors(as_text, 20, seed=3, donor_key="sample")
    )


def test_sample_donors_rejects_what_it_cannot_sample_from():
    obs = pd.DataFrame({"donor_id": ["big"] * 9 + ["small"] * 7})
    with pytest.raises(ValueError, match=r"at most 5 cells: the smallest, 'small', has 7; raise .*--max_cells"):
        sample_donors(obs, 5, seed=0)
    with pytest.raises(ValueError, match="'patient'"):
        sample_donors(obs, 5, seed=0, donor_key="patient")
    with pytest.raises(ValueError, match="no cells"):
        sample_donors(obs[:0], 5, seed=0)


def test_cells_without_a_value_are_dropped_and_counted(caplog):
    obs = pd.DataFrame({"donor_id": pd.Categorical(["a", None, "", "b"])}, index=[3, 4, 6, 9])
    with caplog.at_level(logging.INFO):
        assert cells_with_value(obs).tolist() == [3, 9]
    assert "dropped 2 of 4 cells: no donor_id" in caplog.text
    with pytest.raises(ValueError, match="all 2 cells would be dropped: no donor_id"):
        cells_with_value(obs[1:3])
    with pytest.raises(ValueError, match="no column 'patient'"):
        cells_with_value(obs, "patient")


def test_cells_with_few_genes_are_dropped_and_counted(small_reads, caplog):
    source = make_cells([50, 83])
    n_genes = (source.counts.toarray() > 0).sum(axis=1)
    threshold = int(np.median(n_genes))
    expected = source.cell_ids[n_genes >= threshold]
    shuffled = np.random.default_rng(0).permutation(source.cell_ids)
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(filter_cells(source, shuffled, threshold), expected)
    assert f"dropped {133 - len(expected)} of 133 cells: fewer than {threshold} expressed genes" in caplog.text
    assert sum(source.reads) == 133


def test_a_census_is_not_read_when_it_records_the_genes_per_cell(caplog):
    cells = make_cells([50, 83])
    counts, donors = cells.counts.toarray(), cells.table["donor_id"].to_numpy()
    n_genes = (counts > 0).sum(axis=1)
    threshold = int(np.median(n_genes))
    expected = cells.cell_ids[n_genes >= threshold]
    census = MemorySource(counts, donors, "census", nnz=n_genes)
    np.testing.assert_array_equal(filter_cells(census, cells.cell_ids[::-1], threshold), expected)
    assert census.reads == []
    old_census = MemorySource(counts, donors, "census")
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(filter_cells(old_census, cells.cell_ids[::-1], threshold), expected)
    assert "a Census before 2023-12-15" in caplog.text
    assert sum(old_census.reads) == 133


def test_the_genes_per_cell_recorded_in_a_census_are_those_of_its_counts(small_census):
    with open_source(small_census) as source:
        cell_ids = source.obs().index.to_numpy()
        n_genes = np.diff(source.read(cell_ids).counts.indptr)
        threshold = int(np.median(n_genes))
        np.testing.assert_array_equal(filter_cells(source, cell_ids, threshold), cell_ids[n_genes >= threshold])


def test_rare_genes_are_dropped_and_counted(small_reads, caplog):
    source = make_cells([150, 90])
    some = np.random.default_rng(1).choice(source.cell_ids, 130, replace=False)
    totals = source.counts.toarray()[np.isin(source.cell_ids, some)].sum(axis=0)
    with caplog.at_level(logging.INFO):
        kept = filter_genes(source, some, 200)
    np.testing.assert_array_equal(kept, np.flatnonzero(totals >= 200))
    assert kept.dtype == np.int64
    assert f"dropped {300 - len(kept)} of 300 genes: fewer than 200 counts in 130 cells" in caplog.text


def test_cells_that_express_none_of_the_genes_are_dropped_and_the_order_is_kept(small_reads, caplog):
    source = make_cells([150])
    genes = np.array([2, 9])
    expresses = (source.counts.toarray()[:, genes] > 0).any(axis=1)
    assert 0 < expresses.sum() < 150
    with caplog.at_level(logging.INFO):
        kept = cells_expressing(source, source.cell_ids[::-1], genes)
    np.testing.assert_array_equal(kept, source.cell_ids[expresses][::-1])
    assert f"dropped {150 - expresses.sum()} of 150 cells: none of the 2 chosen genes expressed" in caplog.text


def test_a_threshold_of_zero_reads_nothing():
    source = make_cells([20])
    np.testing.assert_array_equal(filter_cells(source, source.cell_ids[::-1], 0), source.cell_ids)
    assert filter_genes(source, source.cell_ids, 0).tolist() == list(range(300))
    assert source.reads == []


def test_a_threshold_that_leaves_nothing_raises():
    source = make_cells([20])
    with pytest.raises(ValueError, match=r"all 20 cells .* fewer than 301 expressed genes \(--min_genes\); lower"):
        filter_cells(source, source.cell_ids, 301)
    with pytest.raises(ValueError, match=r"all 300 genes .* 1,000,000 counts in 20 cells \(--min_gene_counts\)"):
        filter_genes(source, source.cell_ids, 1_000_000)
