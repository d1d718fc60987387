"""The tests that every source of cells has to pass, run on the same cells by the test module of each source."""

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pandas as pd
import pytest
from anndata import AnnData

from scgpt_hf.cells.block import CellBlock
from scgpt_hf.cells.source import CellSource


def expected_counts(cells: list[AnnData], feature_ids: list[str]) -> np.ndarray:
    """Return the counts of all cells, genes in the given order, zero if a data set lacks the gene. (cells, genes)."""
    frames = [pd.DataFrame(part.X.toarray(), columns=part.var_names) for part in cells]
    return pd.concat(frames).reindex(columns=feature_ids).fillna(0).to_numpy()


class SourceContract:
    """Base of a test class for one kind of source.

    A subclass defines a fixture `open_it` that returns a function: it takes the filters of `open_source` as keyword
    arguments and opens a source with the cells of `small_cells`.
    """

    @pytest.fixture
    def source(self, open_it: Callable[..., CellSource]) -> CellSource:
        return open_it(obs_filter="disease == 'normal'")

    def check(self, block: CellBlock, source: CellSource, cells: list[AnnData], cell_ids: np.ndarray) -> None:
        expected = expected_counts(cells, source.genes["feature_id"].tolist())[cell_ids]
        assert block.counts.shape == expected.shape
        assert (block.counts.toarray() == expected).all()
        assert block.counts.nnz == np.count_nonzero(expected), "stored zeros"
        for start, stop in zip(block.counts.indptr[:-1], block.counts.indptr[1:], strict=True):
            assert (np.diff(block.counts.indices[start:stop]) > 0).all(), "genes do not ascend within a cell"
        assert block.cell_ids.tolist() == cell_ids.tolist() == block.obs.index.tolist()
        assert len(block) == len(cell_ids)

    def test_genes_are_the_union_in_order_of_first_appearance(self, source, small_cells):
        first, second = (part.var_names.tolist() for part in small_cells)
        assert source.genes["feature_id"].tolist() == first + [gene for gene in second if gene not in first]
        names = dict(zip(source.genes["feature_id"], source.genes["feature_name"], strict=True))
        assert all(names[gene] == name for part in small_cells for gene, name in part.var["feature_name"].items())

    def test_obs_returns_the_matching_cells_by_ascending_id(self, source, small_cells):
        obs = source.obs(["disease", "donor_id"])
        everything = pd.concat([part.obs for part in small_cells], ignore_index=True)
        matching = everything[(everything["disease"] == "normal") & everything["is_primary_data"]]
        assert obs.index.tolist() == matching.index.tolist()
        assert obs.index.dtype == np.int64
        assert obs.index.name == "cell_id"
        assert obs["donor_id"].astype(str).tolist() == matching["donor_id"].tolist()
        assert list(source.obs().columns) == []

    def test_columns_are_those_that_obs_returns(self, source, small_cells):
        assert set(small_cells[0].obs) <= set(source.obs_columns)
        assert list(source.obs(source.obs_columns)) == source.obs_columns
        assert pickle.loads(pickle.dumps(source)).obs_columns == source.obs_columns

    @pytest.mark.parametrize("seed", range(4))
    def test_read_returns_any_cells_in_the_requested_order_and_twice_the_same(self, source, small_cells, seed):
        rng = np.random.default_rng(seed)
        selected = source.obs().index.to_numpy()
        cell_ids = rng.permutation(selected)[: rng.integers(1, len(selected) + 1)]
        for _ in range(2):
            block = source.read(cell_ids, ["cell_type"])
            self.check(block, source, small_cells, cell_ids)
            everything = pd.concat([part.obs for part in small_cells], ignore_index=True)
            assert block.obs["cell_type"].astype(str).tolist() == everything.loc[cell_ids, "cell_type"].tolist()

    def test_read_of_no_cells_is_empty(self, source, small_cells):
        self.check(source.read(np.array([], dtype=np.int64)), source, small_cells, np.array([], dtype=np.int64))
        assert list(source.read(np.array([], dtype=np.int64), ["cell_type"]).obs) == ["cell_type"]

    def test_several_threads_may_read_at_the_same_time(self, source, small_cells):
        selected = source.obs().index.to_numpy()
        orders = [np.random.default_rng(seed).permutation(selected)[:50] for seed in range(12)]
        with ThreadPoolExecutor(6) as pool:
            for block, cell_ids in zip(pool.map(source.read, orders), orders, strict=True):
                self.check(block, source, small_cells, cell_ids)

    def test_unknown_and_filtered_cells_raise_with_their_ids(self, source):
        everything = set(range(300))
        filtered = min(everything - set(source.obs().index))
        for wrong in (filtered, 300, 10**9, -1):
            with pytest.raises(ValueError, match=rf"\[{wrong}\]"):
                source.read(np.array([source.obs().index[0], wrong]))

    def test_a_repeated_cell_raises_with_its_id(self, source):
        first = source.obs().index[0]
        with pytest.raises(ValueError, match=rf"repeated.*\[{first}\]"):
            source.read(np.array([first, first]))

    def measured_in(self, small_cells: list[AnnData], genes: pd.Series) -> np.ndarray:
        """Whether the data set of each cell measured a gene, (cells, genes)."""
        return np.concatenate([np.tile(genes.isin(part.var_names), (part.n_obs, 1)) for part in small_cells])

    def test_presence_is_that_of_the_genes_of_each_data_set(self, source, small_cells):
        cell_ids = source.obs().index.to_numpy()[1::7]
        expected = self.measured_in(small_cells, source.genes["feature_id"])[cell_ids]
        for copy in (source, pickle.loads(pickle.dumps(source))):
            presence = copy.presence(cell_ids)
            assert (presence.measured[presence.dataset_of_cell] == expected).all()

    def test_primary_only_leaves_out_the_other_cells(self, open_it):
        assert len(open_it().obs()) == 270
        assert len(open_it(primary_only=False).obs()) == 300

    def test_describe_returns_json_with_the_hash_of_the_genes(self, source, open_it):
        import json

        described = json.loads(json.dumps(source.describe()))
        assert described["n_cells"] == len(source.obs())
        assert described["gene_hash"] == open_it().describe()["gene_hash"]
        assert "disease == 'normal'" in described["obs_filter"]

    def test_a_pickled_source_reads_the_same_cells(self, source, small_cells):
        copy = pickle.loads(pickle.dumps(source))
        cell_ids = source.obs().index.to_numpy()[::-3]
        self.check(copy.read(cell_ids), source, small_cells, cell_ids)

    @pytest.mark.parametrize(
        ("obs_filter", "named"),
        [
            ("disease == 'gout'", "300 cells"),
            ("organ == 'blood'", "'organ'.*tissue_general"),
            ("disease = 'normal'", "disease = "),
            ("disease == 'normal') or (disease == 'gout'", "gout"),
            ("disease", "disease"),
            ("disease > 'gout'", "disease"),
            ("is_primary_data > 'x'", "is_primary_data"),
            ("disease == '\\udce9'", "UTF-8"),
            ("disease == 'normal')\n or (disease == 'gout'", "gout"),
        ],
    )
    def test_a_filter_that_cannot_be_applied_raises(self, open_it, obs_filter, named):
        with pytest.raises(ValueError, match=named):
            open_it(obs_filter=obs_filter).obs()

    @pytest.mark.parametrize(
        "obs_filter",
        [
            "donor_id in ['donor_4', 'donor_5'] and not cell_type == 'T cell' or assay != \"10x 3' v3\"",
            "not (donor_id not in ['donor_4', 'donor_5'] or cell_type in ['T cell'])  # a comment",
            """
            donor_id in ['donor_4', 'donor_5']  # of both data sets
            and not cell_type == 'T cell'
            """,
        ],
    )
    def test_a_filter_may_use_the_full_syntax(self, open_it, obs_filter):
        obs = open_it(obs_filter=obs_filter, primary_only=False).obs(["donor_id", "cell_type"])
        assert set(obs["donor_id"]) == {"donor_4", "donor_5"}
        assert set(obs["cell_type"]) == {"B cell", "monocyte", "NK cell"}

    def test_an_unknown_column_raises_with_the_known_ones(self, source):
        for read in (lambda: source.obs(["organ"]), lambda: source.read(np.array([1]), ["organ"])):
            with pytest.raises(ValueError, match=r"'organ'.*tissue_general"):
                read()

    def test_an_unknown_layer_raises_with_the_known_ones(self, open_it):
        with pytest.raises(ValueError, match="'nope'"):
            open_it(layer="nope")
