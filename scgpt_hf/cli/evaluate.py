r"""Score the embeddings of labelled cells, and baselines on the same cells.

Examples:
  scgpt-hf evaluate embedded.h5ad --embedding X_scgpt --out scores
  scgpt-hf evaluate embedded.h5ad --embedding X_scgpt --embedding X_scVI --labels_key cell_type \
      --batch_key donor_id --reference reference.h5ad --baselines "HVG + PCA" "HVG + logistic regression" scVI \
      --vector svg --out scores
  scgpt-hf evaluate embedded.h5ad --embedding X_scgpt --run runs/demo --out scores

What is measured:
  separation of cell types  NMI, ARI, ASW, cLISI (scib-metrics)
  mixing of batches         ASW, iLISI, graph connectivity (scib-metrics)
  prediction of cell types  macro-F1 of nearest neighbors and of a linear probe, trained on other donors
  transfer of cell types    the same two classifiers, trained on the cells of --reference

scib-metrics is an extra: pip install "scgpt_hf[metrics]"; without it, its metrics are left out. If there are more than
50,000 cells, a sample is scored that is stratified by label and batch. A metric that cannot be computed is reported
with the cause; if you pass it with --metrics, it stops the command.

The output folder gets scores.csv, scores.json, figures and report.html.
"""

import argparse
from pathlib import Path

from scgpt_hf.analysis.evaluation.baseline_embeddings import BASELINES
from scgpt_hf.analysis.evaluation.evaluate import (
    DEFAULTS,
    METRICS,
    NOT_APPLICABLE,
    Evaluation,
    evaluate_embeddings,
)
from scgpt_hf.cells.files.contents import open_anndata
from scgpt_hf.cli.process import accept_any_locale, exit_with_error
from scgpt_hf.output import require_free_folder
from scgpt_hf.reporting.evaluation_results import tabulate, write_evaluation
from scgpt_hf.reporting.report import write_report
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Score the embeddings given on the command line, write the folder, and print the scores."""
    accept_any_locale()
    options = vars(_build_parser().parse_args(arguments))
    data, out, reference, vector = (options.pop(name) for name in ("data", "out", "reference", "vector"))
    keys, labels_key, batch_key = (options.pop(name) for name in ("embedding", "labels_key", "batch_key"))
    try:
        require_free_folder(out)
        cells = open_anndata(data)
        reference_cells = open_anndata(reference) if reference else None
        evaluation = evaluate_embeddings(cells, keys, labels_key, batch_key, reference=reference_cells, **options)
        extra = {"data": Path(data).name} | ({"reference_data": Path(reference).name} if reference else {})
        write_evaluation(evaluation, out, vector=vector, extra=extra)
        write_report(out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        exit_with_error(error)
    _print_scores(evaluation)
    print(f"wrote scores, figures and report.html to {out}")


def _build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    add = parser.add_argument
    add("data", help=".h5ad file with labels, embeddings in obsm and, for the baselines, raw counts")
    add("--embedding", action="append", required=True, metavar="KEY",
        help="key of an embedding in obsm; repeat the option for several embeddings")  # fmt: skip
    add("--labels_key", default="cell_type", metavar="COLUMN",
        help="obs column with cell types (default: %(default)s)")  # fmt: skip
    add("--batch_key", default="donor_id", metavar="COLUMN",
        help="obs column with batches, usually donors (default: %(default)s)")  # fmt: skip
    add("--reference", metavar="FILE", help=".h5ad file with the same embeddings, to transfer cell types from")
    add("--out", required=True, type=Path, metavar="DIR", help="folder to create")
    add("--metrics", nargs="+", choices=METRICS, metavar="METRIC",
        help=f"metrics to compute, of: {', '.join(METRICS)} (default: all)")  # fmt: skip
    add("--baselines", nargs="*", choices=list(BASELINES), metavar="NAME",
        help=f"baselines to compute, of: {', '.join(BASELINES)} (default: all but scVI)")  # fmt: skip
    add("--run", type=Path, metavar="DIR",
        help="folder of the pretraining run of the embeddings, for the baselines that know its training cells: "
        f"{', '.join(name for name, one in BASELINES.items() if one.needs_run)}")  # fmt: skip
    add("--layer", help="layer with the raw counts (default: the one that has them)")
    add("--round_counts", action="store_true", help="round fractional counts instead of stopping")
    add("--unlabeled_categories", nargs="*", default=DEFAULTS["unlabeled_categories"], metavar="NAME",
        help="values of the labels column that mean a cell has no label (default: unknown)")  # fmt: skip
    add("--max_cells", type=int, default=DEFAULTS["max_cells"],
        help="score a sample if there are more cells (default: %(default)s)")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of sample, folds and baselines (default: %(default)s)")
    add("--vector", nargs="*", choices=("svg", "pdf"), default=(), help="more formats for the figures, besides PNG")
    return parser


def _print_scores(evaluation: Evaluation) -> None:
    """Print a table of metrics and methods, why scores are missing, and how many cells were scored."""
    scores = tabulate(evaluation)
    table = scores.pivot(index="metric", columns="method", values="value").round(3)
    print(table.reindex(index=scores["metric"].unique(), columns=list(evaluation.methods)).to_string(na_rep="–"))
    not_computable = scores[~scores["reason"].isin(["", NOT_APPLICABLE])]
    for reason, rows in not_computable.groupby("reason", sort=False):
        metrics, methods = (", ".join(rows[column].unique()) for column in ("metric", "method"))
        print(f"{metrics} of {methods} cannot be computed: {reason}")
    print(f"{len(evaluation.cells.rows):,} cells scored; left out: {dict(evaluation.cells.left_out) or 'none'}")


if __name__ == "__main__":
    main()
