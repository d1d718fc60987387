"""Whether freed memory serves again, without the system's help."""

import platform
import subprocess
import sys

import pytest

from scgpt_hf.cells import memory

CHURN = """
import resource, runpy
import numpy as np
if {keep}:
    runpy.run_path({file!r})["keep_freed_memory"]()
for time in range(11):
    blocks = [np.ones(3 * 2**20, np.uint8) for _ in range(8)]  # numpy asks for huge pages from 4 MiB on
    del blocks
    if not time:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    """Return the pages that the system cleared for eight blocks of 3 MiB, made and freed ten times."""
    script = CHURN.format(keep=keep, file=memory.__file__)
    return int(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is told")
def test_blocks_that_were_freed_become_the_next_ones() -> None:
    eight_blocks = 8 * 3 * 2**20 // 4096
    assert faults(keep=True) < eight_blocks < faults(keep=False)
