"""On a GPU: no step makes the host wait, and a run of 20 steps learns, eager and compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from scgpt_hf.pretraining import prepare_run
from scgpt_hf.tokens.packing_scgpt import bucket, pack
from scgpt_hf.training.recipe import make_trainer
from scgpt_hf.training.selection import save_selection
from scgpt_hf.training.settings_parsing import parse_settings
from scgpt_hf.training.trainer import ScGPTTrainer
from tests.gpu.test_gpu_model import PAD, masked_cells, network_on

pytestmark = pytest.mark.gpu

SMALL = [
    *("--hidden_size", "64", "--num_hidden_layers", "2", "--num_attention_heads", "1", "--intermediate_size", "64"),
    *("--min_gene_counts", "1", "--validation_fraction", "0.3", "--disable_tqdm", "true", "--chunks_per_window", "1"),
    *("--max_steps", "20", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"),
    *("--learning_rate", "1e-3", "--per_device_train_batch_size", "16"),
]


class ErrorOnWaiting(TrainerCallback):
    """Has PyTorch raise where the host waits for the GPU, from the eleventh step on, when all is compiled."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 10:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 16:
            torch.cuda.set_sync_debug_mode("default")


def trainer_for(census: Path, folder: Path, *flags: str) -> ScGPTTrainer:
    settings = parse_settings([*SMALL, "--data", str(census), "--output_dir", str(folder), *flags], "test")
    run = prepare_run(settings)
    trainer = make_trainer(run.data_module, run.model, settings.training)
    save_selection(run.selection, run.source, settings)
    return trainer


@pytest.mark.parametrize("compiled", [False, True])
def test_a_bare_step_never_waits(gpu: torch.device, compiled: bool) -> None:
    network = network_on(gpu, dropout=0.2)
    forward = torch.compile(network) if compiled else network
    optimizer = torch.optim.AdamW(network.parameters(), fused=True)
    batches = [bucket(pack(masked_cells(16, 60, seed)), pad_id=PAD, pad_value=-2.0) for seed in range(6)]
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
def test_no_step_of_the_trainer_waits(gpu: torch.device, small_census: Path, tmp_path: Path, compiled: str) -> None:
    trainer = trainer_for(small_census, tmp_path / "run", "--logging_steps", "100", "--torch_compile", compiled)
    trainer.add_callback(ErrorOnWaiting())
    try:
        trainer.train()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert trainer.state.global_step == 20


@pytest.mark.parametrize("compiled", ["false", "true"])
def test_twenty_steps_learn(gpu: torch.device, small_census: Path, tmp_path: Path, compiled: str) -> None:
    trainer = trainer_for(small_census, tmp_path / "run", "--logging_steps", "5", "--torch_compile", compiled)
    assert trainer.args.bf16
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "gep" in line]
    assert len(losses) == 4
    assert losses[-1] < losses[0]
