"""Write a folder of shards on a Ray cluster.

Each shard is a task. If its worker dies, Ray runs the task again, on another machine if necessary. A shard is written
to a temporary file and then renamed, so a worker that dies leaves no incomplete shard behind. All machines must find
the folder and the source under the same paths.
"""

from collections.abc import Callable
from functools import lru_cache
from typing import Any

from scgpt_hf.cells.jobs.shard_jobs import ShardJobs
from scgpt_hf.progress_bar import progress_bar

RETRIES = 5  # of a shard whose worker died


def write_on_ray(
    jobs: ShardJobs, *, rewrite: bool = False, set_up: Callable[[], object] | None = None, use_gpu: bool = False
) -> bool:
    """Write all shards on the Ray cluster of this machine and return whether the folder is complete.

    Args:
        jobs: the shards.
        rewrite: replace corrupt shards instead of raising.
        set_up: called in each worker process before it writes a shard, e.g. to tune the process for reading.
        use_gpu: give each worker one GPU, if the cluster has any.

    Raises:
        ShardError, OSError, ValueError: see `ShardJobs.write`; the first error of a shard.
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
    n_gpus = int(use_gpu and ray.cluster_resources().get("GPU", 0) > 0)
    shared = ray.put(jobs)
    task: Any = ray.remote(max_retries=RETRIES, num_gpus=n_gpus)(_write)
    waiting = [task.remote([shared], shard, rewrite, set_up) for shard in range(jobs.n_shards)]
    try:
        with progress_bar(total=len(jobs.cell_ids), unit="cells", description=jobs.ACTION) as progress:
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


def _write(shared: list[Any], shard: int, rewrite: bool, set_up: Callable[[], object] | None) -> int:
    """Write a shard and return its number of cells.

    Args:
        shared: the reference to the jobs. In a list, because Ray would otherwise load the jobs for each task.
        shard: the number of the shard.
        rewrite: see `write_on_ray`.
        set_up: see `write_on_ray`.
    """
    if set_up is not None:
        set_up()
    jobs = _load(shared[0])
    jobs.write([shard], rewrite=rewrite)
    return len(jobs.cells(shard))


@lru_cache(maxsize=1)
def _load(reference: Any) -> ShardJobs:
    """Return the jobs, loaded once in each worker process: opening a Census reads the ids of all its cells."""
    import ray

    jobs: ShardJobs = ray.get(reference)
    return jobs
