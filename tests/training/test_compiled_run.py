"""Compiled training has the losses of eager training; labels are counted, and only batches for a GPU are pinned."""

import json

import pytest
import torch

from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.library_trainer import copy_to
from scgpt_hf.training.trainer import count_labels, pin_batches
from tests.support.training import prepare

CPU = torch.device("cpu")


def test_a_compiled_run_has_the_losses_of_an_eager_one(small_census, tmp_path):
    losses = []
    for name, flags in {"eager": (), "compiled": ("--torch_compile_backend", "eager")}.items():
        trainer, data_module, _ = prepare(
            small_census, tmp_path / name, "--dropout", "0", "--logging_steps", "2", *flags
        )
        assert data_module.stream_config.bucketed == (name == "compiled")
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "gep" in line])
        losses.append([line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line])
    assert losses[0] == pytest.approx(losses[2], rel=1e-4)
    assert losses[1] == pytest.approx(losses[3], rel=1e-3)
    assert json.loads((tmp_path / "compiled" / "metrics.jsonl").read_text().splitlines()[0])["tokens_per_second"] > 0


def test_labels_are_counted_over_the_batches_of_a_step():
    batches = [{"labels": torch.tensor([[1.0, IGNORE, 3.0]])}, {"labels": torch.tensor([[IGNORE], [2.0]])}]
    counted = count_labels(batches, ["labels"], CPU)
    assert counted.item() == 3
    assert counted.dtype == torch.float32
    assert count_labels([], ["labels"], CPU).item() == 0


def test_batches_for_a_cpu_are_not_pinned():
    def stream(position):
        return [position]

    assert pin_batches(stream, CPU) is stream
    tensor = torch.ones(2)
    assert copy_to(CPU, tensor) is tensor
