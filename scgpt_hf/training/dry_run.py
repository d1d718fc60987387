"""Describe a run without running it: cells, size, time and memory. Time and memory are measured on a few steps."""

import time
from contextlib import closing
from itertools import islice

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import Trainer

from scgpt_hf.cells.schedule.balance import Balance
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.measuring import format_duration, peak_memory
from scgpt_hf.model.configuration_scgpt import training_flops_per_cell, training_flops_per_token
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.pipeline.stream import Batch, lengths_of
from scgpt_hf.tokens.packing_scgpt import IGNORE
from scgpt_hf.training.data_module import DataModule
from scgpt_hf.training.estimate.devices import find_device
from scgpt_hf.training.optimization.optimizers import MUON, make_muon
from scgpt_hf.training.settings import TrainingSettings
from scgpt_hf.training.summary import device_name

_TIMED_STEPS = 5
_SHOWN_GROUPS = 5  # the rarest, and as many of the most frequent


def describe_run(data_module: DataModule, model: ScGPTForPreTraining, args: TrainingSettings) -> str:
    """Return a table that describes the run. A few steps are done to measure time and memory.

    Args:
        data_module: batches and schedule of the run.
        model: new model of the run. The measured steps leave gradients in it, but do not change its weights.
        args: training settings.
    """
    parts, donors, plan = data_module.selection.parts, data_module.selection.n_donors, data_module.first_plan
    with closing(prefetch(data_module.train(0))) as stream:
        batches = list(islice(stream, _TIMED_STEPS + 1))
    lengths = np.concatenate([lengths_of(batch).numpy() for batch in batches])
    n_steps = data_module.schedule.n_steps
    low, high = np.quantile(lengths, [0.25, 0.75])
    views = [lengths_of(batch, "view_").numpy() for batch in batches if "view_input_ids" in batch]
    encoded = np.concatenate([lengths, *views])
    mean_tokens = float(np.square(encoded).sum() / encoded.sum())  # over tokens, as attention sees it
    n_masked = sum(int(torch.as_tensor(batch["labels"]).ne(IGNORE).sum()) for batch in batches)
    flops_per_token = training_flops_per_token(model.config, mean_tokens, n_masked / encoded.sum())
    flops_per_cell = flops_per_token * encoded.sum() / len(lengths)
    flops_per_step = (flops_per_cell + training_flops_per_cell(model.config)) * plan.batch_size
    seconds_per_micro_batch = _time_micro_batch(model, batches, args)
    seconds_per_step = seconds_per_micro_batch * args.gradient_accumulation_steps
    lines = {
        "cells": f"{len(parts['train']):,} of {donors['train']:,} donors for training, "
        f"{len(parts['validation']):,} of {donors['validation']:,} other donors for validation",
        "genes": f"{len(data_module.selection.genes):,} of {len(data_module.source.genes):,}"
        + _gene_sample(data_module.selection.n_gene_cells),
        "tokens per cell": f"mean {lengths.mean():.0f}, interquartile range {low:.0f} to {high:.0f}, "
        f"maximum {lengths.max()} (first {len(lengths):,} cells)",
        "steps": f"{n_steps:,} of {plan.batch_size:,} cells; {plan.n_steps:,} per epoch, "
        f"which leaves {plan.n_dropped:,} cells out{_shortcut_steps(args)}",
        **_balance_line(data_module.selection.balance),
        "parameters": f"{model.num_parameters():,}{_decoder_size(model)}",
        "compute": f"{flops_per_step / 1e9:,.1f} GFLOP per step, {flops_per_step * n_steps / 1e15:,.3g} PFLOP in total",
        "time": f"about {format_duration(seconds_per_step * n_steps)} on {device_name(args.device)} x "
        f"{args.world_size}, without validation ({seconds_per_step * 1e3:,.0f} ms per step, measured)",
        "memory": f"about {peak_memory(args.device) / 2**30:.1f} GiB per process, measured",
        "speed": f"{len(lengths) / len(batches) / seconds_per_micro_batch:,.0f} cells/s per process, "
        f"{seconds_per_micro_batch * 1e3:,.0f} ms per micro-batch, measured",
        **_advice(model, batches[0], args),
    }
    return "\n".join(f"{name:>16}  {line}" for name, line in lines.items()) + "\nNothing was written (--dry_run)."


def _advice(model: ScGPTForPreTraining, batch: Batch, args: TrainingSettings) -> dict[str, str]:
    """Return the prediction for this device, and the batch size to use."""
    from scgpt_hf.training.estimate.advice import advise  # 0.4 s, which only a dry run needs

    squares = lengths_of(batch).double().square().sum()
    if "view_input_ids" in batch:
        squares += lengths_of(batch, "view_").double().square().sum()
    return advise(
        model.config,
        batch,
        float(squares),
        device=find_device(torch.cuda.get_device_name(args.device)) if args.device.type == "cuda" else None,
        cells=len(lengths_of(batch)),
        accumulation=args.gradient_accumulation_steps,
        compiled=args.torch_compile,
        checkpointing=bool(args.gradient_checkpointing),
    )


def _make_optimizer(model: ScGPTForPreTraining, args: TrainingSettings) -> torch.optim.Optimizer:
    """Return the optimizer that the run will use, with a learning rate of 0."""
    if args.optim == MUON:
        optimizer = make_muon(model, args, set())
    else:
        optimizer_class, settings = Trainer.get_optimizer_cls_and_kwargs(args, model)
        optimizer = optimizer_class(model.parameters(), **settings)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    return optimizer


def _decoder_size(model: ScGPTForPreTraining) -> str:
    """Return how many of the parameters the count decoder has; its biases grow with the number of batches."""
    if (head := model.count_head) is None:
        return ""
    n_domains, n_genes = head.bias.shape
    return (
        f", of which {sum(weight.numel() for weight in head.parameters()):,} of the count decoder, with "
        f"{head.bias.numel():,} biases of {n_domains:,} batches x {n_genes:,} genes"
    )


def _shortcut_steps(args: TrainingSettings) -> str:
    """Return the steps of the shortcut before the run, which the measured time does not include."""
    if not args.shortcut_steps:
        return ""
    return f"; before them {args.shortcut_steps:,} of the shortcut alone (--shortcut_steps), not in the time below"


def _gene_sample(n_cells: int | None) -> str:
    """Return on how many cells the genes were chosen, if not on all; see `select_cells_and_genes`."""
    if n_cells is None:
        return ""
    return f", estimated on {n_cells:,} cells; the run reads all training cells before its first step to choose them"


def _balance_line(balance: Balance | None) -> dict[str, str]:
    """Return how often each group of cells is drawn, the rarest one first; nothing in natural order."""
    if balance is None:
        return {}
    draws = balance.expected_draws
    ascending = np.argsort(balance.sizes, kind="stable")
    groups = [f"{balance.names[group]} {balance.sizes[group]:,} -> {draws[group]:,.0f}" for group in ascending]
    if len(groups) > 2 * _SHOWN_GROUPS:
        n_more = len(groups) - 2 * _SHOWN_GROUPS
        groups = [*groups[:_SHOWN_GROUPS], f"({n_more:,} more)", *groups[-_SHOWN_GROUPS:]]
    without = f"; {balance.n_without:,} cells without a label, each once" if balance.n_without else ""
    return {"balance": f"cells -> draws per epoch: {', '.join(groups)}{without}"}


def _time_micro_batch(model: ScGPTForPreTraining, batches: list[Batch], args: TrainingSettings) -> float:
    """Return the mean seconds of a micro-batch: forward pass, backward pass and optimizer."""
    model.train().to(args.device)
    optimizer = _make_optimizer(model, args)
    started = time.perf_counter()
    for number, batch in enumerate(batches):
        if number == 1:  # the first batch pays for memory allocation and compilation
            started = time.perf_counter()
        moved = send_to_device(batch, args.device)
        with torch.autocast(args.device.type, torch.bfloat16, enabled=args.bf16):
            loss = model(**moved).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    if args.device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - started) / max(len(batches) - 1, 1)
