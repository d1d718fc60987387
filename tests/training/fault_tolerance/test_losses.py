"""The losses since the last log line: sums without skipped steps, saved and merged over processes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from scgpt_hf.training.fault_tolerance.losses import LossAccumulator, load_losses, losses_path, save_losses

STEPS = st.lists(st.tuples(st.lists(st.integers(0, 100), min_size=1, max_size=3), st.booleans()), max_size=6)


def accumulate(steps):
    losses = LossAccumulator()
    for micro_batches, skipped in steps:
        losses.start_step()
        for loss in micro_batches:
            losses.add({"gep": torch.tensor(float("nan") if skipped else float(loss))})
        losses.end_step(torch.tensor(skipped))
    return losses


@given(steps=STEPS)
def test_sums_are_over_micro_batches_of_steps_that_were_not_skipped(steps):
    losses = accumulate(steps)
    assert float(losses.sums.get("gep", 0.0)) == sum(sum(parts) for parts, skipped in steps if not skipped)
    assert float(losses.n_steps) == sum(not skipped for _, skipped in steps)
    losses.reset()
    assert (losses.sums, losses.n_steps) == ({}, 0.0)


@given(processes=st.lists(STEPS, min_size=1, max_size=3))
def test_loading_the_files_of_several_processes_adds_their_sums(processes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    accumulated = [accumulate(steps) for steps in processes]
    for rank, losses in enumerate(accumulated):
        save_losses(losses, losses_path(folder, rank))
    merged = load_losses([losses_path(folder, rank) for rank in range(len(processes))])
    assert merged.sums.get("gep", 0.0) == sum(float(losses.sums.get("gep", 0.0)) for losses in accumulated)
    assert merged.n_steps == float(accumulated[0].n_steps)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"sums": [], "n_steps": 1}', '{"sums": {"gep": "x"}}'])
def test_malformed_files_raise(tmp_path, content):
    path = tmp_path / "losses_0.json"
    path.write_text(content)
    with pytest.raises((AttributeError, KeyError, TypeError, ValueError)):
        load_losses([path])
