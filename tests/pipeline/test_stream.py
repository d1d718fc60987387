"""The corridor: which cells come out, in which order, the same for every number of ranks, and from any step on."""

import threading
import time
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
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.stream import StreamConfig, StreamLoader, stream_cells
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

N_CELLS, N_GENES, BATCH = 100, 40, 12


@pytest.fixture(scope="module")
def source():
    rng = np.random.default_rng(0)
    counts = rng.poisson(0.5, (N_CELLS, N_GENES)).astype(np.float32)
    counts[:, 0] = 1 + np.arange(N_CELLS)  # gene 0 tells the cell
    genes = pd.DataFrame(index=[f"ENSG{index:011d}" for index in range(N_GENES)])
    obs = pd.DataFrame({"donor_id": [f"d{index % 3}" for index in range(N_CELLS)]}, index=map(str, range(N_CELLS)))
    return open_source(anndata.AnnData(csr_matrix(counts), obs=obs, var=genes))


@pytest.fixture(scope="module")
def processor(source):
    return ScGPTProcessor.from_genes(source.genes["feature_id"].tolist())


def plans_of(n_epochs: int, seed: int = 0):
    cells = np.arange(N_CELLS)
    return [
        plan_epoch(cells, seed=seed, epoch=epoch, batch_size=BATCH, chunk_size=16, chunks_per_window=2)
        for epoch in range(n_epochs)
    ]


def cells_of(batch) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    """Each cell as its tokens and labels: what makes it recognisable."""
    ids, labels = batch["input_ids"].ravel().tolist(), batch["labels"].ravel().tolist()
    return [(tuple(ids[a:b]), tuple(labels[a:b])) for a, b in pairwise(batch["cu_seq_lens_q"].tolist())]


def test_stream_yields_each_planned_step_once_and_again(source, processor):
    stream = stream_cells(source, plans_of(2), processor, StreamConfig(seed=0, mask_ratios=(0.5,)))
    first, second = list(stream), list(stream)
    assert len(first) == 2 * (N_CELLS // BATCH)
    assert all(len(batch["cu_seq_lens_q"]) == BATCH + 1 for batch in first)
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one[key], other[key]) for key in ("input_ids", "values", "labels", "cu_seq_lens_q"))


def test_masks_differ_between_epochs_and_follow_the_seed(source, processor):
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
        data_module = [
            list(stream_cells(source, plans_of(2), processor, StreamConfig(3, (0.5,), rank, world, micro)))
            for rank in range(world)
        ]
        n_steps = len(data_module[0]) // micro
        return [
            sorted(
                cell
                for stream in data_module
                for batch in stream[step * micro : (step + 1) * micro]
                for cell in cells_of(batch)
            )
            for step in range(n_steps)
        ]

    assert steps(world_size, micro_batches) == steps(1, 1)


@pytest.mark.parametrize("start", [0, 1, 5, 8, 11, 15])
def test_a_stream_can_start_at_any_step(source, processor, start):
    settings = StreamConfig(seed=1, mask_ratios=(0.25, 0.75))
    whole = list(stream_cells(source, plans_of(2), processor, settings))
    rest = list(stream_cells(source, plans_of(2), processor, settings, start_step=start))
    assert [cells_of(batch) for batch in rest] == [cells_of(batch) for batch in whole[start:]]


def test_state_dict_of_datasets_resumes_too(source, processor):
    stream = stream_cells(source, plans_of(1), processor, StreamConfig(seed=1, mask_ratios=(0.5,)))
    batches = iter(stream)
    for _ in range(5):
        next(batches)
    state = stream.state_dict()
    rest = [cells_of(batch) for batch in batches]
    again = stream_cells(source, plans_of(1), processor, StreamConfig(seed=1, mask_ratios=(0.5,)))
    again.load_state_dict(state)
    assert [cells_of(batch) for batch in again] == rest


def test_starting_after_the_end_is_an_error(source, processor):
    with pytest.raises(ValueError, match="nothing is left"):
        stream_cells(source, plans_of(1), processor, StreamConfig(seed=0), start_step=8)


def test_validation_sees_every_cell_once_over_all_ranks(source, processor):
    plan = plan_validation(np.arange(N_CELLS), 7)
    data_module = [stream_cells(source, [plan], processor, StreamConfig(0, (0.5,), rank, 20)) for rank in range(20)]
    cells = [cell for stream in data_module for batch in stream for cell in cells_of(batch)]
    assert len(cells) == N_CELLS == len(set(cells))


def test_labels_are_the_hidden_values(source, processor):
    masked = list(stream_cells(source, plans_of(1), processor, StreamConfig(0, (0.5,))))
    plain = list(stream_cells(source, plans_of(1), processor, StreamConfig(0)))
    for batch, whole in zip(masked, plain, strict=True):
        hidden = batch["labels"] != IGNORE
        assert torch.equal(batch["labels"][hidden], whole["values"][hidden])
        assert (batch["values"][hidden] == processor.mask_value).all()
        assert torch.equal(batch["values"][~hidden], whole["values"][~hidden])


def test_categories_become_class_ids(source, processor):
    classes = {"domain_ids": ("donor_id", {"d0": 0, "d1": 1, "d2": 2})}
    batch = next(
        iter(
            stream_cells(
                source, [plan_validation(np.arange(N_CELLS), 6)], processor, StreamConfig(0, categories=classes)
            )
        )
    )
    assert batch["domain_ids"].tolist() == [0, 1, 2, 0, 1, 2]
    unknown = {"domain_ids": ("donor_id", {"d0": 0})}
    with pytest.raises(ValueError, match=r"'d1', 'd2'.*have no class in domain_ids"):
        list(stream_cells(source, plans_of(1), processor, StreamConfig(0, categories=unknown)))


def test_cells_without_a_known_gene_are_left_out_and_a_batch_of_them_raises(processor):
    counts = np.zeros((8, N_GENES), np.float32)
    counts[4:, :5] = 2
    genes = pd.DataFrame(index=[f"ENSG{index:011d}" for index in range(N_GENES)])
    source = open_source(anndata.AnnData(csr_matrix(counts), var=genes, obs=pd.DataFrame(index=map(str, range(8)))))
    whole = list(stream_cells(source, [plan_validation(np.arange(8), 8)], processor, StreamConfig(0)))
    assert [len(batch["cu_seq_lens_q"]) - 1 for batch in whole] == [4]
    with pytest.raises(ValueError, match="no cell of a batch"):
        list(stream_cells(source, [plan_validation(np.arange(8), 4)], processor, StreamConfig(0)))


def test_read_ahead_keeps_order_raises_what_the_thread_raised_and_stops_it():
    def broken():
        yield from ({"number": number} for number in range(20))
        raise OSError("the disk is gone")

    seen = []
    with pytest.raises(OSError, match="the disk is gone"):
        seen.extend(batch["number"] for batch in prefetch(broken(), depth=3))
    assert seen == list(range(20))

    others = set(threading.enumerate())
    endless = prefetch(iter(lambda: {"number": 0}, None), depth=2)
    next(endless)
    own = [thread for thread in set(threading.enumerate()) - others if thread.name == "scgpt-read-ahead"]
    assert own
    endless.close()
    assert not [thread for thread in own if thread.is_alive()]


def test_loader_counts_what_was_consumed_not_what_was_read():
    def stream(start: int):
        return ({"number": number} for number in range(start, 100))

    loader = StreamLoader(stream, epoch_ends=(10, 20, 30))
    assert [batch["number"] for batch in loader] == list(range(10))
    batches = iter(loader)
    assert [next(batches)["number"] for _ in range(3)] == [10, 11, 12]
    time.sleep(0.05)
    state = loader.state_dict()
    assert state == {"consumed": 13}
    loader.close()

    resumed = StreamLoader(stream, epoch_ends=(10, 20, 30))
    resumed.load_state_dict(state)
    assert [batch["number"] for batch in resumed] == list(range(13, 20))
    assert [batch["number"] for batch in resumed] == list(range(20, 30))
    assert not list(resumed)
    assert len(resumed) == 10
    resumed.close()
