"""Train a perturbation model: from a screen, and optionally a pretrained checkpoint, to a run folder.

`cells.py` reads the screen, `splits.py` holds conditions out, `stream.py` makes the examples, and the trainer below
keeps the checkpoint that predicts the held-out training conditions best.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import set_seed

from scgpt_hf.cells.block import Int64Array
from scgpt_hf.cells.selection.gene_vectors import gene_vectors
from scgpt_hf.cells.source import Address
from scgpt_hf.model.configuration_scgpt import ScGPTConfig
from scgpt_hf.model.modeling_scgpt import ScGPTForPerturbation
from scgpt_hf.perturbation.batches import nameless_id
from scgpt_hf.perturbation.cells import Screen, read_screen
from scgpt_hf.perturbation.conditions import parse_condition, require_genes
from scgpt_hf.perturbation.effects import predict_effect, spread_over_batches
from scgpt_hf.perturbation.evaluation.metrics import pearson
from scgpt_hf.perturbation.gene_names import add_genes, lacking_genes, match_screen_genes, vocabulary_of_screen
from scgpt_hf.perturbation.pseudobulk import halve
from scgpt_hf.perturbation.settings import PerturbationSettings
from scgpt_hf.perturbation.splits import ConditionSplit, split_conditions
from scgpt_hf.perturbation.stream import ExampleStream, TrainingCells
from scgpt_hf.pipeline.loader import StreamLoader
from scgpt_hf.pretrained import load_pretrained
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.finetuning.run_folder import save_inputs, save_results
from scgpt_hf.training.finetuning.settings import training_settings
from scgpt_hf.training.library_trainer import LibraryTrainer
from scgpt_hf.training.run_folder import MetricsFile, own_run_folder, require_new_folder
from scgpt_hf.training.settings import TrainingSettings
from scgpt_hf.training.summary import device_name, training_of

logger = logging.getLogger(__name__)

TASK = "perturb"
_VALIDATION_CONTROLS = 8  # control cells per condition of a validation: a prediction varies little between cells
_MOST_VECTORS = 64  # components of the gene vectors that come from the data; the others stay equal for all genes


def finetune_perturbation(data: Address, settings: PerturbationSettings) -> dict[str, Any]:
    """Train a model to predict what perturbations do, and write a run folder.

    Each control cell is turned into itself plus the mean difference that a perturbation makes (`target`
    "pseudobulk"), or into the perturbed cell that it is paired with ("cell"). Some training conditions are held out to
    choose the best checkpoint. The conditions of the split's test part, and a part of the control cells, are used by
    `evaluate_perturbation` only.

    Args:
        data: a screen with raw counts: an AnnData, or files; genes by Ensembl id or symbol.
        settings: see `PerturbationSettings`.

    Returns:
        The content of summary.json: cells, conditions of each part, the validation of the best checkpoint.

    Raises:
        FileExistsError: the run folder is not empty, or another run is writing to it.
        OSError: the model or a file does not exist.
        ValueError: data, conditions, split or model cannot be used. The message names what was found and what to do.

    Example:
        >>> settings = PerturbationSettings(out="runs/crispr", batch_key="replicate")
        >>> summary = finetune_perturbation("screen.h5ad", settings)  # doctest: +SKIP
        >>> predict_perturbation(adata, ["STAT1+ctrl"], "runs/crispr/best_model")  # doctest: +SKIP
    """
    with own_run_folder(Path(settings.out)):
        return _finetune(data, settings)


def _finetune(data: Address, settings: PerturbationSettings) -> dict[str, Any]:
    """Do what `finetune_perturbation` describes, in a folder that no other run writes to."""
    started = time.perf_counter()
    folder = Path(settings.out)
    require_new_folder(folder, "--out")
    screen = read_screen(
        data,
        settings.columns,
        layer=settings.layer,
        round_counts=settings.round_counts,
        target_sum=settings.target_sum,
    )
    split = split_conditions(
        sorted({name for name, _ in screen.items}),
        settings.split,
        test_fraction=settings.test_fraction,
        held_out=settings.held_out,
        validation_fraction=settings.validation_fraction,
        seed=settings.seed,
    )
    parts = rows_of_parts(screen, split, settings)
    set_seed(settings.seed)
    model, processor, new = make_model(screen, split, parts["train"], settings)
    genes = match_screen_genes(screen.genes, processor)
    conditions = [parse_condition(name) for name, _ in screen.items]
    try:  # before training: an unknown gene is an error of the input
        require_genes(chain.from_iterable(conditions), genes.id_of_name.keys(), "the model")
    except ValueError as error:  # a new model knows all genes of its screen
        raise ValueError(f"{error}. --add_genes adds the genes that a pretrained model lacks") from error
    for condition in conditions:
        genes.target_ids(condition)
    controls = parts["train"][screen.conditions[parts["train"]] == "ctrl"]
    cells = TrainingCells.of(screen, genes, split.train, controls)
    args = _make_arguments(settings, has_validation=bool(split.validation))
    trainer = PerturbationTrainer(
        cells=cells,
        validation=TrainingCells.of(screen, genes, split.validation, controls),
        processor=processor,
        settings=settings,
        model=model,
        args=args,
        callbacks=[MetricsFile(folder)],
    )
    ids = {part: np.sort(screen.cell_ids[rows]) for part, rows in parts.items()}
    recorded: dict[str, Any] = {"conditions": split.to_json(), "target_sum": screen.target_sum}
    save_inputs(folder, screen.source, ids, None, settings, recorded)
    trainer.train()
    summary = _summarize(trainer, screen, split, parts, settings)
    summary |= {"new": new, "seconds": round(time.perf_counter() - started, 1)}
    if trainer.is_world_process_zero():
        save_results(folder, trainer.accelerator.unwrap_model(trainer.model), processor, summary)
    return summary


def _summarize(
    trainer: "PerturbationTrainer",
    screen: Screen,
    split: ConditionSplit,
    parts: dict[str, Int64Array],
    settings: PerturbationSettings,
) -> dict[str, Any]:
    """Return the content of summary.json, without the time that the run took."""
    validations = [line for line in trainer.state.log_history if "eval_loss" in line]
    n_seen = len(trainer.cells.controls)
    return {
        "task": TASK,
        "model": settings.model or None,
        **{f"{part}_cells": len(rows) for part, rows in parts.items()},
        "control_cells": {"seen": n_seen, "held_out": len(screen.controls) - n_seen},
        "conditions": split.to_json(),
        "contexts": sorted(set(screen.contexts.tolist())),
        "batches": len(set(screen.batches.tolist())),
        "target_sum": screen.target_sum,
        "columns": vars(settings.columns),
        "genes": len(trainer.processor.genes),
        "coverage": trainer.cells.genes.coverage,
        "parameters": trainer.model.num_parameters(),
        **training_of(trainer),
        "best": min(validations, key=lambda line: line["eval_loss"]) if validations else None,
        "epochs": trainer.state.epoch,
        "steps": trainer.state.global_step,
        "device": device_name(trainer.args.device),
        "data": screen.source.describe(),
    }


def rows_of_parts(screen: Screen, split: ConditionSplit, settings: PerturbationSettings) -> dict[str, Int64Array]:
    """Return the rows of the cells of each part: "train", "validation" and "test".

    Control cells that the model may see are in "train", the others in "test". If nothing is tested, all are in "train".
    """
    seen = screen.controls
    if split.test:
        seen, _ = split_controls(screen, settings.control_fraction, settings.seed)
    rows = {
        "train": np.concatenate([np.flatnonzero(np.isin(screen.conditions, split.train)), seen]),
        "validation": np.flatnonzero(np.isin(screen.conditions, split.validation)),
        "test": np.concatenate(
            [np.flatnonzero(np.isin(screen.conditions, split.tested)), np.setdiff1d(screen.controls, seen)]
        ),
    }
    return {part: np.sort(one).astype(np.int64) for part, one in rows.items() if len(one)}


def split_controls(screen: Screen, fraction: float, seed: int) -> tuple[Int64Array, Int64Array]:
    """Return the control cells that a model may see, and those for the truth, the same share of each batch.

    Every batch keeps a control cell on both sides.

    Raises:
        ValueError: a batch has a single control cell.
    """
    if fraction == 0.5:
        one, other = halve(screen.controls, screen.batches, seed)
    else:
        rng = np.random.default_rng(seed)
        shuffled = [rng.permutation(_controls_of(screen, batch)) for batch in np.unique(screen.batches)]
        firsts = [rows[: min(max(1, round(fraction * len(rows))), len(rows) - 1)] for rows in shuffled]
        one = np.sort(np.concatenate(firsts))
        other = np.setdiff1d(screen.controls, one)
    perturbed = np.unique(screen.batches[screen.conditions != "ctrl"])
    for side in (one, other):
        if len(lacking := np.setdiff1d(perturbed, screen.batches[side])):
            raise ValueError(
                f"batch {str(lacking[0])!r} has too few control cells to keep some of them for the evaluation; choose "
                "a coarser batch_key, or train on everything (split 'none')"
            )
    return one, other


def _controls_of(screen: Screen, batch: str) -> Int64Array:
    rows: Int64Array = screen.controls[screen.batches[screen.controls] == batch]
    return rows


def make_model(
    screen: Screen, split: ConditionSplit, train_rows: Int64Array, settings: PerturbationSettings
) -> tuple[Any, ScGPTProcessor, list[str]]:
    """Return the model to train, its processor, and the names of its parts that have new weights."""
    recorded: dict[str, Any] = {
        "perturbation_sum": settings.perturbation_sum,
        "batch_key": settings.batch_key,
        "total_key": settings.total_key,
        "loss_weights": {"gep": 1.0},
    }
    targets = sorted({gene for name, _ in screen.items for gene in parse_condition(name)})
    if settings.model:
        model, processor, new = load_pretrained(
            settings.model, ScGPTForPerturbation, domain_embedding=False, domain_head=False, **_plain(recorded)
        )
        values = {"input_style": "log1p", "include_zeros": True, "target_sum": screen.target_sum}
        if processor.input_style != "log1p":
            logger.warning("the pretrained model read %s values, this one reads log1p values", processor.input_style)
        for name, value in values.items():
            setattr(processor, name, value)
        if settings.add_genes:
            names, symbols = lacking_genes(screen.genes, targets, processor)
            processor = add_genes(model, processor, names, symbols)
            logger.info("added %d genes that the pretrained model lacks, e.g. %s", len(names), names[:5])
        return model, processor, new
    names, symbols = vocabulary_of_screen(screen.genes, targets)
    processor = ScGPTProcessor.from_genes(
        names,
        symbols=symbols,
        input_style="log1p",
        include_zeros=True,
        target_sum=screen.target_sum,
        pad_value=0.0,
        max_tokens=len(names) + 1,
    )
    sizes = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "dropout")
    config = ScGPTConfig(
        vocab_size=processor.vocab_size,
        pad_token_id=processor.pad_id,
        **{name: getattr(settings, name) for name in sizes},
        **recorded,
    )
    model = ScGPTForPerturbation(config)
    start_gene_vectors(model, processor, screen, train_rows, settings.seed)
    return model, processor, ["all"]


def _plain(recorded: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a pretrained config that a perturbation model changes."""
    plain = {"objective": "masked", "leave_out_masked": False, "explicit_zero_prob": False}
    return recorded | plain | {"domains": [], "n_domains": 0}


@torch.no_grad()
def start_gene_vectors(
    model: ScGPTForPerturbation, processor: ScGPTProcessor, screen: Screen, rows: Int64Array, seed: int
) -> None:
    """Let the gene vectors of a new model start from the correlations between genes over the training cells.

    Genes that the screen did not measure start at one common vector, the same as a hidden name: nothing is known of
    them before their perturbation is seen.
    """
    genes = match_screen_genes(screen.genes, processor)
    table = model.scgpt.gene_encoder.embedding.weight
    common = torch.randn(table.shape[1], generator=torch.Generator().manual_seed(seed))
    table[:] = common
    size = min(table.shape[1], _MOST_VECTORS)
    found = gene_vectors(screen.source, np.sort(screen.cell_ids[rows]), genes.columns, size, seed=seed)
    measured = np.flatnonzero(found.any(axis=1))
    vectors = torch.from_numpy(found[measured] / found[measured].std()).to(table.dtype)
    table[torch.from_numpy(genes.ids[measured]), : vectors.shape[1]] = vectors
    table[nameless_id(processor)] = common


def _make_arguments(settings: PerturbationSettings, *, has_validation: bool) -> TrainingSettings:
    """Return the trainer's arguments. Creating them connects the processes of a run."""
    strategy = "epoch" if has_validation else "no"
    return training_settings(
        settings,
        num_train_epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        weight_decay=settings.weight_decay,
        warmup_steps=0.05,
        eval_strategy=strategy,
        save_strategy="best" if has_validation else "no",
        load_best_model_at_end=has_validation,
    )


class PerturbationTrainer(LibraryTrainer):
    """Trains a perturbation model, and validates it on the effects of conditions that it was not trained on."""

    def __init__(
        self,
        *,
        cells: TrainingCells,
        validation: TrainingCells,
        processor: ScGPTProcessor,
        settings: PerturbationSettings,
        **trainer_arguments: Any,
    ) -> None:
        """Create the trainer.

        Args:
            cells: the training cells.
            validation: the conditions that choose the checkpoint, with the same controls; may have no items.
            processor: processor of the model.
            settings: settings of the run.
            trainer_arguments: arguments of `transformers.Trainer`; at least model and args.
        """
        super().__init__(**trainer_arguments)
        self.cells, self.validation, self.processor = cells, validation, processor
        rank, world_size = self.args.process_index, self.args.world_size
        stream = ExampleStream(cells, processor, self.model.config, settings, rank, world_size)
        ends = [stream.steps_per_epoch * (epoch + 1) for epoch in range(settings.epochs)]
        self.loader = StreamLoader(stream.batches, ends)
        self.seed = settings.seed

    @contextmanager
    def training_context(self) -> Iterator[None]:
        """Stop the reading threads at the end of `train`, also after an error."""
        with closing(self.loader):
            yield

    def validation_metrics(self) -> dict[str, float]:
        """Return the error of the predicted effects of the validation conditions, and how they correlate.

        `loss` is the squared error divided by that of predicting no change; `pearson_delta` is a mean over conditions.

        Raises:
            FloatingPointError: the loss is not finite: the run has diverged.
        """
        cells, model = self.validation, self.accelerator.unwrap_model(self.model)
        errors, sizes, correlations = 0.0, 0.0, []
        for item in cells.items:
            delta = cells.deltas[item]
            of_context = cells.controls[cells.screen.contexts[cells.controls] == item[1]]
            rows = spread_over_batches(of_context, cells.screen.batches, _VALIDATION_CONTROLS, self.seed)
            targets = cells.genes.target_ids(parse_condition(item[0]))
            found = predict_effect(model, self.processor, cells.screen.values, cells.genes, rows, targets)
            errors += float(np.square(found - delta).sum())
            sizes += float(np.square(delta).sum())
            correlations.append(pearson(found, delta))
        loss = errors / sizes if sizes else 0.0
        if not np.isfinite(loss):
            raise FloatingPointError(f"the validation loss is {loss}; lower --learning_rate")
        known = [one for one in correlations if np.isfinite(one)]
        return {"loss": loss, "pearson_delta": float(np.mean(known)) if known else 0.0}
