"""Fine-tuning a class head on labelled cells: from a pretrained checkpoint and an AnnData to a run folder.

Which cells teach is decided in `labels.py`, how weights change in `classifier.py`, what the confidence is worth in
`calibration.py`. What every fine-tuning run does with its folder is here too, for `integration.py`.
"""

import logging
import os
import shutil
import time
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from scipy.special import softmax
from sklearn.metrics import confusion_matrix
from transformers import EarlyStoppingCallback, PreTrainedModel, set_seed

from scgpt_hf.cells.schedule.epoch import plan_epoch, plan_validation
from scgpt_hf.cells.selection.filters import cells_expressing
from scgpt_hf.cells.selection.splits import save_split
from scgpt_hf.cells.source import Address, CellSource, open_source
from scgpt_hf.model.modeling_scgpt import ScGPTForSequenceClassification
from scgpt_hf.pipeline.genes import match_columns
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.pretrained import domain_classes, load_pretrained, load_processor
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.finetuning.calibration import Logits, calibration_error, fit_temperature, reliability
from scgpt_hf.training.finetuning.classifier import ClassifierTrainer, agreement, score
from scgpt_hf.training.finetuning.labels import LabelledCells, balanced_weights, choose_labelled
from scgpt_hf.training.finetuning.settings import AnnotateSettings, FinetuneSettings, training_settings
from scgpt_hf.training.provenance import composition_of, training_of
from scgpt_hf.training.run_folder import BEST_MODEL, SETTINGS, SPLIT, SUMMARY, MetricsFile, write_json, write_whole

logger = logging.getLogger(__name__)

# The value encoder has a linear1 and a linear2 too; the encoder's layers are told by their number.
LORA_LAYERS = r".*\.layers\.\d+\.(self_attn\.(qkv_proj|out_proj)|linear1|linear2)"


def finetune_classifier(data: Address, settings: AnnotateSettings) -> dict[str, Any]:
    """Train a class head on a pretrained encoder and write a run folder; return what its summary.json says.

    The folder's `best_model` is the model of the epoch with the highest macro-F1 on held-out cells, its labels in the
    config and its confidence calibrated: the temperature is divided into the last layer of the head, so the softmax of
    its logits is the confidence wherever it is loaded. Both are chosen on the held-out cells, so the scores on these
    are a little too good; judge the model on cells it was never given.

    Args:
        data: labelled cells with raw counts: an AnnData, .h5ad files, a SOMA; genes by Ensembl id or symbol.
        settings: see `AnnotateSettings`.

    Raises:
        FileExistsError: the run folder holds something.
        ImportError: LoRA was asked for, and `peft` is not installed.
        OSError: there is no such model or file.
        ValueError: data, labels or model cannot be used; the message says what was found and what to do.
    """
    started = time.perf_counter()
    folder = require_new_folder(settings.out)
    source = open_source(data, layer=settings.layer, primary_only=False)
    processor = load_processor(settings.model)
    cells = _choose_cells(source, processor, settings)
    set_seed(settings.seed)
    model = _load_classifier(cells.labels, settings)
    trainer = _make_trainer(source, processor, cells, model, settings)
    save_inputs(folder, source, cells.parts, cells.donor_key, settings, {"labels": cells.labels})
    trainer.train()
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    n_trained = trained.num_parameters(only_trainable=True)
    trained = trained.merge_and_unload() if settings.train == "lora" else trained
    logits, classes = trainer.held_out_logits(trained)
    temperature = fit_temperature(logits, classes)
    with torch.no_grad():  # logits / temperature, for everyone who loads the model
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


def require_new_folder(out: str) -> Path:
    """Return the run folder, which must not hold anything yet.

    Raises:
        FileExistsError: it does.
    """
    folder = Path(out)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder} exists already; remove it, or name a new folder with --out")
    return folder


def save_inputs(
    folder: Path,
    source: CellSource,
    parts: dict[str, Any],
    donor_key: str | None,
    settings: FinetuneSettings,
    told: dict[str, Any],
) -> None:
    """Write settings.yaml, and split.json with the cells of each part and what is `told` of them beside the source."""
    folder.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(asdict(settings), sort_keys=False, allow_unicode=True, width=120)
    write_whole(folder / SETTINGS, str(text))
    obs = source.obs([] if donor_key is None else [donor_key])
    record = {**source.describe(), **told}
    save_split(folder / SPLIT, parts, obs, seed=settings.seed, source=record, donor_key=donor_key)


def save_results(folder: Path, model: PreTrainedModel, processor: ScGPTProcessor, summary: dict[str, Any]) -> None:
    """Write best_model, whole or not at all, and summary.json; remove the checkpoints of the way there."""
    beside = folder / f"{BEST_MODEL}.tmp"
    shutil.rmtree(beside, ignore_errors=True)
    model.save_pretrained(beside)
    processor.save_pretrained(beside)
    os.replace(beside, folder / BEST_MODEL)
    versions = {name: version(name) for name in ("scgpt_hf", "torch", "transformers")}
    write_json(folder / SUMMARY, {**summary, "versions": versions})
    for checkpoint in folder.glob("checkpoint*"):
        shutil.rmtree(checkpoint)


def _choose_cells(source: CellSource, processor: ScGPTProcessor, settings: AnnotateSettings) -> LabelledCells:
    donor_key = settings.donor_key
    donors = [donor_key or "donor_id"] if donor_key or "donor_id" in source.columns else []
    obs = source.obs(list(dict.fromkeys([settings.labels_key, *donors])))
    known = np.flatnonzero(match_columns(source.genes, processor)[0] >= 0)
    obs = obs.loc[cells_expressing(source, obs.index.to_numpy(np.int64), known)]
    return choose_labelled(
        obs,
        settings.labels_key,
        donor_key=donor_key,
        validation_fraction=settings.validation_fraction,
        label_fraction=settings.label_fraction,
        ignore=settings.ignore_labels,
        min_cells=settings.min_cells,
        seed=settings.seed,
    )


def _load_classifier(labels: list[str], settings: AnnotateSettings) -> Any:
    """Return the model with a class head for the labels, and gradients for what shall be trained."""
    config = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: index for index, label in enumerate(labels)},
        "problem_type": "single_label_classification",
    }
    model, _, new = load_pretrained(settings.model, ScGPTForSequenceClassification, **config)
    logger.info("loaded %s; new, with random weights: %s", settings.model, new or "nothing")
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
    """Return the trainer, its data_module planned; nothing is read or written yet."""
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
    stream_config = StreamConfig(
        seed=settings.seed,
        rank=args.process_index,
        world_size=args.world_size,
        padded=bool(model.config.padding_dependent_settings),
        categories={
            "labels": (settings.labels_key, {label: index for index, label in enumerate(cells.labels)}),
            **domain_classes(model.config),
        },
    )
    train, held_out = cells.parts["train"], cells.parts["validation"]
    keywords = {"seed": settings.seed, "batch_size": batch_size * args.world_size, "chunk_size": source.chunk_size}
    plans = [plan_epoch(train, epoch=epoch, **keywords) for epoch in range(settings.epochs)]
    plan = plan_validation(held_out, args.per_device_eval_batch_size)
    # Ties as in inference, and every rank validates all cells.
    validation_config = replace(stream_config, rank=0, world_size=1, ties="midpoint")
    validated = stream_cells(source, [plan], processor, validation_config)
    weights = balanced_weights(cells.classes("train"), len(cells.labels))
    return ClassifierTrainer(
        model=model,
        args=args,
        callbacks=[MetricsFile(Path(settings.out)), EarlyStoppingCallback(settings.patience)],
        train_stream=lambda consumed: stream_cells(source, plans, processor, stream_config, start_step=consumed),
        epoch_ends=[plans[0].n_steps * (epoch + 1) for epoch in range(settings.epochs)],
        validation_stream=lambda: validated,
        class_weights=torch.from_numpy(weights if settings.class_weights == "balanced" else np.ones_like(weights)),
    )


def _describe_cells(source: CellSource, cells: LabelledCells, settings: AnnotateSettings) -> dict[str, Any]:
    """Return how many cells of each label were learned from and held out, and which were left out."""
    n_cells = {part: np.bincount(cells.classes(part), minlength=len(cells.labels)).tolist() for part in cells.parts}
    donors = {}
    if cells.donor_key is not None:
        by = source.obs([cells.donor_key])[cells.donor_key]
        donors = {f"{part}_donors": int(by.reindex(ids).nunique()) for part, ids in cells.parts.items()}
    return {
        "labels_key": settings.labels_key,
        "train": settings.train,
        "held_out": "cells" if cells.donor_key is None else cells.donor_key,
        **{f"{part}_cells": len(ids) for part, ids in cells.parts.items()},
        **donors,
        "labels": {
            label: dict(zip(n_cells, counts, strict=True))
            for label, *counts in zip(cells.labels, *n_cells.values(), strict=True)
        },
        "left_out": cells.left_out,
        "rare_labels": cells.rare,
        "data": source.describe(),
    }


def _describe_scores(cells: LabelledCells, logits: Logits, classes: Any, temperature: float) -> dict[str, Any]:
    """Return scores on the held-out cells beside those of always naming the most frequent label."""
    majority = int(np.bincount(cells.classes("train")).argmax())
    predicted = logits.argmax(axis=1)
    before, after = (softmax(scaled, axis=1).max(axis=1) for scaled in (logits, logits / temperature))
    right = predicted == classes
    confusion = confusion_matrix(classes, predicted, labels=range(len(cells.labels)))
    return {
        "validation": score((logits / temperature).astype(np.float32), classes),
        "majority_baseline": {
            "label": cells.labels[majority],
            **agreement(classes, np.full_like(classes, majority)),
        },
        "temperature": temperature,
        "calibration_error": {"before": calibration_error(before, right), "after": calibration_error(after, right)},
        "reliability": reliability(after, right).to_dict("list"),
        "confusion": {"labels": cells.labels, "counts": confusion.tolist()},
    }
