"""Adapt a pretrained model to labelled cells, to predict cell types, or to experimental batches, to integrate them.

  scgpt-hf finetune data.h5ad --model runs/demo/best_model --labels_key cell_type --out runs/types
  scgpt-hf finetune data.h5ad --model OWNER/NAME --labels_key cell_type --out runs/types --train lora
  scgpt-hf integrate a.h5ad b.h5ad --model OWNER/NAME --batch_key assay --out runs/joined

The first command fits a logistic regression to the embedding of the frozen model. The second one continues from it,
and trains the encoder, too; the result is kept only if it predicts held-out cells better. Both write a classifier for
scgpt-hf annotate. The third command trains an encoder for scgpt-hf embed.
OUT/best_model is the model; report.html, summary.json, metrics, split and settings are beside it.
`scgpt-hf integrate --help` shows its flags. An interrupted run cannot be resumed: remove OUT and run again.
"""

import logging
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from scgpt_hf.cells.files.formats import SUPPORTED
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, show_log, tune_process
from scgpt_hf.publishing.record import RunRecord
from scgpt_hf.publishing.run_summary import classifier_rows
from scgpt_hf.reporting.report import write_report
from scgpt_hf.training.finetuning.annotate import finetune_classifier
from scgpt_hf.training.finetuning.integrate import finetune_integration
from scgpt_hf.training.finetuning.settings import AnnotateSettings, IntegrateSettings
from scgpt_hf.training.run_folder import SUMMARY, list_results
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter

TASKS: dict[str, Any] = {
    "annotate": (AnnotateSettings, finetune_classifier),
    "integrate": (IntegrateSettings, finetune_integration),
}


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, fine-tune the model, and print a summary."""
    accept_any_locale()
    tune_process()
    task_parser = ArgumentParser(add_help=False, allow_abbrev=False)
    task_parser.add_argument("--task", choices=TASKS, default="annotate", help="what to fine-tune for")
    task, flags = task_parser.parse_known_args(arguments)
    settings_class, finetune = TASKS[task.task]
    parser = HfArgumentParser(
        settings_class,
        parents=[task_parser],
        description=__doc__,
        formatter_class=ExampleHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data", nargs="+", help=f"files with raw counts ({SUPPORTED}), or one SOMA")
    parser.set_defaults(task=task.task)  # what the help shows
    try:
        settings, others, unknown = parser.parse_args_into_dataclasses(
            flags, look_for_args_file=False, return_remaining_strings=True
        )
        if unknown:
            parser.error(f"unrecognized arguments: {' '.join(unknown)}")
        show_log(logging.INFO)
        summary = finetune(others.data, settings)
        write_report(settings.out)
    except (OSError, ValueError, ImportError, FloatingPointError) as error:
        exit_with_error(error)
    print(_format_annotation(summary) if task.task == "annotate" else _format_integration(summary))
    print(list_results(Path(settings.out)))


def _format_annotation(summary: dict[str, Any]) -> str:
    """Return the scores of a classifier above those of simpler methods."""
    rows = classifier_rows(RunRecord(summary, SUMMARY))
    width = max(len(name) for name, _, _ in rows)
    return "\n".join(
        [
            f"Scores on {summary['validation_cells']:,} held-out cells with {len(summary['labels'])} labels:",
            *[f"  {name:{width}}  macro-F1 {macro_f1}, accuracy {accuracy}" for name, macro_f1, accuracy in rows],
        ]
    )


def _format_integration(summary: dict[str, Any]) -> str:
    """Return the cells and batches of an integrated model, and its new parts, in one line."""
    n_cells = sum(sum(parts.values()) for parts in summary["domains"].values())
    return f"{n_cells:,} cells of {len(summary['domains'])} batches; new in the model: {', '.join(summary['new'])}."


if __name__ == "__main__":
    main()
