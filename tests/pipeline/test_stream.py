"""Test the pipeline: which cells a batch holds, for any number of ranks, from any step on, and how batches are made."""

import threading
from dataclasses import replace
from itertools import pairwise

import anndata
import numpy as np
import pandas as pd
import pytest
import torch
from scipy.sparse import csr_matrix

from scgpt_hf.cells.schedule.epoch import plan_epoch, plan_validation
from scgpt_hf.cells.source import open_source
from scgpt_hf.pipeline.stream import CellStream, StreamConfig, lengths_of, stream_cells
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

N_CELLS, N_GENES, BATCH = 100, 40, 12
GENES = [f"ENSG{index:011d}" for index in range(N_GENES)]


def source_of(counts):
    """Open cells with these counts; donors d0, d1, d2 take turns."""
    obs = pd.DataFrame(
        {"donor_id": [f"d{index % 3}" for index in range(len(counts))]}, index=[f"cell{n}" for n in range(len(counts))]
    )
    return open_source(anndata.AnnData(csr_matrix(counts), obs=obs, var=pd.DataFrame(index=GENES)))


def make_counts():
    """Counts in which gene 0 identifies the cell."""
    counts = np.random.default_rng(0).poisson(0.5, (N_CELLS, N_GENES)).astype(np.float32)
    counts[:, 0] = 1 + np.arange(N_CELLS)
    return counts


@pytest.fixture(scope="module")
def source():
    return source_of(make_counts())


@pytest.fixture(scope="module")
def source_with_empty_cells():
    """Eight cells, of which the first four express nothing."""
    counts = np.zeros((8, N_GENES), np.float32)
    counts[4:, :5] = 2
    return source_of(counts)


@pytest.fixture(scope="module")
def processor():
    return ScGPTProcessor.from_genes(GENES)


def plans_of(n_epochs: int, seed: int = 0):
    cells = np.arange(N_CELLS)
    return [
        plan_epoch(cells, seed=seed, epoch=epoch, batch_size=BATCH, chunk_size=16, chunks_per_window=2)
        for epoch in range(n_epochs)
    ]


def cells_of(batch) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Return each cell of a batch as its tokens and labels, which identify it."""
    ids, labels = batch["input_ids"].ravel().tolist(), batch["labels"].ravel().tolist()
    return [(tuple(ids[a:b]), tuple(labels[a:b])) for a, b in pairwise(batch["cu_seq_lens_q"].tolist())]


def assert_same_batches(found, expected) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for key, value in one.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other[key])), key


def test_a_stream_yields_each_planned_step_once_in_every_iteration(source, processor):
    stream = stream_cells(source, plans_of(2), processor, StreamConfig(seed=0, mask_ratios=(0.5,)))
    first, second = list(stream), list(stream)
    assert len(first) == 2 * (N_CELLS // BATCH)
    assert all(len(lengths_of(batch)) == BATCH for batch in first)
    assert_same_batches(first, second)


def test_the_dataset_yields_the_batches_of_the_cell_stream(source, processor):
    config = StreamConfig(seed=0, mask_ratios=(0.5,), micro_batches=2, with_cell_ids=True)
    expected = list(stream_cells(source, plans_of(2), processor, config, start_step=3))
    assert_same_batches(CellStream(source, plans_of(2), processor, config, start_step=3).batches(), expected)


def test_masks_depend_on_the_epoch_and_on_the_seed(source, processor):
    def labels(seed: int):
        plan = plan_validation(np.arange(N_CELLS), BATCH)
        plans = [replace(plan, epoch=epoch) for epoch in range(2)]
        stream = stream_cells(source, plans, processor, StreamConfig(seed, (0.5,)))
        return torch.cat([batch["labels"].ravel() for batch in stream]).chunk(2)

    assert not torch.equal(*labels(0))
    assert torch.equal(labels(0)[0], labels(0)[0])
    assert not torch.equal(labels(0)[0], labels(1)[0])


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batches", [1, 3])
def test_every_global_step_holds_the_same_cells_for_any_number_of_ranks(source, processor, world_size, micro_batches):
    def steps(world: int, micro: int):
        ranks = [
            list(stream_cells(source, plans_of(2), processor, StreamConfig(3, (0.5,), rank, world, micro)))
            for rank in range(world)
        ]
        return [
            sorted(
                cell
                for batches in ranks
                for batch in batches[step * micro : (step + 1) * micro]
                for cell in cells_of(batch)
            )
            for step in range(len(ranks[0]) // micro)
        ]

    assert steps(world_size, micro_batches) == steps(1, 1)


@pytest.mark.parametrize("start", [0, 1, 5, 8, 11, 15])
def test_a_stream_can_start_at_any_step(source, processor, start):
    config = StreamConfig(seed=1, mask_ratios=(0.25, 0.75))
    complete = list(stream_cells(source, plans_of(2), processor, config))
    assert_same_batches(stream_cells(source, plans_of(2), processor, config, start_step=start), complete[start:])


def test_the_state_dict_of_datasets_resumes_a_stream(source, processor):
    stream = stream_cells(source, plans_of(1), processor, StreamConfig(seed=1, mask_ratios=(0.5,)))
    batches = iter(stream)
    for _ in range(5):
        next(batches)
    state = stream.state_dict()
    rest = list(batches)
    resumed = stream_cells(source, plans_of(1), processor, StreamConfig(seed=1, mask_ratios=(0.5,)))
    resumed.load_state_dict(state)
    assert_same_batches(resumed, rest)


def test_a_start_after_the_last_step_raises(source, processor):
    with pytest.raises(ValueError, match="after step 8; the plans have 8 steps"):
        stream_cells(source, plans_of(1), processor, StreamConfig(seed=0), start_step=8)


def test_validation_visits_every_cell_once_over_all_ranks(source, processor):
    plan = plan_validation(np.arange(N_CELLS), 7)
    streams = [stream_cells(source, [plan], processor, StreamConfig(0, (0.5,), rank, 20)) for rank in range(20)]
    cells = [cell for stream in streams for batch in stream for cell in cells_of(batch)]
    assert len(cells) == N_CELLS == len(set(cells))


def test_labels_are_the_values_that_were_masked(source, processor):
    masked = list(stream_cells(source, plans_of(1), processor, StreamConfig(0, (0.5,))))
    unmasked = list(stream_cells(source, plans_of(1), processor, StreamConfig(0)))
    for batch, complete in zip(masked, unmasked, strict=True):
        positions = batch["labels"] != IGNORE
        assert torch.equal(batch["labels"][positions], complete["values"][positions])
        assert (batch["values"][positions] == processor.mask_value).all()
        assert torch.equal(batch["values"][~positions], complete["values"][~positions])


def test_categories_become_class_ids(source, processor):
    plan = plan_validation(np.arange(N_CELLS), 6)
    categories = {"domain_ids": ("donor_id", {"d0": 0, "d1": 1, "d2": 2})}
    batch = next(iter(stream_cells(source, [plan], processor, StreamConfig(0, categories=categories))))
    assert batch["domain_ids"].tolist() == [0, 1, 2, 0, 1, 2]


def test_values_that_the_model_was_not_trained_on_raise(source, processor):
    categories = {"domain_ids": ("donor_id", {"d0": 0})}
    with pytest.raises(ValueError, match=r"donor_id.*experimental batches.*not trained on: \['d1', 'd2'\].*\['d0'\]"):
        list(stream_cells(source, plans_of(1), processor, StreamConfig(0, categories=categories)))


def test_batches_list_their_cells_if_wanted(source, processor):
    plan = plan_epoch(np.arange(N_CELLS), seed=4, epoch=0, batch_size=BATCH, chunk_size=16, chunks_per_window=2)
    batches = list(CellStream(source, [plan], processor, StreamConfig(0, with_cell_ids=True)).batches())
    steps = [step for window in range(plan.n_windows) for step in plan.steps(window)]
    assert [batch["cell_ids"].tolist() for batch in batches] == [step.tolist() for step in steps]


def test_the_config_overrides_ties_and_the_number_of_tokens(source):
    plan, processor = plan_validation(np.arange(N_CELLS), 10), ScGPTProcessor.from_genes(GENES, max_tokens=5)
    config = StreamConfig(0, ties="lower", max_tokens=N_GENES + 1)
    expected = ScGPTProcessor.from_genes(GENES, max_tokens=N_GENES + 1, ties="lower")
    assert_same_batches(
        CellStream(source, [plan], processor, config).batches(),
        CellStream(source, [plan], expected, StreamConfig(0)).batches(),
    )
    assert (processor.ties, processor.max_tokens) == ("random", 5)


@pytest.mark.parametrize("key_by", ["cell_id", "content"])
def test_only_tokens_keyed_by_content_stay_the_same_when_cells_get_other_ids(source, key_by):
    """Without its first ten cells, a file has the same cells under other row numbers."""
    processor = ScGPTProcessor.from_genes(GENES, max_tokens=8)  # most cells express more genes than that
    config, cut = StreamConfig(0, key_by=key_by), source_of(make_counts()[10:])
    before = CellStream(source, [plan_validation(np.arange(10, N_CELLS), 9)], processor, config).batches()
    after = CellStream(cut, [plan_validation(np.arange(N_CELLS - 10), 9)], processor, config).batches()
    same = [
        torch.equal(one["input_ids"], other["input_ids"]) and torch.equal(one["values"], other["values"])
        for one, other in zip(before, after, strict=True)
    ]
    assert all(same) == (key_by == "content")


def test_cells_without_a_known_gene_are_dropped_unless_a_batch_has_no_other(source_with_empty_cells, processor):
    def batches(batch_size: int):
        plan = plan_validation(np.arange(8), batch_size)
        return list(stream_cells(source_with_empty_cells, [plan], processor, StreamConfig(0)))

    assert [len(lengths_of(batch)) for batch in batches(8)] == [4]
    with pytest.raises(ValueError, match=r"no cell of a batch .*first cell ids: \[0, 1, 2, 3"):
        batches(4)


@pytest.mark.parametrize("padded", [False, True])
def test_cells_without_a_known_gene_and_their_batches_can_be_skipped(source_with_empty_cells, processor, padded):
    config = StreamConfig(0, empty_cells="skip", with_cell_ids=True, padded=padded)
    stream = CellStream(source_with_empty_cells, [plan_validation(np.arange(8), 3)], processor, config)
    batches = list(stream.batches())
    assert [batch["cell_ids"].tolist() for batch in batches] == [[4, 5], [6, 7]]
    assert [len(lengths_of(batch)) for batch in batches] == [2, 2]


def test_cells_without_a_known_gene_can_raise_an_error_that_lists_them(source_with_empty_cells, processor):
    config = StreamConfig(0, empty_cells="raise")
    stream = CellStream(source_with_empty_cells, [plan_validation(np.arange(8), 8)], processor, config)
    with pytest.raises(ValueError, match=r"4 of the cells 0 to 7 .*first ids: \[0, 1, 2, 3\]"):
        list(stream.batches())


def test_tokens_can_be_read_with_the_counts_that_they_come_from(source, processor):
    plan = plan_validation(np.arange(N_CELLS), 30)
    config = StreamConfig(0, categories={"domain_ids": ("donor_id", {"d0": 0, "d1": 1, "d2": 2})})
    parts = list(CellStream(source, [plan], processor, config).tokenized())
    assert [len(part.tokens) for part in parts] == [30, 30, 30, 10]
    assert np.concatenate([part.cell_ids for part in parts]).tolist() == list(range(N_CELLS))
    for part in parts:
        counts = part.block.counts[part.rows].toarray()
        assert np.array_equal((counts > 0).sum(axis=1) + 1, np.diff(part.tokens.indptr))
        assert np.array_equal(part.categories["domain_ids"], part.cell_ids % 3)


def test_a_stream_with_counts_yields_the_complete_counts_of_each_cell(source, processor):
    config = StreamConfig(
        seed=0, mask_ratios=(0.5,), max_tokens=6, with_counts=True, with_cell_ids=True, micro_batches=2
    )
    counts = torch.from_numpy(make_counts())
    for batch in stream_cells(source, plans_of(1), processor, config):
        dense = torch.zeros(len(batch["cell_ids"]), processor.vocab_size)
        dense[batch["count_cells"], batch["count_ids"]] = batch["count_values"]
        assert torch.equal(dense[:, :N_GENES], counts[batch["cell_ids"]])
        assert batch["num_cells_in_batch"] == BATCH


def test_counts_belong_to_the_cells_that_are_left_where_some_are_empty(source_with_empty_cells, processor):
    config = StreamConfig(seed=0, with_counts=True, empty_cells="skip")
    plan = plan_validation(np.arange(8), batch_size=3)
    batches = list(stream_cells(source_with_empty_cells, [plan], processor, config))
    assert [len(lengths_of(batch)) for batch in batches] == [2, 2]
    for batch in batches:
        assert batch["count_cells"].tolist() == [0] * 5 + [1] * 5
        assert (batch["count_values"] == 2).all()


class CountingSource:
    """A source that counts the windows that are read from it."""

    def __init__(self, source, cells_at_once):
        self.source, self.cells_at_once, self.n_windows = source, cells_at_once, 0
        self.changed = threading.Condition()

    def __getattr__(self, name):
        return getattr(self.source, name)

    def read(self, cell_ids, columns=()):
        with self.changed:
            self.n_windows += 1
            self.changed.notify_all()
        return self.source.read(cell_ids, columns)


@pytest.mark.parametrize(("cells_at_once", "n_ahead"), [(0, 1), (24, 1), (25, 2), (70, 3)])
def test_as_many_windows_are_read_ahead_as_keep_the_threads_of_the_source_busy(
    source, processor, cells_at_once, n_ahead
):
    counting, config = CountingSource(source, cells_at_once), StreamConfig(seed=0, mask_ratios=None)
    plans = plans_of(3)  # windows of 24 cells: two batches
    expected = list(stream_cells(source, plans, processor, config))
    found = []
    for number, batch in enumerate(CellStream(counting, plans, processor, config).batches()):
        found.append(batch)
        if number == 4:  # the first batch of the third window
            with counting.changed:
                assert counting.changed.wait_for(lambda: counting.n_windows >= 3 + n_ahead, timeout=60)
        if number <= 5:
            assert counting.n_windows <= 3 + n_ahead
    assert_same_batches(found, expected)
