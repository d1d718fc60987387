"""Embed the cells of an .h5ad file with a pretrained model: one vector per cell, in obsm.

  python scripts/embed.py data.h5ad --model runs/demo/best_model --out embedded.h5ad
  python scripts/embed.py data.h5ad --model OWNER/NAME --out embedded.h5ad --layer counts --batch_size 256

The file may be larger than memory. It needs raw counts and genes by Ensembl id or symbol. Then, in scanpy:

  adata = scanpy.read_h5ad("embedded.h5ad")
  scanpy.pp.neighbors(adata, use_rep="X_scgpt"); scanpy.tl.umap(adata); scanpy.tl.leiden(adata)

adata.uns["X_scgpt"] records the model and how many genes of the data are in its vocabulary.
"""

import argparse

from scgpt_hf.analysis.embed import KEY
from scgpt_hf.analysis.embed_file import embed_file
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, tune_process
from scgpt_hf.output import require_writable_file
from scgpt_hf.pretrained import load_model
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, embed the file, and print a summary."""
    accept_any_locale()
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    parser.add_argument("data", help="file with raw counts: .h5ad, .zarr, .h5 of 10x, or a 10x folder")
    parser.add_argument("--model", required=True, help="folder of a saved model, or its repository on the Hub")
    parser.add_argument("--out", required=True, help="file to write: the data with the embedding added")
    parser.add_argument("--key_added", default=KEY, help="name in obsm and uns (default: %(default)s)")
    parser.add_argument("--layer", help="layer with the raw counts (default: the one that has them)")
    parser.add_argument("--round_counts", action="store_true", help="round fractional counts instead of stopping")
    parser.add_argument("--batch_size", type=int, default=64, help="cells per batch (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument(
        "--empty",
        choices=("raise", "nan"),
        default="raise",
        help="cells that express no gene of the model's vocabulary: stop with an error, or write NaN "
        "(default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUT, and an embedding of that name")
    options = vars(parser.parse_args(arguments))
    try:
        require_writable_file(options["out"], overwrite=options["overwrite"])
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
