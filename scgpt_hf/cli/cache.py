"""Copy the cells of a Census into a cache: a folder that is read in any order, at hundreds of thousands of cells/s.

  scgpt-hf cache census://2025-11-08/homo_sapiens blood --obs_filter "tissue_general == 'blood'"
  scgpt-hf pretrain --data blood

Epochs over a cache are shuffled over all cells. `scgpt-hf pretrain --cache_dir DIR` writes it during its first
epoch. A cache takes about 5 kB for each cell. It is a `datasets` folder: `datasets.load_from_disk("blood")` opens it.
You can publish it on the Hub as a dataset, which others can stream, or train on:

  scgpt-hf cache CENSUS blood --push_to_hub ORG/NAME
  scgpt-hf pretrain --data hf://datasets/ORG/NAME

Several machines can share the work. Any number of jobs gives the same files, byte for byte:

  scgpt-hf cache CENSUS DIR --shard $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT     one job of an array
  scgpt-hf cache CENSUS DIR --finish                                                 after it: is any file missing?
  scgpt-hf cache CENSUS DIR --ray                                                    on the running Ray cluster

After an interruption, run the same command again: finished files are verified by their hash, not written again. The
last job that finishes completes the folder.
"""

import argparse
import logging
import sys
from pathlib import Path

from scgpt_hf.cells.cache.jobs import plan_cache
from scgpt_hf.cells.files.formats import SUPPORTED
from scgpt_hf.cells.source import open_source
from scgpt_hf.cli.job_arguments import add_job_arguments, run_jobs
from scgpt_hf.cli.process import accept_any_locale, exit_with_error, program_name, show_log, tune_process
from scgpt_hf.publishing.publish_cache import check_dataset, publish_cache
from scgpt_hf.training.settings_parsing import ExampleHelpFormatter


def main(arguments: list[str] | None = None) -> None:
    """Parse the command line, write the files of this job, and print whether the cache is complete."""
    accept_any_locale()
    tune_process()
    options = _make_parser().parse_args(arguments)
    show_log(logging.INFO)
    try:
        source = open_source(
            options.source,
            obs_filter=options.obs_filter,
            layer=options.layer,
            primary_only=not options.all_cells,
            round_counts=options.round_counts,
        )
        if options.push_to_hub:
            check_dataset(options.push_to_hub, private=options.private or None)
        jobs = plan_cache(source, options.out, columns=options.columns, cells_per_shard=options.cells_per_shard)
        complete = run_jobs(jobs, options)
        if complete:
            print(f"{options.out} is complete; train on it with --data {options.out}")
        if complete and options.push_to_hub:
            url = publish_cache(Path(options.out), options.push_to_hub, private=options.private or None)
            print(f"Published at {url}")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        exit_with_error(error)
    except KeyboardInterrupt:
        print(f"\n{program_name()}: interrupted; run the same command again to continue", file=sys.stderr)
        sys.exit(130)


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=ExampleHelpFormatter)
    add = parser.add_argument
    add("source", nargs="+", metavar="CENSUS", help=f"census://VERSION/ORGANISM, a local SOMA, or files: {SUPPORTED}")
    add("out", metavar="DIR", help="folder of the cache; created if it does not exist")
    add("--layer", help="layer with the raw counts (default: raw of a SOMA, of a file the one that has them)")
    add("--round_counts", action="store_true", help="round fractional counts of files instead of stopping")
    add("--columns", nargs="*", metavar="COLUMN", help="obs columns to keep (default: donor_id, cell_type, …)")
    add_job_arguments(parser)
    add("--push_to_hub", metavar="ORG/NAME", help="publish the cache as a dataset when it is complete")
    add("--private", action="store_true", help="make the dataset private")
    return parser


if __name__ == "__main__":
    main()
