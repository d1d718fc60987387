"""The arguments that the commands `embed` and `annotate` share: how a model is run on the cells of a file."""

import argparse


def add_inference_arguments(parser: argparse.ArgumentParser, *, empty: str, replaced: str) -> None:
    """Add --layer, --round_counts, --batch_size, --device, --empty and --overwrite to a parser.

    Args:
        parser: the parser of the command.
        empty: what `--empty nan` does with cells that express no known gene, for its help.
        replaced: what `--overwrite` replaces in addition to the file, for its help.
    """
    parser.add_argument("--layer", help="layer with the raw counts (default: the one that has them)")
    parser.add_argument("--round_counts", action="store_true", help="round fractional counts instead of stopping")
    parser.add_argument("--batch_size", type=int, default=64, help="cells per batch (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument(
        "--empty",
        choices=("raise", "nan"),
        default="raise",
        help=f"cells that express no gene of the model's vocabulary: stop with an error, or {empty} "
        "(default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help=f"replace OUT, and {replaced}")
