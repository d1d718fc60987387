"""Write a folder of shards on a small Ray cluster of which workers are killed.

Runs in another process, because Ray leaves threads and warnings behind:

  python -m tests.support.ray_jobs MODULE FUNCTION FOLDER EVENTS

FUNCTION of MODULE gets FOLDER and returns its jobs. EVENTS is a file; each worker process that starts to write a shard
takes a line from it, and is killed when it writes, flushes or renames for that time; see `killed_jobs.die_at`.
"""

import fcntl
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path

from scgpt_hf.cells.jobs.cluster import write_on_ray
from scgpt_hf.cells.jobs.shard_jobs import ShardJobs
from tests.support import ROOT
from tests.support.killed_jobs import die_at


def run_on_ray(function: Callable[[str], ShardJobs], folder: Path, events: Sequence[int] = ()) -> str:
    """Write the shards on a cluster and kill workers; return what the process printed."""
    file = folder.parent / "events"
    file.write_text("".join(f"{event}\n" for event in events))
    arguments = [function.__module__, function.__name__, str(folder), str(file)]
    command = [sys.executable, "-m", "tests.support.ray_jobs", *arguments]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    environment["RAY_worker_niceness"] = "0"  # by default, workers wait for every other process of a busy machine
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def die_as_planned(events: str) -> None:
    """Take the next line of the file, if there is one, and kill this worker at that event."""
    with open(events, "r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        lines = file.read().splitlines(keepends=True)
        file.seek(0)
        file.truncate()
        file.writelines(lines[1:])
    if lines:
        die_at(int(lines[0]))


def main() -> None:
    """Start a cluster of two workers and write the shards on it."""
    import ray

    module, name, folder, events = sys.argv[1:]
    ray.init(num_cpus=2, include_dashboard=False, runtime_env={"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}})
    try:
        jobs = getattr(import_module(module), name)(folder)
        print("complete", write_on_ray(jobs, set_up=partial(die_as_planned, events)))
    except (RuntimeError, ValueError) as error:
        print("error", type(error).__name__, error)


if __name__ == "__main__":
    main()
