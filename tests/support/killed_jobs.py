"""Run the jobs of a folder of shards as processes that are killed at random, and run the killed ones again.

  python -m tests.support.killed_jobs MODULE FUNCTION FOLDER SEED LAST_EVENT

FUNCTION of MODULE gets FOLDER and (index, number) of a job, and writes its shards. This runs in another process, which
has no threads and may therefore fork: each job starts without importing the libraries again.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from scgpt_hf.cells.jobs.hashed_file import HashedFile
from tests.support import ROOT

N_JOBS = 3


def write_with_killed_jobs(
    function: Callable[[str, tuple[int, int]], object], folder: Path, *, seed: int, last_event: int
) -> int:
    """Run an array of jobs until all have ended normally; return how many were killed.

    Args:
        function: see the docstring of the module.
        folder: see the docstring of the module.
        seed: of the events at which jobs are killed.
        last_event: events are drawn up to this one; a job that ends before its event is not killed.
    """
    arguments = [function.__module__, function.__name__, str(folder), str(seed), str(last_event)]
    command = [sys.executable, "-m", "tests.support.killed_jobs", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr[-3000:]
    return int(done.stdout.split()[-1])


def die_at(event: int) -> None:
    """Kill this process by SIGKILL when it writes, flushes or renames for the given time, counted from 1."""
    n_events = 0

    def deadly(call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> Any:
            nonlocal n_events
            n_events += 1
            if n_events == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)

        return counted

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)
    HashedFile.write = deadly(HashedFile.write)


def start(job: Callable[[], object], event: int) -> int:
    """Start a job in a new process, which is killed at an event; return its process id."""
    if process := os.fork():
        return process
    try:
        die_at(event)
        job()
    except BaseException as error:  # noqa: BLE001 (a child must never continue the program of its parent)
        print(type(error).__name__, error, file=sys.stderr, flush=True)
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Start all jobs at the same time, and those that were killed again, until none is left."""
    module, name, folder, seed, last_event = sys.argv[1:]
    function = getattr(import_module(module), name)
    rng, waiting, n_killed = np.random.default_rng(int(seed)), set(range(N_JOBS)), 0
    while waiting:
        events = rng.integers(1, int(last_event), N_JOBS)
        processes = {
            start(lambda index=index: function(folder, (index, N_JOBS)), int(events[index])): index for index in waiting
        }
        for process, index in processes.items():
            code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
            assert code in (0, -signal.SIGKILL), code
            n_killed += code != 0
            waiting -= {index} if code == 0 else set()
    print(n_killed)


if __name__ == "__main__":
    main()
