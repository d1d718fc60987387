"""Write report.html into a folder: one page with scores, loss curves, data, settings and figures.

  scgpt-hf report runs/demo        a pretraining run, finished or in progress
  scgpt-hf report runs/annotate    a run of finetune
  scgpt-hf report scores           an evaluation by evaluate

The page is self-contained: it needs no other file and no network, and is readable on a phone.
"""

import argparse

from scgpt_hf.cli.process import accept_any_locale, exit_with_error
from scgpt_hf.reporting.report import write_report
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, write the page, and print its path."""
    accept_any_locale()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    parser.add_argument("run", help="folder written by pretrain, finetune or evaluate")
    try:
        print(write_report(parser.parse_args(arguments).run))
    except (OSError, ValueError) as error:
        exit_with_error(error)


if __name__ == "__main__":
    main()
