"""Annotate the cells of a file with their types: by a fine-tuned model, or by the nearest cells of a reference.

  scgpt-hf annotate query.h5ad --model runs/types/best_model --out annotated.h5ad
  scgpt-hf annotate query.h5ad --reference ref.h5ad --labels_key cell_type --model ENCODER --out annotated.h5ad

The first command uses a classifier trained by scgpt-hf finetune. The second embeds both files with any pretrained
model; without --model it compares the embeddings that both files have in obsm["X_scgpt"]. Both commands write
obs["predicted_cell_type"], its _confidence, and "unassigned" where the confidence is below --threshold. The second also
writes _distance, the mean distance to the neighbors: it is large for types that the reference lacks. Counts stay on
disk.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from scgpt_hf.analysis.annotate import CLASSIFIER, PREDICTED
from scgpt_hf.analysis.annotate_cells import annotate
from scgpt_hf.analysis.annotate_file import annotate_file
from scgpt_hf.analysis.embed import KEY
from scgpt_hf.cells.files.contents import open_anndata
from scgpt_hf.cells.files.formats import SUPPORTED
from scgpt_hf.cli.inference_arguments import add_inference_arguments
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, tune_process
from scgpt_hf.output import require_writable_file
from scgpt_hf.pretrained import load_model
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, annotate the file, and print a summary."""
    accept_any_locale()
    tune_process()
    parser = _make_parser()
    options = parser.parse_args(arguments)
    if options.model is None and options.reference is None:
        parser.error("give --model, a fine-tuned one, or --reference")
    try:
        require_writable_file(options.out, overwrite=options.overwrite)
        report = annotate_file(options.query, options.out, _make_annotate(options), overwrite=options.overwrite)
    except (OSError, ValueError) as error:
        exit_with_error(error)
    types = dict(zip(report["types"]["name"], report["types"]["cells"], strict=True))
    print(f"Annotated {report['cells']:,} cells in {options.out}, {report['unassigned']:,} unassigned: {types}")
    if "usual_distance" in report:
        print(
            f"{report['cells_beyond']:,} cells are farther from the reference than 99 % of its own cells are from each "
            f"other ({report['usual_distance']:.3g}); the reference may lack their types: see --max_distance."
        )


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    parser.add_argument("query", help=f"file with raw counts: {SUPPORTED}")
    parser.add_argument("--out", required=True, help="file to write: the query with the types added")
    parser.add_argument("--model", help="folder of a saved model, or its repository on the Hub")
    parser.add_argument("--reference", help=".h5ad file with labelled cells, whose labels are transferred")
    parser.add_argument("--labels_key", default="cell_type", help="obs column of the reference (default: %(default)s)")
    parser.add_argument(
        "--ignore_labels", nargs="*", default=["unknown"], help="values of --labels_key that are not labels"
    )
    parser.add_argument("--n_neighbors", type=int, default=15, help="cells that vote (default: %(default)s)")
    parser.add_argument("--max_distance", type=float, help="cells farther from their neighbors are unassigned")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest confidence (default: %(default)s)")
    parser.add_argument("--key_added", default=PREDICTED, help="name of the new columns (default: %(default)s)")
    add_inference_arguments(parser, empty="leave them unassigned", replaced="columns of that name")
    return parser


def _make_annotate(options: argparse.Namespace) -> Callable[..., dict[str, Any]]:
    """Return the function that annotates an AnnData as the options say, its model loaded."""
    names = ("batch_size", "empty", "layer", "round_counts", "overwrite", "threshold", "key_added", "labels_key")
    run = {name: getattr(options, name) for name in names}
    if options.reference is None:
        model, processor = load_model(options.model, device=options.device, **CLASSIFIER)
        return partial(annotate, model=model, processor=processor, **run)
    reference = open_anndata(options.reference)
    if options.model is not None:
        run["model"], run["processor"] = load_model(options.model, device=options.device)
        if KEY in reference.obsm:
            del reference.obsm[KEY]  # its file is not written
    transfer = {
        "ignore": options.ignore_labels,
        "n_neighbors": options.n_neighbors,
        "max_distance": options.max_distance,
    }
    return partial(annotate, reference=reference, transfer=transfer, **run)


if __name__ == "__main__":
    main()
