"""Train a classifier on labelled cells: from a pretrained checkpoint and an AnnData to a run folder.

`labels.py` selects the cells, `contradictions.py` finds probable mistakes among their labels, `probe.py` fits a
logistic regression to their embedding, `classifier.py` trains the encoder, too, and `annotation_summary.py` describes
the result.
"""

import logging
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from transformers import EarlyStoppingCallback, set_seed

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.obs import require_named_columns
from scgpt_hf.cells.schedule.epoch import plan_epoch, plan_validation
from scgpt_hf.cells.selection.filters import cells_expressing
from scgpt_hf.cells.source import Address, CellSource, open_source
from scgpt_hf.inference import embed_cells, iterate_outputs
from scgpt_hf.model.modeling_scgpt import ScGPTForSequenceClassification
from scgpt_hf.pipeline.genes import GeneMatch, match_source_genes
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.pretrained import domain_classes, load_pretrained, load_processor
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.finetuning.annotation_summary import describe_cells, describe_scores
from scgpt_hf.training.finetuning.calibration import Logits, fit_temperature
from scgpt_hf.training.finetuning.classifier import ClassifierTrainer, agreement, macro_f1_gain
from scgpt_hf.training.finetuning.contradictions import find_contradicted
from scgpt_hf.training.finetuning.gene_baseline import score_genes
from scgpt_hf.training.finetuning.labels import LabelledCells, balanced_weights, keep_share, select_labelled
from scgpt_hf.training.finetuning.probe import Probe, fit_probe
from scgpt_hf.training.finetuning.run_folder import save_inputs, save_results
from scgpt_hf.training.finetuning.settings import AnnotateSettings, training_settings
from scgpt_hf.training.run_folder import MetricsFile, own_run_folder, require_new_folder
from scgpt_hf.training.selection import composition_of
from scgpt_hf.training.settings import TrainingSettings
from scgpt_hf.training.summary import device_name, training_of

logger = logging.getLogger(__name__)

# The layers' number is part of the pattern because the value encoder has a linear1 and a linear2, too.
LORA_LAYERS = r".*\.layers\.\d+\.(self_attn\.(qkv_proj|out_proj)|linear1|linear2)"


@dataclass(frozen=True, eq=False)
class AnnotationRun:
    """The inputs that the steps of a run share.

    Attributes:
        settings: the settings of the user.
        args: the trainer's arguments, which know the device and the processes.
        source: source of the cells.
        processor: processor of the pretrained model.
        genes: how the genes of the source match its vocabulary.
        cells: the labelled cells, split into training and held-out cells.
    """

    settings: AnnotateSettings
    args: TrainingSettings
    source: CellSource
    processor: ScGPTProcessor
    genes: GeneMatch
    cells: LabelledCells


@dataclass(frozen=True, eq=False)
class Classifier:
    """A model with the logits that it is judged by.

    Attributes:
        name: "probe", "lora" or "full".
        model: the model, calibrated.
        logits: calibrated logits of the held-out cells. Shape (cells, classes).
        temperature: the temperature by which the logits were divided.
    """

    name: str
    model: Any
    logits: Logits
    temperature: float


def finetune_classifier(data: Address, settings: AnnotateSettings) -> dict[str, Any]:
    """Train a classifier on a pretrained encoder, and write a run folder.

    The probe, a logistic regression on the frozen cell embedding, is always fitted first. It is a class head with one
    linear layer. Cells whose label their neighbors contradict are left out of it (`leave_out_contradicted`), and the
    summary counts them by label. With `train` "lora" or "full", training continues from it, and the result is kept only
    if macro-F1 on the held-out cells rises by more than its standard error.

    `best_model` in the run folder is the model that was kept. Its config holds the labels, and its confidence is
    calibrated: the temperature is divided into the class head, so that the softmax of the logits is the confidence
    wherever the model is loaded.

    The held-out cells are scored with a probe that was fitted and calibrated without them. If the probe is kept, the
    one that is saved is then fitted to training and held-out cells (`refit`). With "lora" and "full", epoch and
    temperature are chosen on the held-out cells, so the scores of such a model are slightly too good.

    Args:
        data: labelled cells with raw counts: an AnnData, .h5ad files or a SOMA; genes by Ensembl id or symbol.
        settings: see `AnnotateSettings`.

    Returns:
        The content of summary.json: cells, labels, which model was `kept`, its scores beside those of the probe and of
        baselines, calibration.

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
    if settings.train == "lora":
        _import_peft()
    source = open_source(data, layer=settings.layer, primary_only=False, round_counts=settings.round_counts)
    processor = load_processor(settings.model)
    genes = match_source_genes(source.genes, processor)
    cells = _select_cells(source, genes, settings)
    run = AnnotationRun(settings, _make_arguments(settings, cells), source, processor, genes, cells)
    model = _load_classifier(run)
    save_inputs(folder, source, cells.parts, cells.donor_key, settings, {"labels": cells.class_names})
    embedding = _embed_labelled(run, model)
    kept, scores, facts = _choose(run, model, embedding)
    baseline = score_genes(source, cells) if settings.gene_baseline and run.args.process_index == 0 else None
    saved = _refit(run, kept.model, embedding) if kept.name == "probe" and settings.refit else {}
    summary = {
        "task": "annotate",
        "model": settings.model,
        **describe_cells(source, cells, settings),
        "kept": kept.name,
        **scores,
        "gene_baseline": baseline,
        **saved,
        **describe_scores(cells, kept.logits, kept.temperature),
        "genes": len(processor.genes),
        "composition": composition_of(source, cells.parts),
        **facts,
        "seconds": round(time.perf_counter() - started, 1),
    }
    if run.args.process_index == 0:
        save_results(folder, kept.model, processor, summary)
    return summary


def _select_cells(source: CellSource, genes: GeneMatch, settings: AnnotateSettings) -> LabelledCells:
    """Return the labelled cells that express a gene of the vocabulary, split into training and validation."""
    donor_key = settings.donor_key
    require_named_columns({"--labels_key": settings.labels_key, "--donor_key": donor_key}, source.obs_columns)
    donors = [donor_key or "donor_id"] if donor_key or "donor_id" in source.obs_columns else []
    obs = source.obs(list(dict.fromkeys([settings.labels_key, *donors])))
    known = np.flatnonzero(genes.gene_ids >= 0)
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


def _make_arguments(settings: AnnotateSettings, cells: LabelledCells) -> TrainingSettings:
    """Return the trainer's arguments. Creating them connects the processes of a run."""
    return training_settings(
        settings,
        per_device_train_batch_size=min(settings.batch_size, len(cells.parts["train"])),
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        warmup_steps=0.1,
        metric_for_best_model="eval_macro_f1",
        greater_is_better=True,
    )


def _load_classifier(run: AnnotationRun) -> Any:
    """Return the pretrained model with a linear class head for the labels, whose weights are not set yet."""
    labels = run.cells.class_names
    model, _, _ = load_pretrained(
        run.settings.model,
        ScGPTForSequenceClassification,
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
        problem_type="single_label_classification",
        class_head_layers=1,
    )
    logger.info("loaded %s", run.settings.model)
    return model.to(run.args.device)  # type: ignore[arg-type]


def _embed_labelled(run: AnnotationRun, model: Any) -> pd.DataFrame:
    """Return the embedding of each labelled cell as `embed_cells` computes it, not normalized; indexed by cell id.

    Every process embeds all cells: the probe is then the same on all of them.
    """
    started = time.perf_counter()
    ids = np.sort(np.concatenate(list(run.cells.parts.values())))
    progress = run.args.process_index == 0 and not run.settings.disable_tqdm
    vectors = embed_cells(
        run.source, ids, model, run.processor, gene_match=run.genes, normalize=False, progress=progress
    )
    logger.info("embedded %d cells in %.1f s", len(ids), time.perf_counter() - started)
    return pd.DataFrame(vectors, index=ids)


def _choose(
    run: AnnotationRun, model: Any, embedding: pd.DataFrame
) -> tuple[Classifier, dict[str, Any], dict[str, Any]]:
    """Fit the probe, train on if the settings say so, and return the better classifier.

    Returns:
        The classifier; the scores of the probe and of the trained model; what the summary records about the training.
    """
    started = time.perf_counter()
    held_out, classes = run.cells.parts["validation"], run.cells.classes("validation")
    probe, facts = _fit_probe(run, embedding, run.cells.parts["train"])
    _install(model, probe)
    kept = Classifier("probe", model, probe.logits(embedding.loc[held_out].to_numpy()), probe.temperature)
    facts["seconds"] = round(time.perf_counter() - started, 1)
    scores = {"probe": {**agreement(classes, kept.logits.argmax(axis=1)), **facts}}
    logger.info("probe on the frozen embedding: %s", scores["probe"])
    facts = {"device": device_name(run.args.device), "processes": run.args.world_size}
    if run.settings.train == "probe":
        return kept, scores, {**facts, "precision": "fp32", "trained_parameters": probe.weight.size + probe.bias.size}
    tuned, facts = _fine_tune(run, model)
    gain, error = macro_f1_gain(classes, kept.logits.argmax(axis=1), tuned.logits.argmax(axis=1), run.settings.seed)
    scores["fine_tuned"] = {**agreement(classes, tuned.logits.argmax(axis=1)), "gain": gain, "standard_error": error}
    better = gain > error
    logger.info(
        "%s of --train %s: macro-F1 on held-out cells changes by %+.3f (standard error %.3f)",
        *("kept the model" if better else "kept the probe, not the model", run.settings.train, gain, error),
    )
    if better:
        return tuned, scores, facts
    kept = replace(kept, model=_load_classifier(run))  # training has changed the encoder
    _install(kept.model, probe)
    return kept, scores, facts


def _fit_probe(run: AnnotationRun, embedding: pd.DataFrame, ids: Int64Array) -> tuple[Probe, dict[str, Any]]:
    """Return the probe of some labelled cells, and what the summary records about it."""
    key, settings = run.cells.donor_key, run.settings
    names = np.array(run.cells.class_names)
    contradicted: dict[str, int] = {}
    if settings.leave_out_contradicted:
        leave_out = find_contradicted(embedding.loc[ids].to_numpy(), run.cells.classes_of(ids), seed=settings.seed)
        labels, sizes = np.unique(names[run.cells.classes_of(ids[leave_out])], return_counts=True)
        contradicted = dict(zip(labels.tolist(), sizes.tolist(), strict=True))
        ids = ids[~leave_out]
    if contradicted:
        logger.warning(
            "the probe leaves out %d cells that are most similar to cells of other labels: %s "
            "(--leave_out_contradicted false keeps them)",
            *(sum(contradicted.values()), contradicted),
        )
    probe = fit_probe(
        embedding.loc[ids].to_numpy(),
        run.cells.classes_of(ids),
        None if key is None else run.source.obs([key])[key].reindex(ids).astype(object).to_numpy(),
        balanced=settings.class_weights == "balanced",
        seed=settings.seed,
    )
    return probe, {"cells": len(ids), "contradicted": contradicted, "C": probe.strength}


def _refit(run: AnnotationRun, model: Any, embedding: pd.DataFrame) -> dict[str, Any]:
    """Fit the probe to training and held-out cells, set it as the class head, and return what the summary says."""
    cells = run.cells
    added = keep_share(
        cells.label_of_cell.reindex(cells.parts["validation"]), run.settings.label_fraction, run.settings.seed
    )
    ids = np.sort(np.concatenate([cells.parts["train"], added]))
    probe, facts = _fit_probe(run, embedding, ids)
    _install(model, probe)
    return {"refit": {**facts, "temperature": probe.temperature}}


@torch.no_grad()
def _install(model: Any, probe: Probe) -> None:
    """Set the class head to the probe: the logits of the model are those of the probe."""
    model.class_head.out.weight.copy_(torch.from_numpy(probe.weight))
    model.class_head.out.bias.copy_(torch.from_numpy(probe.bias))


def _fine_tune(run: AnnotationRun, model: Any) -> tuple[Classifier, dict[str, Any]]:
    """Train the model on the training cells, and calibrate it on the held-out cells.

    Returns:
        The classifier of the best epoch, and what the summary records about the training.
    """
    set_seed(run.settings.seed)
    lora = run.settings.train == "lora"
    trainer = _make_trainer(run, _add_lora(model, run.settings.lora_rank) if lora else model)
    trainer.train()
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    facts = {
        "trained_parameters": trained.num_parameters(only_trainable=True),
        **training_of(trainer),
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
    }
    trained = trained.merge_and_unload() if lora else trained
    held_out = run.cells.parts["validation"]
    logits = np.empty((len(held_out), len(run.cells.class_names)), np.float32)
    # In full precision and with the tokens of prediction, as the saved model will be used.
    outputs = iterate_outputs(
        lambda batch: trained(**batch).logits.float(),
        run.source,
        held_out,
        trained,
        run.processor,
        gene_match=run.genes,
        progress=False,
    )
    for positions, rows in outputs:
        logits[positions] = rows
    temperature = fit_temperature(logits, run.cells.classes("validation"))
    with torch.no_grad():  # from now on the model itself returns logits / temperature
        for weight in trained.class_head.out.parameters():
            weight /= temperature
    return Classifier(run.settings.train, trained, logits / temperature, temperature), facts


def _add_lora(model: Any, rank: int) -> Any:
    """Return the model with low-rank updates of its encoder, which are trained together with the class head."""
    peft = _import_peft()
    lora = peft.LoraConfig(
        task_type="SEQ_CLS", r=rank, lora_alpha=2 * rank, target_modules=LORA_LAYERS, modules_to_save=["class_head"]
    )
    return peft.get_peft_model(model, lora)


def _import_peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ImportError("--train lora needs peft: pip install peft, or choose --train probe or full") from error
    return peft


def _make_trainer(run: AnnotationRun, model: Any) -> ClassifierTrainer:
    """Return the trainer with its epochs planned. Nothing is read or written yet."""
    settings, args, cells = run.settings, run.args, run.cells
    classes = {label: index for index, label in enumerate(cells.class_names)}
    # Every process validates all cells, with the tokens that cells are predicted with.
    validation_config = StreamConfig(
        seed=settings.seed,
        ties="midpoint",
        key_by="content",
        padded=bool(model.config.padding_dependent_settings),
        categories={"labels": (settings.labels_key, classes), **domain_classes(model.config)},
    )
    train_config = replace(
        validation_config, rank=args.process_index, world_size=args.world_size, ties=None, key_by="cell_id"
    )
    batch_size = args.per_device_train_batch_size * args.world_size
    order = {"seed": settings.seed, "batch_size": batch_size, "chunk_size": run.source.chunk_size}
    plans = [plan_epoch(cells.parts["train"], epoch=epoch, **order) for epoch in range(settings.epochs)]
    validation_plan = plan_validation(cells.parts["validation"], args.per_device_eval_batch_size)
    validation = stream_cells(run.source, [validation_plan], run.processor, validation_config)
    weights = balanced_weights(cells.classes("train"), len(cells.class_names))
    return ClassifierTrainer(
        model=model,
        args=args,
        callbacks=[MetricsFile(Path(settings.out)), EarlyStoppingCallback(settings.patience)],
        train_stream=lambda consumed: stream_cells(run.source, plans, run.processor, train_config, start_step=consumed),
        epoch_ends=[plans[0].n_steps * (epoch + 1) for epoch in range(settings.epochs)],
        validation_stream=lambda: validation,
        class_weights=torch.from_numpy(weights if settings.class_weights == "balanced" else np.ones_like(weights)),
    )
