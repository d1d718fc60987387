"""Embed the cells of a file with a pretrained model: one vector per cell, in obsm.

  scgpt-hf embed data.h5ad --out embedded.h5ad  # with blood-mini, a small model in the package
  scgpt-hf embed data.h5ad --model runs/demo/best_model --out embedded.h5ad
  scgpt-hf embed data.h5ad --model OWNER/NAME --out embedded.h5ad --layer counts --batch_size 256

The file may be larger than memory. It needs raw counts and genes by Ensembl id or symbol. Then, in scanpy:

  adata = scanpy.read_h5ad("embedded.h5ad")
  scanpy.pp.neighbors(adata, use_rep="X_scgpt"); scanpy.tl.umap(adata); scanpy.tl.leiden(adata)

adata.uns["X_scgpt"] records the model and how many genes of the data are in its vocabulary.
"""

import argparse

from scgpt_hf.analysis.embed import KEY
from scgpt_hf.analysis.embed_file import embed_file
from scgpt_hf.cells.files.formats import SUPPORTED
from scgpt_hf.cli.inference_arguments import add_inference_arguments
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, tune_process
from scgpt_hf.output import require_writable_file
from scgpt_hf.packaged_models import DEFAULT_MODEL, packaged_model
from scgpt_hf.pretrained import load_model
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, embed the file, and print a summary."""
    accept_any_locale()
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    parser.add_argument("data", help=f"file with raw counts: {SUPPORTED}")
    parser.add_argument(
        "--model",
        help="folder of a saved model, its repository on the Hub, or the name of a model of the package (default: "
        f"{DEFAULT_MODEL}, a small model of human blood and marrow cells)",
    )
    parser.add_argument("--out", required=True, help="file to write: the data with the embedding added")
    parser.add_argument("--key_added", default=KEY, help="name in obsm and uns (default: %(default)s)")
    add_inference_arguments(parser, empty="write NaN", replaced="an embedding of that name")
    options = vars(parser.parse_args(arguments))
    try:
        require_writable_file(options["out"], overwrite=options["overwrite"])
        if options["model"] is None:
            options["model"] = DEFAULT_MODEL
            print(
                f"No --model: using {DEFAULT_MODEL}, a small model of human blood and marrow cells that comes with the "
                f"package. Its card, with results and limits: {packaged_model() / 'README.md'}"
            )
        model, processor = load_model(options.pop("model"), device=options.pop("device"))
        report = embed_file(options.pop("data"), options.pop("out"), model, processor, **options)
    except (OSError, ValueError) as error:
        exit_with_error(error)
    genes = report["genes"]
    print(
        f"Embedded {report['cells'] - report['empty_cells']:,} of {report['cells']:,} cells with {report['model']}.\n"
        f"Genes: {genes['by_id']:,} matched by id, {genes['by_symbol']:,} by symbol, "
        f"{genes['duplicates']:,} duplicates, {genes['unknown']:,} unknown; the vocabulary has {genes['vocabulary']:,}."
    )


if __name__ == "__main__":
    main()
