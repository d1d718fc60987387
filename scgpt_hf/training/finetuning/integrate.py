"""Fine-tune on several experimental batches, so that cells of one type get similar embeddings in every batch.

The run is a pretraining run that starts from a checkpoint, with the objectives and norms of scGPT's integration task.
The resulting model embeds each cell by its batch: `embed_anndata` reads it from the obs column that the config names.
"""

import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from transformers import set_seed

from scgpt_hf.cells.missing import fill_missing
from scgpt_hf.cells.obs import require_named_columns
from scgpt_hf.cells.selection.filters import cells_expressing, cells_with_value
from scgpt_hf.cells.selection.splits import split_within
from scgpt_hf.cells.source import Address, CellSource, open_source
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.pretrained import Pretrained, load_pretrained, load_processor
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.data_module import DataModule
from scgpt_hf.training.finetuning.run_folder import save_inputs, save_results
from scgpt_hf.training.finetuning.settings import IntegrateSettings, training_settings
from scgpt_hf.training.recipe import make_trainer, start_at_mean
from scgpt_hf.training.run_folder import own_run_folder, require_new_folder
from scgpt_hf.training.selection import Selection, composition_of
from scgpt_hf.training.summary import training_of

logger = logging.getLogger(__name__)


def finetune_integration(data: Address, settings: IntegrateSettings) -> dict[str, Any]:
    """Fine-tune a pretrained model on several experimental batches, and write a run folder.

    Some cells of every batch are held out to choose the best epoch. A batch that is held out completely would have no
    batch norm. Heads and norms that the checkpoint does not have, or has for other batches, are initialized at random;
    the summary lists them.

    Args:
        data: cells with raw counts: an AnnData, .h5ad files or a SOMA; genes by Ensembl id or symbol.
        settings: see `IntegrateSettings`.

    Returns:
        The content of summary.json: cells of each batch, new parts of the model, best validation.

    Raises:
        FileExistsError: the run folder is not empty, or another run is writing to it.
        OSError: the model or a file does not exist.
        ValueError: data, batches or model cannot be used. The message names what was found and how to fix it.

    Example:
        >>> settings = IntegrateSettings(model="runs/demo/best_model", out="runs/joined", batch_key="assay")
        >>> summary = finetune_integration(["a.h5ad", "b.h5ad"], settings)  # doctest: +SKIP
        >>> embed_anndata(adata, "runs/joined/best_model")  # doctest: +SKIP
    """
    with own_run_folder(Path(settings.out)):
        return _finetune(data, settings)


def _finetune(data: Address, settings: IntegrateSettings) -> dict[str, Any]:
    """Do what `finetune_integration` describes, in a folder that no other run writes to."""
    started = time.perf_counter()
    folder = Path(settings.out)
    require_new_folder(folder, "--out")
    source = open_source(data, layer=settings.layer, primary_only=False, round_counts=settings.round_counts)
    processor = load_processor(settings.model)
    domain_of = _domains(source, processor, settings.batch_key)
    parts = split_within(domain_of, settings.validation_fraction, settings.seed)
    domains = sorted(set(domain_of))
    set_seed(settings.seed)
    model, _, new = _load_for_domains(domains, settings)
    logger.info("loaded %s; initialized at random: %s", settings.model, new or "nothing")
    if "expression_head" in new:
        start_at_mean(model, processor)  # type: ignore[arg-type]
    args = training_settings(
        settings,
        output_dir=settings.out,
        save_only_model=False,
        save_total_limit=2,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        lr_decay_per_epoch=0.9,
        warmup_steps=0,
    )
    data_module = DataModule(
        source,
        Selection(parts, processor.genes, domains, n_donors={}),
        processor,
        model.config,  # type: ignore[arg-type]
        args,
        mask_ratios=[settings.mask_ratio],
    )
    trainer = make_trainer(data_module, model, args)  # type: ignore[arg-type]
    save_inputs(folder, source, parts, None, settings, {"domains": domains})
    trainer.train()
    validations = [line for line in trainer.state.log_history if "eval_loss" in line]
    summary = {
        "task": "integrate",
        "model": settings.model,
        "batch_key": settings.batch_key,
        **{f"{part}_cells": len(ids) for part, ids in parts.items()},
        "domains": {
            domain: {part: int((domain_of.reindex(ids) == domain).sum()) for part, ids in parts.items()}
            for domain in domains
        },
        "new": new,
        "genes": len(processor.genes),
        "composition": composition_of(source, parts),
        **training_of(trainer),
        "best": min(validations, key=lambda line: line["eval_loss"]),
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
        "data": source.describe(),
    }
    if trainer.is_world_process_zero():
        save_results(folder, trainer.accelerator.unwrap_model(trainer.model), processor, summary)
    return summary


def _domains(source: CellSource, processor: ScGPTProcessor, batch_key: str) -> "pd.Series[str]":
    """Return the experimental batch of each cell that has one and expresses a gene of the vocabulary.

    Returns:
        Text, indexed by cell id. Shape (cells,).

    Raises:
        ValueError: there are fewer than two batches.
    """
    require_named_columns({"--batch_key": batch_key}, source.obs_columns)
    obs = source.obs([batch_key])
    known = np.flatnonzero(match_source_genes(source.genes, processor)[0] >= 0)
    domain_of = fill_missing(obs.loc[cells_expressing(source, cells_with_value(obs, batch_key), known), batch_key])
    if domain_of.nunique() < 2:
        raise ValueError(
            f"integration needs two or more experimental batches; all {len(domain_of):,} cells have "
            f"{domain_of.iloc[0]!r} in obs[{batch_key!r}]; choose another column (--batch_key)"
        )
    return domain_of


def _load_for_domains(domains: list[str], settings: IntegrateSettings) -> Pretrained:
    """Return the pretrained model with the heads, norms and objectives of integration."""
    weights = {name: getattr(settings, f"{name}_weight") for name in ("gep", "gepc", "ecs", "dar")}
    return load_pretrained(
        settings.model,
        ScGPTForPreTraining,
        n_domains=len(domains),
        batch_key=settings.batch_key,
        domains=domains,
        input_norm=settings.input_norm,
        domain_embedding=settings.domain_embedding,
        domain_head=settings.dar_weight > 0,
        ecs_threshold=settings.ecs_threshold,
        explicit_zero_prob=False,  # genes that are not expressed are no tokens here
        objective="masked",  # a batch norm per domain, the default, needs padded input, which queries do not have
        leave_out_masked=False,  # GEP predicts masked genes from their hidden states
        loss_weights={name: weight for name, weight in weights.items() if weight},
    )
