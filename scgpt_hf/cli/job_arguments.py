"""The arguments that `cache` and `embed` share: which cells are written, and how the work is divided into jobs."""

import argparse
from pathlib import Path

from scgpt_hf.cells.jobs.shard_jobs import CELLS_PER_SHARD, ShardJobs, write_shards
from scgpt_hf.cli.process import tune_process


def add_job_arguments(parser: argparse._ActionsContainer) -> None:
    """Add --obs_filter, --all_cells, --cells_per_shard, --shard, --finish, --ray and --rewrite to a parser.

    Args:
        parser: the parser of the command, or a group of it.
    """
    add = parser.add_argument
    add("--obs_filter", help="SOMA value filter on obs, e.g. \"tissue_general == 'blood'\"")
    add("--all_cells", action="store_true", help="also keep cells with is_primary_data == False, which are duplicates")
    add(
        "--cells_per_shard",
        type=int,
        default=CELLS_PER_SHARD,
        help="least number of cells of a file (default: %(default)s)",
    )
    add(
        "--shard",
        type=_parse_job,
        default=(0, 1),
        metavar="I/N",
        help="write every N-th file only, starting with file I, counted from 0",
    )
    add("--finish", action="store_true", help="write no file: complete the folder, or name the files that are missing")
    add("--ray", action="store_true", help="write on the running Ray cluster (pip install 'scgpt_hf[cluster]')")
    add("--rewrite", action="store_true", help="write corrupt files again instead of stopping")


def run_jobs(jobs: ShardJobs, options: argparse.Namespace, *, use_gpu: bool = False) -> bool:
    """Write the shards that the options ask for, and report what is done.

    Args:
        jobs: the plan of the folder.
        options: the parsed arguments.
        use_gpu: see `write_on_ray`.

    Returns:
        Whether the folder is complete.

    Raises:
        ImportError, OSError, RuntimeError, ValueError: see `write_shards` and `write_on_ray`.
    """
    if options.finish:
        jobs.require_finished()
        complete = True
    elif options.ray:
        from scgpt_hf.cells.jobs.cluster import write_on_ray

        complete = write_on_ray(jobs, rewrite=options.rewrite, set_up=tune_process, use_gpu=use_gpu)
    else:
        complete = write_shards(jobs, options.shard, rewrite=options.rewrite)
    if not complete:
        print(f"this job is finished; {Path(jobs.folder)} is complete when all other jobs are")
    return complete


def _parse_job(text: str) -> tuple[int, int]:
    """Return (I, N) of I/N."""
    try:
        index, n_jobs = (int(number) for number in text.split("/"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected I/N, e.g. 0/4, found {text!r}") from error
    return index, n_jobs
