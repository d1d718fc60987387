"""Pretrain a model: the complete run, from settings to a run folder, in the order in which it happens."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import set_seed

from scgpt_hf.cells.atomic import write_atomically
from scgpt_hf.cells.source import CellSource
from scgpt_hf.model.modeling_scgpt import ScGPTForPreTraining
from scgpt_hf.output import require_writable_folder
from scgpt_hf.publishing.card import model_card
from scgpt_hf.publishing.hub import HubError
from scgpt_hf.publishing.publish_run import check_repository
from scgpt_hf.reporting.run_figures import write_run_figures
from scgpt_hf.reporting.run_scores import score_run_baselines
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.data_module import DataModule
from scgpt_hf.training.dry_run import describe_run
from scgpt_hf.training.fault_tolerance.signals import StopSignal
from scgpt_hf.training.optimization.precision import warn_of_slow_bfloat16
from scgpt_hf.training.optimization.schedules import warn_of_long_warmup
from scgpt_hf.training.optimization.shortcut_start import train_shortcut
from scgpt_hf.training.recipe import (
    build_model,
    build_processor,
    check_settings,
    make_trainer,
    start_at_frequencies,
    start_at_gene_vectors,
    start_at_mean_value,
)
from scgpt_hf.training.run_folder import (
    CARD,
    OnTrainBegin,
    finished_summary,
    own_run_folder,
    save_best_model,
    unsharded_model,
)
from scgpt_hf.training.selection import Selection, open_cells, save_selection, select_or_resume
from scgpt_hf.training.settings import Settings
from scgpt_hf.training.settings_parsing import make_settings
from scgpt_hf.training.summary import RunSummary, format_summary, summarize
from scgpt_hf.training.validation.cell_types import make_cell_type_scorer
from scgpt_hf.training.validation.simple_methods import save_simple_methods

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class PreparedRun:
    """Everything that a run needs before its trainer is made.

    Attributes:
        source: source of the cells.
        selection: cells and genes.
        processor: processor whose vocabulary is the selected genes.
        model: model with new weights.
        data_module: the batches.
        checkpoint: folder of the checkpoint that the run resumes from; None for a new run.
    """

    source: CellSource
    selection: Selection
    processor: ScGPTProcessor
    model: ScGPTForPreTraining
    data_module: DataModule
    checkpoint: str | None


def pretrain(
    settings: Settings | str | Path | None = None,
    *,
    stop_signal: StopSignal | None = None,
    report: Callable[[str], object] = logger.info,
    **changes: Any,
) -> RunSummary | None:
    """Train a model and write a run folder: model, processor, metrics, figures, summary and model card.

    Under `accelerate launch` every process has to call it. It leaves the number of threads of the calling process
    alone; the command line sets that.

    Args:
        settings: a YAML file, the name of a config of the package ("demo", "blood-300k"), or settings from
            `parse_settings`. By default those of the demo.
        stop_signal: saves a checkpoint and stops at the first SIGTERM, SIGUSR1 or SIGINT, as the command line does.
            None leaves the signal handlers of the process alone.
        report: receives the text at the end of the run, on the first process.
        changes: settings by name, which replace those of the file, e.g. `data="cells.h5ad"`; the flags that
            `scgpt-hf pretrain --help` lists.

    Returns:
        The content of summary.json on the first process, None on the others.

    Raises:
        FileExistsError: the run is new, and its folder is not empty; or another run is writing to it.
        FileNotFoundError, ConnectionError: the data or the checkpoint cannot be read.
        ValueError: settings, data or checkpoint cannot be used. The message names what was found and how to fix it.
        FloatingPointError: the run has diverged.
        TrainingInterrupted: `stop_signal` stopped the run, after a checkpoint.
        HubError: the run cannot be published. This is checked before training, too.

    Example:
        >>> from scgpt_hf import pretrain
        >>> run = pretrain(data="cells.h5ad", output_dir="runs/mine", num_train_epochs=3)  # doctest: +SKIP
        >>> run["best"]["eval_gep_mse"], run.model  # doctest: +SKIP
    """
    if not isinstance(settings, Settings):
        settings = make_settings(settings, **changes)
    elif changes:
        raise ValueError(f"pass {sorted(changes)} to parse_settings or make_settings, together with the other settings")
    with own_run_folder(Path(settings.training.output_dir)):
        return _pretrain(settings, stop_signal, report)


def _pretrain(settings: Settings, stop_signal: StopSignal | None, report: Callable[[str], object]) -> RunSummary | None:
    """Do what `pretrain` describes, in a folder that no other run writes to."""
    args, folder = settings.training, Path(settings.training.output_dir)
    is_first = args.process_index == 0

    # 1. Fail early: a run that cannot be written or published should not train first.
    if is_first and settings.data.cache_dir is not None:
        require_writable_folder(settings.data.cache_dir)
    if args.push_to_hub and is_first:
        check_repository(args.hub_model_id, private=args.hub_private_repo, token=args.hub_token)

    # 2. Select cells and genes, build processor and model, plan every epoch.
    run = prepare_run(settings)
    if run.checkpoint and (summary := finished_summary(folder, run.data_module.schedule)):
        logger.info("%s is finished; nothing was changed. To train longer, raise --num_train_epochs", folder)
        return RunSummary(summary, folder) if is_first else None

    # 3. Train. The first files are written when training starts, so that a rejected run leaves no folder.
    cell_types = make_cell_type_scorer(run.source, run.selection, run.data_module, settings)
    trainer = make_trainer(run.data_module, run.model, args, stop_signal, cell_types)
    if is_first and run.checkpoint is None:
        trainer.add_callback(OnTrainBegin(lambda: save_selection(run.selection, run.source, settings)))
    trainer.train(resume_from_checkpoint=run.checkpoint)
    save_best_model(trainer, folder)
    if not is_first:
        return None

    # 4. Describe the run: baselines, summary, figures, and last of all the card, which marks the run as finished.
    save_simple_methods(run.source, run.selection, settings)
    scored = None
    if cell_types is not None:
        scored = score_run_baselines(folder, run.source, cell_types.cells, args.seed)
    summary = summarize(trainer, run.data_module, scored)
    write_run_figures(
        folder,
        run.source,
        run.selection.parts,
        unsharded_model(trainer, folder),
        run.processor,
        donor_key=settings.data.donor_key,
        seed=args.seed,
    )
    write_atomically(folder / CARD, str(model_card(folder)))
    report(format_summary(summary, folder))

    # 5. Publish.
    if args.push_to_hub:
        try:
            report(f"Published at {trainer.push_to_hub()}")
        except (ValueError, OSError) as error:
            raise HubError(f"{folder} is complete, but could not be published: {error}") from error
    return RunSummary(summary, folder)


def describe_pretraining(settings: Settings) -> str:
    """Return a table of what `pretrain` would do: cells, size, time and memory. Nothing is written.

    Args:
        settings: settings of the run, with `dry_run`.

    Raises:
        ValueError: see `pretrain`.
    """
    run = prepare_run(settings)
    return describe_run(run.data_module, run.model, settings.training)


def prepare_run(settings: Settings) -> PreparedRun:
    """Select cells and genes, build processor and model, and plan every epoch. Nothing is written to the run folder.

    Raises:
        FileExistsError, FileNotFoundError, ConnectionError, ValueError: see `pretrain`.
    """
    data, args = settings.data, settings.training
    check_settings(settings)
    warn_of_slow_bfloat16(args)
    source = open_cells(settings)
    selection, checkpoint = select_or_resume(source, settings)
    processor = build_processor(selection.genes, data, source)
    set_seed(args.seed)
    model = build_model(processor, settings.model, selection.domains, data.batch_key, selection.classes)
    if checkpoint is None and not args.dry_run:
        start_at_mean_value(model, processor, source, selection)
        start_at_frequencies(model, source, selection)
        if args.gene_vectors == "data":
            start_at_gene_vectors(model, source, selection, args.seed)
    data_module = DataModule(
        source,
        selection,
        processor,
        model.config,
        args,
        mask_ratios=data.mask_ratios,
        input_keep=data.input_keep,
        view_keep=data.view_keep,
        train_tokens=data.train_tokens,
        chunks_per_window=data.chunks_per_window,
        supervise_by=data.supervise_by,
        cache_dir=None if args.dry_run else data.cache_dir,  # opening a cache may create its folder
        checkpoint=checkpoint,
    )
    if checkpoint is None:
        warn_of_long_warmup(args, data_module.schedule.n_steps)
    if args.shortcut_steps and checkpoint is None and not args.dry_run:
        logger.info(
            "before the %s steps of the run, %s steps train the shortcut and the count decoder alone; fewer with "
            "--shortcut_steps, none with 0",
            *(f"{data_module.schedule.n_steps:,}", f"{args.shortcut_steps:,}"),
        )
        train_shortcut(
            model,
            data_module,
            n_steps=args.shortcut_steps,
            device=args.device,
            progress=not args.disable_tqdm and args.process_index == 0,
        )
    return PreparedRun(source, selection, processor, model, data_module, checkpoint)
