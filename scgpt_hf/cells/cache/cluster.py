"""Writes the shards of a cache on the machines of a Ray cluster.

A shard is a task. One whose worker dies is started again by Ray, elsewhere if need be; it writes beside and renames,
so nothing half-written remains. All machines must see the folder and the source under the same paths.
"""

from typing import Any

from tqdm.auto import tqdm

from scgpt_hf.cells.cache.jobs import CacheJobs

RETRIES = 5  # of a shard whose worker died


def write_on_ray(jobs: CacheJobs, *, rewrite: bool = False) -> bool:
    """Write all shards on the Ray cluster that is running here; return whether the cache is whole.

    Args:
        jobs: the shards.
        rewrite: write corrupt ones again.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster.
        CacheError, OSError, ValueError: as `CacheJobs.write`; the first that a shard met.
        RuntimeError: a shard's worker died again and again.
    """
    try:
        import ray
    except ImportError as error:
        raise ImportError("--ray needs Ray; install it with: pip install 'scgpt_hf[cluster]'") from error
    if not ray.is_initialized():
        ray.init(address="auto", log_to_driver=False)
    jobs.claim()
    shared = ray.put(jobs)  # cell ids travel once to each machine
    task: Any = ray.remote(max_retries=RETRIES)(_write)
    waiting = [task.remote(shared, shard, rewrite) for shard in range(jobs.n_shards)]
    try:
        with tqdm(total=len(jobs.cell_ids), unit=" cells", unit_scale=True, desc="caching") as progress:
            while waiting:
                done, waiting = ray.wait(waiting)
                progress.update(sum(ray.get(done)))
    except ray.exceptions.RayTaskError as error:
        raise error.cause from error
    except ray.exceptions.WorkerCrashedError as error:
        raise RuntimeError(
            f"the worker of a shard died {RETRIES + 1} times ({error}); is there enough memory?"
        ) from error
    finally:
        for left in waiting:
            ray.cancel(left)
    return jobs.finish()


def _write(jobs: CacheJobs, shard: int, rewrite: bool) -> int:
    """Write a shard and return its number of cells."""
    jobs.write([shard], rewrite=rewrite)
    return jobs.bounds[shard + 1] - jobs.bounds[shard]
