"""Process-wide settings: commands tune their process, the library leaves it as it is."""

import ast
import json
import os
import platform
import subprocess
import sys

import pytest

from tests.support import ROOT

LIBRARY_CALLS = """
import ctypes, json, os, signal, sys, threading
from pathlib import Path

looked_up = []
find = ctypes.CDLL.__getattr__
def note(library, name):
    looked_up.append(name)
    return find(library, name)
ctypes.CDLL.__getattr__ = note

import torch

SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGPROF, signal.SIGHUP]

def state():
    return {
        "mallopt": looked_up.count("mallopt"),
        "signal handlers": [str(signal.getsignal(number)) for number in SIGNALS],
        "torch threads": [torch.get_num_threads(), torch.get_num_interop_threads()],
        "niceness": os.getpriority(os.PRIO_PROCESS, 0),
        "affinity": len(os.sched_getaffinity(0)),
    }

before = state()
import scgpt_hf
from anndata import read_h5ad
from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.source import open_source
from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cells.threads import DaemonThreadPool, prefetch
from scgpt_hf.cli.process import tune_process

folder = Path(sys.argv[1])
niceness = lambda: os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
build_census([folder / "cells.h5ad"], folder / "soma")
write_cache(open_source(folder / "soma"), folder / "cache")
for data in (read_h5ad(folder / "cells.h5ad"), *(folder / name for name in ("cells.h5ad", "soma", "cache"))):
    source = open_source(data, obs_filter="disease == 'normal'")
    list(prefetch(source.read(source.obs().index.to_numpy()[:n], ["donor_id"]).counts for n in (5, 10)))
with DaemonThreadPool(1, "test") as pool:
    threads = [pool.submit(niceness).result(), *prefetch(niceness() for _ in range(1))]
after = state()
tune_process()
with DaemonThreadPool(1, "test") as pool:
    tuned = [pool.submit(niceness).result(), *prefetch(niceness() for _ in range(1))]
print(json.dumps({"before": before, "after": after, "threads": threads, "tuned": tuned, "end": state()}))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the niceness of threads, which only Linux has")
def test_reading_and_writing_leave_the_process_as_it_was_until_a_command_tunes_it(small_cells, tmp_path):
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    done = subprocess.run([sys.executable, "-c", LIBRARY_CALLS, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["after"] == found["before"]
    niceness = found["before"]["niceness"]
    assert found["threads"] == [niceness, niceness]
    assert found["tuned"] == [max(10, niceness)] * 2
    # the command line lowers the priority of background threads only, and leaves the rest
    assert found["end"] | {"mallopt": 0} == found["before"]
    if platform.libc_ver()[0] == "glibc":
        assert found["end"]["mallopt"] > 0


ALLOCATE = """
import resource, sys
import numpy as np
from scgpt_hf.cli.process import tune_process
if sys.argv[1] == "tuned":
    tune_process()
for round in range(11):
    blocks = [np.ones(3 * 2**20, np.uint8) for _ in range(8)]  # numpy asks for huge pages from 4 MiB on
    del blocks
    if not round:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def page_faults(process: str) -> int:
    """Return the pages that the system clears for eight blocks of 3 MiB that are allocated and freed ten times."""
    command = [sys.executable, "-c", ALLOCATE, process]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt is set for glibc only")
def test_a_tuned_process_reuses_the_memory_that_it_freed():
    eight_blocks = 8 * 3 * 2**20 // 4096
    assert page_faults("tuned") < eight_blocks < page_faults("untouched")


def run_in_ascii(*arguments):
    """Run `scgpt-hf` in a locale that knows ASCII only, as in many containers, and return its exit code and output."""
    ascii_only = {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""}
    code = "import sys; from scgpt_hf.cli.report import main; sys.argv[0] = 'report.py'; main()"
    found = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, env=os.environ | ascii_only)
    return found.returncode, (found.stdout + found.stderr).decode("ascii")


def test_commands_print_and_refuse_names_clearly_where_the_locale_is_ascii(tmp_path):
    returncode, printed = run_in_ascii("--help")
    assert returncode == 0
    assert "report.py" in printed
    returncode, printed = run_in_ascii(str(tmp_path / "läufe"))
    assert returncode == 1
    assert printed.startswith("report.py: the locale of this process cannot express")
    assert "set PYTHONUTF8=1" in printed


@pytest.mark.parametrize("name", sorted(path.stem for path in (ROOT / "scripts").glob("*.py")))
def test_every_command_accepts_any_locale_first(name):
    module = {"cache_census": "cache"}.get(name, name)
    path = ROOT / "scgpt_hf" / "cli" / f"{module}.py"
    if path.exists():  # conformance.py is no command of the package
        body = next(node for node in ast.parse(path.read_text()).body if getattr(node, "name", "") == "main").body
        assert ast.unparse(body[1]) == "accept_any_locale()"
