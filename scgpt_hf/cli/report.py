"""Write report.html into the folder of a run: one page with its data, curves, scores, figures and provenance.

  python scripts/report.py runs/demo        a pretraining run, finished or still training
  python scripts/report.py runs/annotate    what finetune.py wrote
  python scripts/report.py scores           what evaluate.py wrote

The page needs nothing else and no network; it can be sent by mail and read on a phone.
"""

import argparse
import sys

from scgpt_hf.reporting.report import write_report


def main() -> None:
    """Read the command line, write the page, say where it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="folder that pretrain.py, finetune.py or evaluate.py wrote")
    try:
        print(write_report(parser.parse_args().run))
    except (OSError, ValueError) as error:
        sys.exit(f"report.py: {error}")


if __name__ == "__main__":
    main()
