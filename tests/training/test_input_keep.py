"""Training with thinned inputs: what a batch holds, validation with complete counts, and exact resume."""

import shutil

import numpy as np
import pytest
import torch

from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from tests.support.memory_source import make_cells
from tests.support.training import EVERY_4, QUIET, prepare, weights_of

COUNTS = ("--loss_weights", '{"counts": 1.0}', "--cls_shortcut", "true", "--max_tokens", "40", "--input_style", "log1p")
THINNED = (*COUNTS, "--input_keep", "0.25", "0.5")


@pytest.fixture(scope="module")
def trained(small_census, tmp_path_factory):
    """A finished run of two epochs."""
    folder = tmp_path_factory.mktemp("thinned") / "run"
    trainer, data_module, _ = prepare(small_census, folder, *THINNED, *EVERY_4)
    trainer.train()
    return trainer, data_module, folder


def batch_of(source, **options):
    """Return the only batch of a source of up to 64 cells."""
    processor = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist(), input_style="log1p")
    plan = plan_epoch(source.cell_ids, seed=0, epoch=1, batch_size=len(source.cell_ids))
    (batch,) = stream_cells(source, [plan], processor, StreamConfig(seed=0, with_counts=True, **options))
    return batch


def test_tokens_are_thinned_and_targets_are_not():
    source = make_cells([24], n_genes=80)
    complete, thinned = batch_of(source), batch_of(source, input_keep=(0.5,))
    for key in ("count_ids", "count_values", "count_cells"):
        assert torch.equal(complete[key], thinned[key]), key
    lengths = [np.diff(batch["cu_seq_lens_q"]) for batch in (complete, thinned)]
    assert (lengths[1] <= lengths[0]).all()
    assert lengths[1].sum() < lengths[0].sum()
    assert len(lengths[0]) == len(lengths[1]) == 24


def test_inputs_and_second_views_lose_different_molecules():
    source = make_cells([24], n_genes=80)
    batch = batch_of(source, input_keep=(0.5,), view_keep=(0.5,))
    assert not torch.equal(batch["input_ids"], batch["view_input_ids"])
    assert torch.equal(batch["view_input_ids"], batch_of(source, view_keep=(0.5,))["view_input_ids"])


def test_a_share_of_one_changes_nothing():
    source = make_cells([24], n_genes=80)
    complete, kept = batch_of(source), batch_of(source, input_keep=(1.0,))
    for key, value in complete.items():
        assert torch.equal(torch.as_tensor(value), torch.as_tensor(kept[key])), key


def test_validation_reads_complete_counts(small_census, tmp_path):
    data, thinned = (
        prepare(small_census, tmp_path / name, *flags)[1] for name, flags in (("plain", COUNTS), ("thin", THINNED))
    )
    for one, other in zip(data.validation(), thinned.validation(), strict=True):
        assert torch.equal(one["values"], other["values"])
    assert not torch.equal(next(iter(data.train(0)))["values"], next(iter(thinned.train(0)))["values"])


def test_resumed_equals_uninterrupted(small_census, trained, tmp_path):
    uninterrupted, _, run = trained
    folder = shutil.copytree(run, tmp_path / "run")
    flags = (*QUIET, "--resume_from_checkpoint", str(folder / "checkpoint-4"))
    resumed, _, checkpoint = prepare(small_census, folder, *THINNED, *flags)
    resumed.train(resume_from_checkpoint=checkpoint)
    for name, weight in weights_of(resumed).items():
        assert torch.equal(weight, uninterrupted.model.get_parameter(name)), name
    with pytest.raises(ValueError, match="'input_keep'"):
        prepare(small_census, folder, *COUNTS, *flags)


@pytest.mark.parametrize("shares", [("0",), ("0.5", "1.5")])
def test_shares_out_of_range_raise(small_census, tmp_path, shares):
    with pytest.raises(ValueError, match="input_keep above 0"):
        prepare(small_census, tmp_path / "run", *COUNTS, "--input_keep", *shares)
