"""Fine-tune a class head on labelled cells: from a pretrained checkpoint and an AnnData to a run folder.

`labels.py` selects the cells, `classifier.py` trains on them, `calibration.py` calibrates the confidence.
"""

import logging
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import softmax
from sklearn.metrics import confusion_matrix
from transformers import EarlyStoppingCallback, set_seed

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.obs import require_named_columns
from scgpt_hf.cells.schedule.epoch import plan_epoch, plan_validation
from scgpt_hf.cells.selection.filters import cells_expressing
from scgpt_hf.cells.source import Address, CellSource, open_source
from scgpt_hf.model.modeling_scgpt import ScGPTForSequenceClassification
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.pretrained import domain_classes, load_pretrained, load_processor
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.finetuning.calibration import Logits, calibration_error, fit_temperature, reliability
from scgpt_hf.training.finetuning.classifier import ClassifierTrainer, agreement, score
from scgpt_hf.training.finetuning.labels import LabelledCells, balanced_weights, select_labelled
from scgpt_hf.training.finetuning.run_folder import save_inputs, save_results
from scgpt_hf.training.finetuning.settings import AnnotateSettings, training_settings
from scgpt_hf.training.run_folder import MetricsFile, own_run_folder, require_new_folder
from scgpt_hf.training.selection import composition_of
from scgpt_hf.training.summary import training_of

logger = logging.getLogger(__name__)

# The layers' number is part of the pattern because the value encoder has a linear1 and a linear2, too.
LORA_LAYERS = r".*\.layers\.\d+\.(self_attn\.(qkv_proj|out_proj)|linear1|linear2)"


def finetune_classifier(data: Address, settings: AnnotateSettings) -> dict[str, Any]:
    """Train a class head on a pretrained encoder, and write a run folder.

    `best_model` in the run folder is the model of the epoch with the highest macro-F1 on the held-out cells. Its config
    holds the labels, and its confidence is calibrated: the temperature is divided into the last layer of the head, so
    that the softmax of the logits is the confidence wherever the model is loaded. Epoch and temperature are both chosen
    on the held-out cells, so the scores on these cells are slightly too good. Judge the model on cells of other donors.

    Args:
        data: labelled cells with raw counts: an AnnData, .h5ad files or a SOMA; genes by Ensembl id or symbol.
        settings: see `AnnotateSettings`.

    Returns:
        The content of summary.json: cells, labels, scores beside those of a majority baseline, calibration.

    Raises:
        FileExistsError: the run folder is not empty, or another run is writing to it.
        ImportError: `train` is "lora", and `peft` is not installed.
        OSError: the model or a file does not exist.
        ValueError: data, labels or model cannot be used. The message names what was found and how to fix it.

    Example:
        >>> settings = AnnotateSettings(model="runs/demo/best_model", out="runs/types", labels_key="cell_type")
        >>> summary = finetune_classifier(adata, settings)  # doctest: +SKIP
        >>> summary["validation"]["macro_f1"]  # doctest: +SKIP
    """
    with own_run_folder(Path(settings.out)):
        return _finetune(data, settings)


def _finetune(data: Address, settings: AnnotateSettings) -> dict[str, Any]:
    """Do what `finetune_classifier` describes, in a folder that no other run writes to."""
    started = time.perf_counter()
    folder = Path(settings.out)
    require_new_folder(folder, "--out")
    source = open_source(data, layer=settings.layer, primary_only=False, round_counts=settings.round_counts)
    processor = load_processor(settings.model)
    cells = _select_cells(source, processor, settings)
    set_seed(settings.seed)
    model = _load_classifier(cells.class_names, settings)
    trainer = _make_trainer(source, processor, cells, model, settings)
    save_inputs(folder, source, cells.parts, cells.donor_key, settings, {"labels": cells.class_names})
    trainer.train()
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    n_trained = trained.num_parameters(only_trainable=True)
    trained = trained.merge_and_unload() if settings.train == "lora" else trained
    logits, classes = trainer.held_out_logits(trained)
    temperature = fit_temperature(logits, classes)
    with torch.no_grad():  # from now on the model itself returns logits / temperature
        for weight in trained.class_head.out.parameters():
            weight /= temperature
    summary = {
        "task": "annotate",
        "model": settings.model,
        **_describe_cells(source, cells, settings),
        "trained_parameters": n_trained,
        **_describe_scores(cells, logits, classes, temperature),
        "genes": len(processor.genes),
        "composition": composition_of(source, cells.parts),
        **training_of(trainer),
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if trainer.is_world_process_zero():
        save_results(folder, trained, processor, summary)
    return summary


def _select_cells(source: CellSource, processor: ScGPTProcessor, settings: AnnotateSettings) -> LabelledCells:
    """Return the labelled cells that express a gene of the vocabulary, split into training and validation."""
    donor_key = settings.donor_key
    require_named_columns({"--labels_key": settings.labels_key, "--donor_key": donor_key}, source.obs_columns)
    donors = [donor_key or "donor_id"] if donor_key or "donor_id" in source.obs_columns else []
    obs = source.obs(list(dict.fromkeys([settings.labels_key, *donors])))
    known = np.flatnonzero(match_source_genes(source.genes, processor)[0] >= 0)
    obs = obs.loc[cells_expressing(source, obs.index.to_numpy(np.int64), known)]
    return select_labelled(
        obs,
        settings.labels_key,
        donor_key=donor_key,
        validation_fraction=settings.validation_fraction,
        label_fraction=settings.label_fraction,
        ignore_labels=settings.ignore_labels,
        min_cells=settings.min_cells,
        seed=settings.seed,
    )


def _load_classifier(labels: list[str], settings: AnnotateSettings) -> Any:
    """Return the model with a class head for the labels; only the weights that are to be trained need gradients."""
    config = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    model, _, new = load_pretrained(settings.model, ScGPTForSequenceClassification, **config)
    logger.info("loaded %s; initialized at random: %s", settings.model, new or "nothing")
    if settings.train == "head":
        model.base_model.requires_grad_(False)
    if settings.train != "lora":
        return model
    try:
        import peft
    except ImportError as error:
        raise ImportError("--train lora needs peft: pip install peft, or choose --train head or full") from error
    rank = settings.lora_rank
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=LORA_LAYERS, modules_to_save=["class_head"]
    )
    return peft.get_peft_model(model, lora)


def _make_trainer(
    source: CellSource, processor: ScGPTProcessor, cells: LabelledCells, model: Any, settings: AnnotateSettings
) -> ClassifierTrainer:
    """Return the trainer with its epochs planned. Nothing is read or written yet."""
    batch_size = min(settings.batch_size, len(cells.parts["train"]))
    args = training_settings(
        settings,
        per_device_train_batch_size=batch_size,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        warmup_steps=0.1,
        metric_for_best_model="eval_macro_f1",
        greater_is_better=True,
    )
    classes = {label: index for index, label in enumerate(cells.class_names)}
    # Every process validates all cells, with the ties that cells are predicted with.
    validation_config = StreamConfig(
        seed=settings.seed,
        ties="midpoint",
        padded=bool(model.config.padding_dependent_settings),
        categories={"labels": (settings.labels_key, classes), **domain_classes(model.config)},
    )
    train_config = replace(validation_config, rank=args.process_index, world_size=args.world_size, ties=None)
    order = {"seed": settings.seed, "batch_size": batch_size * args.world_size, "chunk_size": source.chunk_size}
    plans = [plan_epoch(cells.parts["train"], epoch=epoch, **order) for epoch in range(settings.epochs)]
    validation_plan = plan_validation(cells.parts["validation"], args.per_device_eval_batch_size)
    validation = stream_cells(source, [validation_plan], processor, validation_config)
    weights = balanced_weights(cells.classes("train"), len(cells.class_names))
    return ClassifierTrainer(
        model=model,
        args=args,
        callbacks=[MetricsFile(Path(settings.out)), EarlyStoppingCallback(settings.patience)],
        train_stream=lambda consumed: stream_cells(source, plans, processor, train_config, start_step=consumed),
        epoch_ends=[plans[0].n_steps * (epoch + 1) for epoch in range(settings.epochs)],
        validation_stream=lambda: validation,
        class_weights=torch.from_numpy(weights if settings.class_weights == "balanced" else np.ones_like(weights)),
    )


def _describe_cells(source: CellSource, cells: LabelledCells, settings: AnnotateSettings) -> dict[str, Any]:
    """Return the number of cells of each label and part, and the number of cells that were left out."""
    n_cells = {
        part: np.bincount(cells.classes(part), minlength=len(cells.class_names)).tolist() for part in cells.parts
    }
    donors = {}
    if cells.donor_key is not None:
        donor_of = source.obs([cells.donor_key])[cells.donor_key]
        donors = {f"{part}_donors": int(donor_of.reindex(ids).nunique()) for part, ids in cells.parts.items()}
    return {
        "labels_key": settings.labels_key,
        "train": settings.train,
        "held_out": "cells" if cells.donor_key is None else cells.donor_key,
        **{f"{part}_cells": len(ids) for part, ids in cells.parts.items()},
        **donors,
        "labels": {
            label: dict(zip(n_cells, counts, strict=True))
            for label, *counts in zip(cells.class_names, *n_cells.values(), strict=True)
        },
        "left_out": cells.left_out,
        "rare_labels": cells.rare,
        "data": source.describe(),
    }


def _describe_scores(cells: LabelledCells, logits: Logits, classes: Int64Array, temperature: float) -> dict[str, Any]:
    """Return the scores on the held-out cells, and those of a baseline that always predicts the most frequent label.

    Args:
        cells: training and held-out cells.
        logits: logits of the held-out cells, not calibrated. Shape (cells, classes).
        classes: class ids of the held-out cells. Shape (cells,).
        temperature: calibrates the logits.
    """
    majority = int(np.bincount(cells.classes("train")).argmax())
    predicted = logits.argmax(axis=1)
    before, after = (softmax(scaled, axis=1).max(axis=1) for scaled in (logits, logits / temperature))
    correct = predicted == classes
    confusion = confusion_matrix(classes, predicted, labels=range(len(cells.class_names)))
    return {
        "validation": score((logits / temperature).astype(np.float32), classes),
        "majority_baseline": {
            "label": cells.class_names[majority],
            **agreement(classes, np.full_like(classes, majority)),
        },
        "temperature": temperature,
        "calibration_error": {"before": calibration_error(before, correct), "after": calibration_error(after, correct)},
        "reliability": reliability(after, correct).to_dict("list"),
        "confusion": {"labels": cells.class_names, "counts": confusion.tolist()},
    }
