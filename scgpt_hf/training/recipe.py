"""Build what a run trains: the processor over its genes, a new model, and the trainer."""

import math
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from huggingface_hub.errors import StrictDataclassError
from numpy.typing import NDArray

from scgpt_hf.cells.block import CHUNK_SIZE, Float64Array, Int64Array
from scgpt_hf.cells.missing import number_texts
from scgpt_hf.cells.modalities import modalities_of
from scgpt_hf.cells.obs import take_cells
from scgpt_hf.cells.schedule.epoch import plan_validation
from scgpt_hf.cells.selection.counts import sums_per_batch
from scgpt_hf.cells.selection.gene_vectors import gene_vectors
from scgpt_hf.cells.source import CellSource
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.baselines import measure_baselines, sum_bins
from scgpt_hf.training.data_module import DataModule
from scgpt_hf.training.fault_tolerance.ranks import on_first_process
from scgpt_hf.training.fault_tolerance.signals import StopSignal
from scgpt_hf.training.run_folder import MetricsFile, require_space
from scgpt_hf.training.selection import Selection
from scgpt_hf.training.settings import TOKEN_SETTINGS, DataSettings, ModelSettings, Settings, TrainingSettings
from scgpt_hf.training.trainer import ScGPTTrainer, over_ranks
from scgpt_hf.training.validation.cell_types import CellTypeScorer, require_scoring

# Scale of the gene vectors of the shortcut that start from the data; those of the encoder have 1. Source: our
# measurements.
_SHORTCUT_SD = 1 / 20
_CHECKPOINT_BYTES = 12  # per parameter: the weight and two moments of Adam, 4 bytes each
_AVERAGE_BYTES = 4  # per parameter, if weights are averaged


def check_settings(settings: Settings) -> None:
    """Reject model and token settings that do not fit together, before any data are read.

    Raises:
        ValueError: names the setting, the value and what was expected.
    """
    require_scoring(settings)
    processor = build_processor(["any gene"], settings.data)
    # Two domains, because the data may have as many; which ones is known only when obs has been read.
    _build_config(settings.model, processor, domains=["a", "b"], batch_key=settings.data.batch_key)
    if settings.training.shortcut_steps and not (settings.model.cls_shortcut and _weight(settings, "counts")):
        raise ValueError(
            f"shortcut_steps is {settings.training.shortcut_steps}, which needs a shortcut and a count decoder; set "
            '--cls_shortcut true --loss_weights \'{"gep": 0.005, "counts": 1}\', or --shortcut_steps 0'
        )
    if settings.model.value_encoder == "category" and settings.data.input_style != "binned":
        raise ValueError(
            f"value_encoder 'category' has a row for each bin, and input_style {settings.data.input_style!r} makes no "
            "bins; use --value_encoder continuous, or --input_style binned"
        )
    supervise_by, weight = settings.data.supervise_by, _weight(settings, "cls")
    if (supervise_by is not None) != (weight > 0):
        raise ValueError(
            f"supervise_by is {supervise_by!r} and the weight of the objective 'cls' is {weight}; set both, e.g. "
            '--supervise_by cell_type --loss_weights \'{"gep": 1, "cls": 1}\', or neither'
        )


def _weight(settings: Settings, objective: str) -> float:
    """Return the weight of an objective that the settings name, 0 if they do not."""
    return float((settings.model.loss_weights or {}).get(objective, 0))


def build_processor(genes: list[str], data: DataSettings, source: CellSource | None = None) -> ScGPTProcessor:
    """Return the processor over the selected genes. Their token ids are 0 to genes - 1; special tokens follow.

    Args:
        genes: Ensembl ids of the vocabulary.
        data: holds the token settings.
        source: gives the gene symbols, so that data that name genes by symbol can be used with the model.
    """
    symbols = None
    if source is not None:
        symbols = source.genes.set_index("feature_id")["feature_name"].astype(str)[genes].tolist()
    values, modalities = asdict(data), modalities_of(genes)
    several = modalities if len(set(modalities)) > 1 else None
    settings = {name: values[name] for name in TOKEN_SETTINGS}
    return ScGPTProcessor.from_genes(genes, symbols=symbols, modalities=several, **settings)


def build_model(
    processor: ScGPTProcessor,
    model: ModelSettings,
    domains: Sequence[str] = (),
    batch_key: str | None = None,
    classes: Sequence[str] = (),
) -> ScGPTForPreTraining:
    """Return a new model for the vocabulary of a processor. Its weights depend on torch's random seed.

    Args:
        processor: processor of the model.
        model: size and objectives.
        domains: experimental batches, in the order of their ids.
        batch_key: obs column of the experimental batches.
        classes: labels of the objective "cls", in the order of their ids.
    """
    config = _build_config(model, processor, domains=list(domains), batch_key=batch_key, classes=classes)
    new = ScGPTForPreTraining(config)
    if new.scgpt.modality_table is not None:
        new.scgpt.modality_table.of_token.copy_(torch.from_numpy(processor.modality_ids(config.modalities)))
    start_at_mean(new, processor)
    return new


def start_at_mean(model: ScGPTForPreTraining, processor: ScGPTProcessor) -> None:
    """Let a new expression head start at the mean of the bins.

    Bins are nearly uniform on 1 … n_bins - 1. A head that starts at 0 needs hundreds of steps to reach their mean.
    """
    if processor.input_style == "binned" and model.expression_head is not None:
        last: Any = model.expression_head.value[-1]
        mean_bin = processor.n_bins / 2
        torch.nn.init.constant_(last.bias, mean_bin)


def start_at_mean_value(
    model: ScGPTForPreTraining, processor: ScGPTProcessor, source: CellSource, selection: Selection
) -> None:
    """Let a new expression head start at the mean of the values of some training cells, where values are no bins.

    All processes read the same cells, the first chunk. Does nothing if the values are bins; see `start_at_mean`.
    """
    if processor.input_style == "binned" or model.expression_head is None:
        return
    plan = plan_validation(selection.parts["train"][:CHUNK_SIZE], CHUNK_SIZE)
    sums = sum_bins(stream_cells(source, [plan], processor, StreamConfig(seed=0)), processor.vocab_size)
    sums[:, processor.tokenizer.all_special_ids] = 0
    last: Any = model.expression_head.value[-1]
    torch.nn.init.constant_(last.bias, float(sums[1].sum() / sums[0].sum()))


def start_at_frequencies(model: ScGPTForPreTraining, source: CellSource, selection: Selection) -> None:
    """Let a new count decoder start at the gene frequencies of each experimental batch, from the training cells.

    It then has to learn only how cells differ from the mean of their batch. Genes that none of the batch's data sets
    measured are excluded; where the source does not know them, those without a count in a training cell of the batch.
    Reads the training cells once, in the first process. Does nothing if the model has no count decoder.
    """
    if model.count_head is None:
        return
    train, key = selection.parts["train"], model.config.batch_key
    n_domains, genes = max(len(selection.domains), 1), _columns_of(source, selection.genes)

    def count() -> tuple[Float64Array, NDArray[np.bool_] | None]:
        domain_of_cell = np.zeros(len(train), np.int64)
        if key is not None:
            numbers, domains = number_texts(take_cells(source.obs([key])[key], train))
            domain_of_cell = np.array([selection.domain_ids[domain] for domain in domains])[numbers]
        sums, presence = sums_per_batch(source, train, genes, domain_of_cell)[0], source.presence(train)
        totals = np.pad(sums, ((0, n_domains - len(sums)), (0, 0)))  # the last domains may have no training cells
        return totals, None if presence is None else presence.of_groups(domain_of_cell, n_domains)[:, genes]

    totals, measured = on_first_process(count)
    n_special = model.config.vocab_size - len(genes)  # their ids follow those of the genes
    pad = partial(torch.nn.functional.pad, pad=(0, n_special))
    model.count_head.set_statistics(
        pad(torch.from_numpy(totals)), None if measured is None else pad(torch.from_numpy(measured))
    )


def start_at_gene_vectors(model: ScGPTForPreTraining, source: CellSource, selection: Selection, seed: int) -> None:
    """Let the gene tables of encoder and shortcut start at vectors from the correlations between genes.

    Special tokens, genes without a vector and components that the data do not have keep their random weights. Reads a
    sample of the training cells, in the first process; see `gene_vectors`.
    """
    tables: dict[Any, float] = {model.scgpt.get_input_embeddings().weight: 1.0}  # table → standard deviation
    if model.scgpt.shortcut is not None:
        tables[model.scgpt.shortcut.genes.weight] = _SHORTCUT_SD
    size, genes = max(table.shape[1] for table in tables), _columns_of(source, selection.genes)
    found = on_first_process(lambda: gene_vectors(source, selection.parts["train"], genes, size, seed=seed))
    rows = torch.from_numpy(np.flatnonzero(found.any(axis=1)))
    vectors = torch.from_numpy(found)[rows]
    with torch.no_grad():
        for table, sd in tables.items():
            part = vectors[:, : table.shape[1]]
            table[rows, : part.shape[1]] = (part * (sd / part.std())).to(table.dtype)


def _columns_of(source: CellSource, genes: list[str]) -> Int64Array:
    """Return the columns of these genes in the counts of a source. Shape (genes,)."""
    columns: Int64Array = pd.Index(source.genes["feature_id"]).get_indexer(pd.Index(genes)).astype(np.int64)
    return columns


def make_trainer(
    data_module: DataModule,
    model: ScGPTForPreTraining,
    args: TrainingSettings,
    stop_signal: StopSignal | None = None,
    cell_types: CellTypeScorer | None = None,
) -> ScGPTTrainer:
    """Return the trainer of a run. It measures the baselines, and writes metrics.jsonl during training.

    Args:
        data_module: batches and schedule of the run.
        model: model to train.
        args: training settings.
        stop_signal: handles SIGTERM, SIGUSR1 and SIGINT during training; None leaves the signal handlers alone.
        cell_types: scores the embedding of labelled cells at every validation; see `make_cell_type_scorer`.

    Raises:
        OSError: the disk has too little space for the checkpoints.
        ValueError: no position of the validation cells is masked, or `metric_for_best_model` is not measured.
    """
    schedule = data_module.schedule
    n_saves = (
        len(schedule.epoch_ends) if args.save_strategy == "epoch" else math.ceil(schedule.n_steps / args.save_steps)
    )
    # Two more: the checkpoint that is being written, and the best model.
    n_checkpoints = min(args.save_total_limit or n_saves, n_saves) + 2
    n_bytes = _CHECKPOINT_BYTES + _AVERAGE_BYTES * (args.ema_decay is not None)
    require_space(Path(args.output_dir), n_checkpoints * n_bytes * model.num_parameters())
    trainer = ScGPTTrainer(
        model=model,
        args=args,
        processing_class=data_module.processor,
        train_stream=data_module.train,
        schedule=schedule,
        validation_stream=data_module.validation,
        n_validation_steps=data_module.n_validation_steps,
        callbacks=[MetricsFile(Path(args.output_dir))],
        stop_signal=stop_signal,
        cell_types=cell_types,
    )
    trainer.baselines = measure_baselines(data_module, partial(over_ranks, accelerator=trainer.accelerator))
    _require_known_metric(trainer)
    return trainer


def _require_known_metric(trainer: ScGPTTrainer) -> None:
    """Raise unless validation measures `metric_for_best_model`. The library would look it up only after an epoch."""
    wanted = (trainer.args.metric_for_best_model or "loss").removeprefix("eval_")
    known = list(trainer.metrics_from_sums([0.0] * (2 * len(trainer.terms) + 1)))
    if trainer.cell_types is not None:
        known += trainer.cell_types.names
    if wanted not in known:
        raise ValueError(f"metric_for_best_model is {wanted!r}; validation measures {', '.join(known)}")


def _build_config(
    model: ModelSettings,
    processor: ScGPTProcessor,
    domains: list[str],
    batch_key: str | None,
    classes: Sequence[str] = (),
) -> ScGPTConfig:
    """Return the configuration of a new model.

    Raises:
        ValueError: the settings do not fit together. The message names the field.
    """
    fields: dict[str, Any] = {name: value for name, value in asdict(model).items() if value is not None}
    if classes:
        fields |= {"id2label": dict(enumerate(classes)), "label2id": {name: at for at, name in enumerate(classes)}}
    try:
        return ScGPTConfig(
            **fields,
            vocab_size=processor.vocab_size,
            pad_token_id=processor.pad_id,
            n_bins=processor.n_bins,
            n_domains=len(domains),
            domains=domains,
            batch_key=batch_key,
            modalities=processor.modality_names,
        )
    except StrictDataclassError as error:
        raise ValueError(f"the model's settings do not fit together: {error.__cause__ or error}") from error
