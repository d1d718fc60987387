"""Predict what genetic perturbations do to the expression of cells: train, predict, evaluate.

  scgpt-hf perturb train screen.h5ad --out runs/crispr --batch_key replicate
  scgpt-hf perturb evaluate screen.h5ad --run runs/crispr --out runs/crispr/scores
  scgpt-hf perturb predict screen.h5ad KLF1+MAP2K6 STAT1+ctrl --model runs/crispr/best_model --out out.h5ad

The input of `train` and `evaluate` is a screen: raw counts, and the condition of each cell in obs, written as in GEARS
(KLF1+ctrl, KLF1+MAP2K6, ctrl). `train` holds conditions out, which `evaluate` scores beside simple methods on the same
split. `predict` turns control cells into perturbed ones. `COMMAND --help` shows the options of each.
An interrupted training cannot be resumed: remove OUT and run again.
"""

import argparse
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import HfArgumentParser

from scgpt_hf.cells.atomic import replace_file
from scgpt_hf.cells.files.contents import open_anndata
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, show_log, tune_process
from scgpt_hf.output import require_free_folder, require_writable_file, write_beside
from scgpt_hf.perturbation.evaluation.cell_eval import CELL_EVAL, require_cell_eval, score_with_cell_eval
from scgpt_hf.perturbation.evaluation.evaluate import evaluate_perturbation
from scgpt_hf.perturbation.evaluation.results import format_table, write_results
from scgpt_hf.perturbation.finetune import finetune_perturbation
from scgpt_hf.perturbation.predict import predict_perturbation
from scgpt_hf.perturbation.settings import PerturbationSettings
from scgpt_hf.pretrained import load_model
from scgpt_hf.reporting.report import write_report
from scgpt_hf.training.run_folder import list_results
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Run the subcommand that the first argument names."""
    accept_any_locale()
    tune_process()
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    parser.add_argument("command", choices=COMMANDS, help="what to do")
    command = parser.parse_args(arguments[:1]).command
    try:
        COMMANDS[command](arguments[1:])
    except (OSError, ValueError, FloatingPointError, ImportError) as error:
        exit_with_error(error)


def _train(arguments: list[str]) -> None:
    """Train a model, and print the conditions of each part."""
    settings_class: Any = PerturbationSettings
    parser = HfArgumentParser(
        settings_class,
        prog=f"{Path(sys.argv[0]).name} train",
        description="Train a perturbation model on a screen.",
        formatter_class=ExampleHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("data", nargs="+", help="files with raw counts, such as .h5ad")
    settings, others, unknown = parser.parse_args_into_dataclasses(
        arguments, look_for_args_file=False, return_remaining_strings=True
    )
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    show_log(logging.INFO)
    summary = finetune_perturbation(others.data, settings)
    split = summary["conditions"]
    print(f"{len(split['train'])} training conditions, {len(split['validation'])} to choose the checkpoint")
    for category, names in split["test"].items():
        print(f"held out, {category}: {', '.join(names)}")
    if summary["best"]:
        share = summary["best"]["eval_loss"]
        print(f"error on the validation conditions: {share:.2f} times that of predicting no change")
    write_report(settings.out)
    print(list_results(Path(settings.out)))


def _predict(arguments: list[str]) -> None:
    """Write predictions to a file."""
    parser = _make_parser("predict", "Predict control cells after perturbations, in log1p values.")
    add = parser.add_argument
    add("data", help="file with raw counts, such as .h5ad")
    add("conditions", nargs="+", help="conditions as in GEARS: KLF1+ctrl, KLF1+MAP2K6")
    add("--model", required=True, help="folder of a perturbation model, or its repository on the Hub")
    add("--out", required=True, type=Path, help=".h5ad file to write")
    add("--control", default="ctrl", help="name of the control in --condition_key; 'all' uses all cells")
    add("--condition_key", default="condition", help="obs column with the conditions")
    add("--batch_key", help="obs column of the experimental batch (default: that of the training)")
    add("--context_key", help="obs column of what effects differ between, e.g. the cell line")
    add("--n_cells", type=int, default=100, help="control cells for each condition")
    add("--layer", help="layer with the raw counts (default: the one that has them)")
    add("--round_counts", action="store_true", help="round fractional counts instead of stopping")
    add("--batch_size", type=int, default=16, help="cells per batch")
    add("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    add("--seed", type=int, default=0, help="seed of the choice of control cells")
    add("--overwrite", action="store_true", help="replace OUT")
    options = vars(parser.parse_args(arguments))
    out, overwrite = options.pop("out"), options.pop("overwrite")
    require_writable_file(out, overwrite=overwrite)
    show_log(logging.INFO)
    data, conditions, name = (options.pop(key) for key in ("data", "conditions", "model"))
    from transformers import AutoModelForTokenClassification

    model, processor = load_model(name, model_class=AutoModelForTokenClassification, device=options.pop("device"))
    options["control"] = None if options["control"] == "all" else options["control"]
    found = predict_perturbation(open_anndata(data), conditions, model, processor, **options)
    try:
        with replace_file(out) as temporary:
            found.write_h5ad(temporary)
    except OSError as error:
        raise write_beside(out, lambda place: found.write_h5ad(place / out.name), error) from error
    for column, delta in found.varm["delta"].items():
        largest = delta.abs().nlargest(5).index
        genes = ", ".join(f"{found.var['feature_name'][gene]} {delta[gene]:+.2f}" for gene in largest)
        print(f"{column}: {genes}")
    print(f"wrote {found.n_obs:,} predicted cells to {out}")


def _evaluate(arguments: list[str]) -> None:
    """Score a run, and write scores and report."""
    parser = _make_parser("evaluate", "Score the held-out conditions of a run, and baselines on the same split.")
    add = parser.add_argument
    add("data", nargs="+", help="the files that the run was trained on")
    add("--run", required=True, type=Path, help="folder of the run")
    add("--out", required=True, type=Path, help="folder to create")
    add("--n_cells", type=int, default=64, help="control cells for each prediction")
    add("--seed", type=int, default=0, help="seed of the halves of the ceiling")
    add("--cell_eval", action="store_true", help="also write the metrics of cell-eval2 (extra perturb)")
    options = parser.parse_args(arguments)
    require_free_folder(options.out)
    if options.cell_eval:
        require_cell_eval()
    show_log(logging.INFO)
    evaluation = evaluate_perturbation(options.data, options.run, n_cells=options.n_cells, seed=options.seed)
    write_results(evaluation, options.out)
    if options.cell_eval:
        score_with_cell_eval(evaluation).to_csv(options.out / CELL_EVAL, index=False)
    write_report(options.out)
    for heading, replicates in (("replicates", True), ("does not replicate", False)):
        if tables := evaluation.table(replicates=replicates):
            print(f"Conditions whose effect {heading} in two halves of their cells:\n{format_table(tables)}")
    print(f"wrote scores and report.html to {options.out}")


def _make_parser(command: str, description: str) -> argparse.ArgumentParser:
    prog = f"{Path(sys.argv[0]).name} {command}"
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=ExampleHelpFormatter)


COMMANDS: dict[str, Callable[[list[str]], None]] = {"train": _train, "predict": _predict, "evaluate": _evaluate}


if __name__ == "__main__":
    main()
