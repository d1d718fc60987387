"""Write the shards of a cache on a Ray cluster.

Each shard is a task. If its worker dies, Ray runs the task again, on another machine if necessary. A shard is written
to a temporary file and then renamed, so a worker that dies leaves no incomplete shard behind. All machines must find
the folder and the source under the same paths.
"""

from collections.abc import Callable
from typing import Any

from tqdm.auto import tqdm

from scgpt_hf.cells.cache.jobs import CacheJobs

RETRIES = 5  # of a shard whose worker died


def write_on_ray(jobs: CacheJobs, *, rewrite: bool = False, set_up: Callable[[], object] | None = None) -> bool:
    """Write all shards on the Ray cluster of this machine and return whether the cache is complete.

    Args:
        jobs: the shards.
        rewrite: replace corrupt shards instead of raising.
        set_up: called in each worker process before it writes a shard, e.g. to tune the process for reading.

    Raises:
        CacheError, OSError, ValueError: see `CacheJobs.write`; the first error of a shard.
        ConnectionError: there is no cluster.
        ImportError: Ray is not installed.
        RuntimeError: the worker of a shard died more than `RETRIES` times.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray; install it with: pip install 'scgpt_hf[cluster]'") from error
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False)
    jobs.prepare_folder()
    shared = ray.put(jobs)  # the cell ids are sent once to each machine, not once with each task
    task: Any = ray.remote(max_retries=RETRIES)(_write)
    waiting = [task.remote(shared, shard, rewrite, set_up) for shard in range(jobs.n_shards)]
    try:
        with tqdm(total=len(jobs.cell_ids), unit=" cells", unit_scale=True, desc="caching") as progress:
            while waiting:
                done, waiting = ray.wait(waiting)
                progress.update(sum(ray.get(done)))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.WorkerCrashedError as error:
        raise RuntimeError(
            f"the worker that writes a shard died {RETRIES + 1} times ({error}); check that it has enough memory"
        ) from error
    finally:
        for unfinished in waiting:
            ray.cancel(unfinished)
    return jobs.finish()


def _write(jobs: CacheJobs, shard: int, rewrite: bool, set_up: Callable[[], object] | None) -> int:
    """Write a shard and return its number of cells."""
    if set_up is not None:
        set_up()
    jobs.write([shard], rewrite=rewrite)
    return jobs.bounds[shard + 1] - jobs.bounds[shard]
