"""Check a file of cells before any work: where the raw counts are, genes, species, obs columns, time and memory.

  scgpt-hf check my.h5ad                               the data alone
  scgpt-hf check my.h5ad --model runs/demo/best_model  and whether this model can embed them

All counts are read once; nothing is written. The exit code is 0 if the file will work, and 1, with what to do, if not.
"""

import argparse
import logging
import sys

from scgpt_hf.analysis.checking.check import check_cells
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, tune_process
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, check the file, print the findings, and exit with 1 if the file will not work."""
    accept_any_locale()
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    parser.add_argument("data", help="file with raw counts: .h5ad, .zarr, .h5 of 10x, or a 10x folder")
    parser.add_argument("--model", help="folder of a saved model, or its repository on the Hub")
    parser.add_argument("--layer", help="layer with the raw counts (default: the one that has them)")
    parser.add_argument("--round_counts", action="store_true", help="round fractional counts instead of stopping")
    parser.add_argument("--batch_size", type=int, default=64, help="cells per batch (default: %(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    options = vars(parser.parse_args(arguments))
    logging.getLogger("scgpt_hf").setLevel(logging.ERROR)  # the report has what the warnings would repeat
    try:
        found = check_cells(options.pop("data"), options.pop("model"), **options)
    except (OSError, ValueError) as error:
        exit_with_error(error)
    print(found)
    sys.exit(0 if found.ok else 1)


if __name__ == "__main__":
    main()
