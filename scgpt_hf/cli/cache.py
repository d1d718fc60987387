"""Copy the cells of a Census into a cache: a folder that is read in any order at hundreds of thousands of cells/s.

  python scripts/cache_census.py census://2025-11-08/homo_sapiens blood --obs_filter "tissue_general == 'blood'"
  accelerate launch scripts/pretrain.py --data blood

Every epoch is then shuffled over all cells. (`pretrain.py --cache_dir DIR` writes the same cache while its first epoch
trains.) The cache is a `datasets` folder: `datasets.load_from_disk("blood")` opens it, 5 kB a cell. On the Hub it is a
dataset that streams, and a source for others:

  python scripts/cache_census.py CENSUS blood --push_to_hub ORG/NAME
  accelerate launch scripts/pretrain.py --data hf://datasets/ORG/NAME

Beyond one machine, jobs write ranges of cells; any number of them gives the same files, byte for byte:

  python scripts/cache_census.py CENSUS DIR --shard $SLURM_ARRAY_TASK_ID/64     one job of an array
  python scripts/cache_census.py CENSUS DIR --ray                               on the Ray cluster of this machine

Run the same again after an interruption: what is finished is verified by its hash, not written again. The last job to
end completes the folder.
"""

import argparse
import logging
import sys
from pathlib import Path

from scgpt_hf.cells.cache.jobs import CELLS_PER_SHARD, plan_cache, write_shards
from scgpt_hf.cells.source import open_source
from scgpt_hf.cli.process import tune_process
from scgpt_hf.publishing.publish_cache import check_dataset, publish_cache


def main(arguments: list[str] | None = None) -> None:
    """Read the command line, write this job's shards, and say what is there."""
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", nargs="+", metavar="CENSUS", help="census://VERSION/ORGANISM, a local SOMA, or .h5ad files")
    add("out", metavar="DIR", help="folder of the cache; made if it does not exist")
    add("--obs_filter", help="SOMA value filter on obs, e.g. \"tissue_general == 'blood'\"")
    add("--layer", help="layer with the raw counts (default: raw of a SOMA, X of a file)")
    add("--all_cells", action="store_true", help="also cells with is_primary_data == False, which occur twice")
    add("--columns", nargs="*", metavar="COLUMN", help="obs columns to keep (default: the usual ones)")
    add("--cells_per_shard", type=int, default=CELLS_PER_SHARD, help="least cells of a file (default: %(default)s)")
    add("--shard", default="0/1", metavar="I/N", help="write only every N-th file, from number I on (from 0)")
    add("--ray", action="store_true", help="let an existing Ray cluster write (pip install 'scgpt_hf[cluster]')")
    add("--rewrite", action="store_true", help="write corrupt files again, instead of stopping")
    add("--push_to_hub", metavar="ORG/NAME", help="publish the cache as a dataset when it is whole")
    add("--private", action="store_true", help="publish into a private repository")
    asked = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("scgpt_hf").setLevel(logging.INFO)
    try:
        index, n_jobs = (int(number) for number in asked.shard.split("/"))
    except ValueError:
        parser.error(f"expected --shard I/N, e.g. 0/4, found {asked.shard!r}")
    try:
        source = open_source(
            asked.source, obs_filter=asked.obs_filter, layer=asked.layer, primary_only=not asked.all_cells
        )
        if asked.push_to_hub:
            check_dataset(asked.push_to_hub, private=asked.private or None)
        jobs = plan_cache(source, asked.out, columns=asked.columns, cells_per_shard=asked.cells_per_shard)
        if asked.ray:
            from scgpt_hf.cells.cache.cluster import write_on_ray

            whole = write_on_ray(jobs, rewrite=asked.rewrite, set_up=tune_process)
        else:
            whole = write_shards(jobs, (index, n_jobs), rewrite=asked.rewrite)
        print(f"{asked.out} is whole: train on it with --data {asked.out}" if whole else "other jobs are still to end")
        if whole and asked.push_to_hub:
            print(f"Published at {publish_cache(Path(asked.out), asked.push_to_hub, private=asked.private or None)}")
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        sys.exit(f"cache_census.py: {error}")
    except KeyboardInterrupt:
        print("\ncache_census.py: interrupted; run the same again to go on: what is finished stays", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
