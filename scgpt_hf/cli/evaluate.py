r"""Score embeddings of labelled cells beside baselines computed on the same cells.

  python scripts/evaluate.py embedded.h5ad --embedding X_scgpt --out scores
  python scripts/evaluate.py embedded.h5ad --embedding X_scgpt --embedding X_scVI --labels_key cell_type \
      --batch donor_id --reference reference.h5ad --baselines "HVG + PCA" "HVG + logistic regression" scVI \
      --vector svg --out scores

Cell types kept apart (NMI, ARI, ASW, cLISI) and batches mixed (ASW, iLISI, graph connectivity) by scib-metrics
(pip install "scgpt_hf[metrics]"); macro-F1 of nearest neighbours and of a linear probe, donors never split between
training and test; with a reference, types transferred from it. Of more than 50,000 cells a sample is scored, stratified
by label and batch. What cannot be computed is reported with its cause, or an error if --metrics names it.

OUT gets scores.csv, scores.json, figures and report.html.
"""

import argparse
import sys
from pathlib import Path

from scgpt_hf.analysis.annotate_file import open_backed
from scgpt_hf.analysis.evaluation.baseline_embeddings import BASELINES
from scgpt_hf.analysis.evaluation.evaluate import DEFAULTS, METRICS, NOT_APPLICABLE, evaluate_embeddings
from scgpt_hf.cli.process import tune_process
from scgpt_hf.reporting.evaluation_results import require_free_folder, tabulate, write_evaluation
from scgpt_hf.reporting.report import write_report


def main() -> None:
    """Read the command line, score, write the folder, print the table."""
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help=".h5ad file with labels, embeddings in obsm and, for baselines, raw counts")
    parser.add_argument("--embedding", action="append", required=True, help="key of obsm; may be given several times")
    parser.add_argument("--labels_key", default="cell_type", help="obs column of cell types (default: %(default)s)")
    parser.add_argument("--batch", default="donor_id", help="obs column of donors (default: %(default)s)")
    parser.add_argument("--reference", help=".h5ad file with the same embeddings, to transfer types from")
    parser.add_argument("--out", required=True, type=Path, help="new folder")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, metavar="METRIC", help=f"of: {', '.join(METRICS)}")
    parser.add_argument("--baselines", nargs="*", choices=BASELINES, default=DEFAULTS["baselines"], metavar="NAME",
                        help=f"of: {', '.join(BASELINES)}; or nothing (default: the first two)")  # fmt: skip
    parser.add_argument("--layer", help="layer with the raw counts (default: X)")
    parser.add_argument("--unlabelled", nargs="*", default=DEFAULTS["unlabelled"], metavar="NAME",
                        help="labels that mean there is none (default: unknown)")  # fmt: skip
    parser.add_argument("--max_cells", type=int, default=DEFAULTS["max_cells"], help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of sample, folds and baselines (default: %(default)s)")
    parser.add_argument("--vector", nargs="*", choices=("svg", "pdf"), default=(), help="more formats of the figures")
    options = vars(parser.parse_args())
    data, out, reference, vector = (options.pop(name) for name in ("data", "out", "reference", "vector"))
    keys, label, batch = (options.pop(name) for name in ("embedding", "label", "batch"))
    try:
        require_free_folder(out)
        cells = open_backed(data)
        known = open_backed(reference) if reference else None
        evaluation = evaluate_embeddings(cells, keys, label, batch, reference=known, **options)
        extra = {"data": Path(data).name} | ({"reference_data": Path(reference).name} if reference else {})
        write_evaluation(evaluation, out, vector=vector, extra=extra)
        write_report(out)
    except (OSError, ValueError, ModuleNotFoundError) as error:
        sys.exit(f"evaluate.py: {error}")
    scores = tabulate(evaluation)
    shown = scores.pivot(index="metric", columns="method", values="value").round(3)
    print(shown.reindex(index=scores["metric"].unique(), columns=list(evaluation.methods)).to_string(na_rep="–"))
    for method, metric, _, cause in scores[~scores["reason"].isin(["", NOT_APPLICABLE])].itertuples(index=False):
        print(f"{metric} of {method} is not computable: {cause}")
    print(f"{len(evaluation.cells.rows):,} cells scored; left out: {dict(evaluation.cells.left_out) or 'none'}")
    print(f"Scores, figures and report.html are in {out}.")


if __name__ == "__main__":
    main()
