"""Whether freed memory serves again, without the system's help."""

import platform
import subprocess
import sys
from pathlib import Path

import pytest
import tiledbsoma as soma
from anndata import AnnData

from scgpt_hf.cells.soma import memory
from scgpt_hf.cells.soma.build import build_census
from scgpt_hf.cells.source import open_source

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


def test_every_context_is_ours(tmp_path: Path, small_cells: list[AnnData], monkeypatch: pytest.MonkeyPatch) -> None:
    """With others queries trim, which now and then corrupts memory; see `memory.py`."""
    opened, without = [], []

    def noting(call):
        def noted(*args, context=None, **settings):
            opened.append(args[0])
            if context is None or not memory.TILEDB_CONFIG.items() <= context.tiledb_config.items():
                without.append(args[0])
            return call(*args, context=context, **settings)

        return noted

    for kind in (soma.Experiment, soma.Collection, soma.DataFrame, soma.SparseNDArray):
        for name in ("open", "create"):
            monkeypatch.setattr(kind, name, noting(getattr(kind, name)))
    small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
    for data in (tmp_path / "cells.h5ad", build_census([tmp_path / "cells.h5ad"], tmp_path / "soma")):
        with open_source(data) as source:
            source.read(source.obs().index.to_numpy()[:5], ["donor_id"])
    assert opened
    assert {"homo_sapiens", "obs", "var", "raw"} <= {uri.rsplit("/", 1)[-1] for uri in opened}
    assert without == []
