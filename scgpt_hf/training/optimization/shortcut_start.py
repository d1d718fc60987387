"""Train the shortcut and the count decoder alone, before the run: a fast start for the cell embedding.

The shortcut (`CellShortcut`) and the count decoder together are a small network on the bag of a cell's genes. Without
the encoder a step costs a fraction of a training step, so thousands of steps take about a minute on a CPU. The run then
starts from an embedding that separates cell types already, and the encoder learns what the bag of genes does not hold.
"""

import math
from contextlib import closing
from itertools import islice
from typing import Any

import torch
from transformers import get_cosine_schedule_with_warmup

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.schedule.epoch import EpochPlan, plan_epoch
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.model.attention_scgpt import cell_offsets
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.progress_bar import progress_bar
from scgpt_hf.scoring.count_mlp import MAX_NORM, WARMUP_STEPS, make_optimizer
from scgpt_hf.training.data_module import DataModule

# As in our measurements; see benchmarks/results/quality/. The optimizer is that of the same network as a baseline.
_BATCH_SIZE = 128


def train_shortcut(
    model: ScGPTForPreTraining, data_module: DataModule, *, n_steps: int, device: torch.device, progress: bool = True
) -> None:
    """Train the shortcut and the count decoder of a new model in place.

    Every process does the same work on the same cells, so the models stay equal without communication.

    Args:
        model: new model with a shortcut and the objective "counts".
        data_module: the training cells of the run, its processor, masks and experimental batches.
        n_steps: steps of 128 cells.
        device: where to train.
        progress: show a progress bar.
    """
    shortcut, decoder = model.scgpt.shortcut, model.count_head
    assert shortcut is not None  # `check_settings` makes sure of both
    assert decoder is not None
    run, cell_ids = data_module.stream_config, data_module.selection.parts["train"]
    config = StreamConfig(
        seed=run.seed,
        mask_ratios=run.mask_ratios,
        input_keep=run.input_keep,
        padded=run.padded,
        categories=run.categories,
        with_counts=True,
    )
    plans = _plans(cell_ids, n_steps, chunk_size=data_module.source.chunk_size, seed=run.seed)
    parts = torch.nn.ModuleList([shortcut, decoder]).to(device).train()
    parameters = [parameter for name, parameter in parts.named_parameters() if not name.endswith("state_weight")]
    optimizer = make_optimizer(parameters)
    schedule = get_cosine_schedule_with_warmup(optimizer, min(WARMUP_STEPS, n_steps // 10), n_steps)
    bar = progress_bar(total=n_steps, description="shortcut", unit="steps", show=progress)
    with bar, closing(prefetch(stream_cells(data_module.source, plans, data_module.processor, config))) as batches:
        for batch in islice(batches, n_steps):
            tensors = {key: value.to(device) for key, value in batch.items() if isinstance(value, torch.Tensor)}
            offsets = cell_offsets(tensors["input_ids"], tensors.get("cu_seq_lens_q"))
            cells = shortcut(tensors["input_ids"], tensors["values"], offsets)
            entries = (tensors[name] for name in ("count_ids", "count_values", "count_cells"))
            loss = decoder.loss(cells, tensors.get("domain_ids"), *entries).mean()
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            torch.nn.utils.clip_grad_norm_(parameters, MAX_NORM)
            optimizer.step()
            schedule.step()
            bar.update()
            if bar.n % 100 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    parts.to("cpu")


def _plans(cell_ids: Int64Array, n_steps: int, **order: Any) -> list[EpochPlan]:
    """Return the plans of as many epochs as the steps need."""
    batch_size = min(_BATCH_SIZE, len(cell_ids))
    n_epochs = math.ceil(n_steps / (len(cell_ids) // batch_size))
    return [plan_epoch(cell_ids, epoch=epoch, batch_size=batch_size, **order) for epoch in range(n_epochs)]
