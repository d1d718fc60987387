"""Name the type of each cell of an .h5ad file: by a fine-tuned model, or by the nearest cells of a reference.

  python scripts/annotate.py query.h5ad --model runs/types/best_model --out annotated.h5ad
  python scripts/annotate.py query.h5ad --reference ref.h5ad --key cell_type --model ENCODER --out annotated.h5ad

The first takes a model of scripts/finetune.py. The second embeds both files with any pretrained model; without --model
it compares the embeddings that the files have in obsm["X_scgpt"]. Both write obs["predicted_cell_type"], its
_confidence, and "unassigned" where that is below --threshold; the second also _distance, for types that the reference
may lack. Counts stay on disk.
"""

import argparse
import sys
from functools import partial

from scgpt_hf.analysis.annotate import PREDICTED, load_classifier, predict_cell_types
from scgpt_hf.analysis.annotate_file import annotate_file, embed_and_transfer, open_backed
from scgpt_hf.analysis.embed import load_encoder


def main() -> None:
    """Read the command line, annotate, say what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("query", help=".h5ad file with raw counts")
    parser.add_argument("--out", required=True, help="file to write: the query with the types added")
    parser.add_argument("--model", help="folder of a saved model, or its repository on the Hub")
    parser.add_argument("--reference", help=".h5ad file with labelled cells; with it, labels are transferred")
    parser.add_argument("--key", default="cell_type", help="obs column of the reference (default: %(default)s)")
    parser.add_argument("--ignore_labels", nargs="*", default=["unknown"], help="values of --key that are no label")
    parser.add_argument("--n_neighbors", type=int, default=15, help="cells that vote (default: %(default)s)")
    parser.add_argument("--max_distance", type=float, help="cells farther from their neighbours are unassigned")
    parser.add_argument("--threshold", type=float, default=0.5, help="least confidence (default: %(default)s)")
    parser.add_argument("--key_added", default=PREDICTED, help="name of the columns (default: %(default)s)")
    parser.add_argument("--layer", help="layer with the raw counts (default: X)")
    parser.add_argument("--batch_size", type=int, default=64, help="cells at once; for speed (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument("--empty", choices=("raise", "nan"), default="raise", help="cells without any known gene")
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, and columns of that name")
    options = parser.parse_args()
    run = {name: getattr(options, name) for name in ("batch_size", "empty", "layer", "overwrite")}
    try:
        if options.reference is not None:
            names = ("key", "n_neighbors", "max_distance", "key_added", "threshold", "overwrite")
            annotate = partial(
                embed_and_transfer,
                reference=open_backed(options.reference),
                encoder=None if options.model is None else load_encoder(options.model, options.device),
                embedding=run,
                ignore=options.ignore_label,
                **{name: getattr(options, name) for name in names},
            )
        elif options.model is not None:
            model, processor = load_classifier(options.model, options.device)
            said = {"threshold": options.threshold, "key": options.key_added}
            annotate = partial(predict_cell_types, model=model, processor=processor, **run, **said)
        else:
            parser.error("give --model, a fine-tuned one, or --reference")
        report = annotate_file(options.query, options.out, annotate, overwrite=options.overwrite)
    except (OSError, ValueError) as error:
        sys.exit(f"annotate.py: {error}")
    types = dict(zip(report["types"]["name"], report["types"]["cells"], strict=True))
    print(f"Annotated {report['cells']:,} cells in {options.out}, {report['unassigned']:,} unassigned: {types}")
    if "usual_distance" in report:
        print(
            f"{report['cells_beyond']:,} cells are farther from the reference than 99 % of its own cells are from each "
            f"other ({report['usual_distance']:.3g}), as types it lacks would be: see --max_distance."
        )


if __name__ == "__main__":
    main()
