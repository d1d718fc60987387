"""Annotate the cells of a file with their types: by a fine-tuned model, or by the nearest cells of a reference.

  python scripts/annotate.py query.h5ad --model runs/types/best_model --out annotated.h5ad
  python scripts/annotate.py query.h5ad --reference ref.h5ad --labels_key cell_type --model ENCODER --out annotated.h5ad

The first command uses a classifier trained by scripts/finetune.py. The second embeds both files with any pretrained
model; without --model it compares the embeddings that both files have in obsm["X_scgpt"]. Both commands write
obs["predicted_cell_type"], its _confidence, and "unassigned" where the confidence is below --threshold. The second also
writes _distance, the mean distance to the neighbors: it is large for types that the reference lacks. Counts stay on
disk.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from anndata import AnnData
from transformers import PreTrainedModel

from scgpt_hf.analysis.annotate import CLASSIFIER, PREDICTED, predict_cell_types, transfer_labels, validate_transfer
from scgpt_hf.analysis.annotate_file import annotate_file
from scgpt_hf.analysis.embed import KEY, embed_anndata
from scgpt_hf.cells.files.contents import open_anndata
from scgpt_hf.cells.files.formats import SUPPORTED
from scgpt_hf.cli.inference_arguments import add_inference_arguments
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, tune_process
from scgpt_hf.output import require_writable_file
from scgpt_hf.pretrained import load_model
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
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
    run = {name: getattr(options, name) for name in ("batch_size", "empty", "layer", "round_counts", "overwrite")}
    if options.reference is None:
        model, processor = load_model(options.model, device=options.device, **CLASSIFIER)
        named = {name: getattr(options, name) for name in ("threshold", "key_added")}
        return partial(predict_cell_types, model=model, processor=processor, **run, **named)
    names = ("labels_key", "n_neighbors", "max_distance", "key_added", "threshold", "overwrite")
    return partial(
        _embed_and_transfer,
        reference=open_anndata(options.reference),
        encoder=None if options.model is None else load_model(options.model, device=options.device),
        embed_settings=run,
        ignore=options.ignore_labels,
        **{name: getattr(options, name) for name in names},
    )


def _embed_and_transfer(
    query: AnnData,
    reference: AnnData,
    encoder: tuple[PreTrainedModel, ScGPTProcessor] | None,
    embed_settings: dict[str, Any],
    **settings: Any,
) -> dict[str, Any]:
    """Embed query and reference, if an encoder is given, and transfer labels. What cannot work raises before that.

    Args:
        query: see `transfer_labels`.
        reference: see `transfer_labels`.
        encoder: model and processor; None uses the embeddings that the data have.
        embed_settings: further arguments of `embed_anndata`.
        settings: further arguments of `transfer_labels`.

    Raises:
        ValueError: see `transfer_labels`; or the query has an embedding that must not be replaced.
    """
    validate_transfer(query, reference, **{name: value for name, value in settings.items() if name != "max_distance"})
    if encoder is not None:
        if KEY in query.obsm and not embed_settings["overwrite"]:
            raise ValueError(
                f"the query has an embedding obsm[{KEY!r}] already; use it and that of the reference (without "
                "--model), or replace it (--overwrite)"
            )
        embed_anndata(reference, *encoder, **embed_settings | {"overwrite": True})  # its file is not written
        embed_anndata(query, *encoder, **embed_settings)
    return transfer_labels(query, reference, **settings)


if __name__ == "__main__":
    main()
