"""On a GPU, no step makes the host wait, and a run of 20 steps learns, eager and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import TrainerCallback

from scgpt_hf.tokens.packing_scgpt import bucket, pack
from tests.support.models import N_GENES, PAD_ID, random_cells, small_model

if TYPE_CHECKING:
    from scgpt_hf.training.trainer import ScGPTTrainer

pytestmark = pytest.mark.gpu

FLAGS = [
    *("--hidden_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "1", "--intermediate_size", "64"),
    *("--max_steps", "20", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
    *("--learning_rate", "1e-3", "--per_device_train_batch_size", "16", "--use_cpu", "false"),
]


class RaiseOnSync(TrainerCallback):
    """Makes PyTorch raise if the host waits for the GPU, after ten steps, when everything is compiled."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 10:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 16:
            torch.cuda.set_sync_debug_mode("default")


@pytest.fixture(scope="session")
def cells(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache of 300 cells of six donors; training on a cache needs neither anndata nor tiledbsoma."""
    pytest.importorskip("datasets")
    from scgpt_hf.cells.cache.jobs import write_cache
    from tests.support.memory_source import make_cells

    folder = tmp_path_factory.mktemp("cells") / "cache"
    write_cache(make_cells([50] * 6, n_genes=120), folder)
    return folder


def trainer_for(cells: Path, folder: Path, *flags: str) -> ScGPTTrainer:
    # Imported here, because a machine with the libraries of the model only must be able to import this module.
    from tests.support.training import prepare

    return prepare(cells, folder, *FLAGS, *flags)[0]


@pytest.mark.parametrize("compiled", [False, True])
def test_a_plain_step_never_waits(gpu: torch.device, compiled: bool) -> None:
    network = small_model(gpu, dropout=0.2)
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    batches = [bucket(pack(random_cells(16, 60, N_GENES, seed)), pad_id=PAD_ID, pad_value=-2.0) for seed in range(6)]
    batches = [{key: value.pin_memory() if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
               for batch in batches]  # fmt: skip
    torch.cuda.synchronize()
    try:
        for number, batch in enumerate([*batches, *batches]):
            if number == len(batches):
                torch.cuda.set_sync_debug_mode("error")
            inputs = {key: value.to(gpu, non_blocking=True) if isinstance(value, torch.Tensor) else value
                      for key, value in batch.items()}  # fmt: skip
            with torch.autocast("cuda", torch.bfloat16):
                loss = forward(**inputs).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(loss)


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_no_step_of_the_trainer_waits(gpu: torch.device, cells: Path, tmp_path: Path, compiled: str) -> None:
    trainer = trainer_for(cells, tmp_path / "run", "--logging_steps", "100", "--torch_compile", compiled)
    trainer.add_callback(RaiseOnSync())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 20


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_twenty_steps_learn(gpu: torch.device, cells: Path, tmp_path: Path, compiled: str) -> None:
    trainer = trainer_for(cells, tmp_path / "run", "--logging_steps", "5", "--torch_compile", compiled)
    assert trainer.args.bf16
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "gep" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
