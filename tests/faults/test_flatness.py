"""Memory, open files and threads do not grow while a stream runs; `benchmarks/soak.py` checks 5,000 steps."""

import gc
import threading
import tracemalloc
from contextlib import closing
from itertools import islice

import numpy as np
import psutil
import pytest

from scgpt_hf.cells.files.reader import AnnDataSource
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.source import open_source
from scgpt_hf.cells.threads import prefetch
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

WARM_UP, STEPS = 200, 400


@pytest.fixture(params=["soma", "h5ad"])
def source(request, small_census, small_cells, tmp_path):
    if request.param == "soma":
        with open_source(small_census) as source:
            yield source
    else:
        small_cells[0].write_h5ad(tmp_path / "cells.h5ad")
        with AnnDataSource(tmp_path / "cells.h5ad") as source:
            yield source


def measure_use(process) -> tuple[int, int, int]:
    """Return the bytes that Python has allocated, and the numbers of open files and threads."""
    gc.collect()
    return tracemalloc.get_traced_memory()[0], process.num_fds(), threading.active_count()


def test_hundreds_of_steps_need_no_more_memory_files_or_threads(source):
    processor, process = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist()), psutil.Process()
    ids = source.obs().index.to_numpy(np.int64)
    plans = [plan_epoch(ids, seed=0, epoch=epoch, batch_size=8, chunk_size=32) for epoch in range(60)]
    stream = stream_cells(source, plans, processor, StreamConfig(seed=0, mask_ratios=(0.5,)))
    tracemalloc.start()
    try:
        with closing(prefetch(stream)) as batches:
            assert len(list(islice(batches, WARM_UP))) == WARM_UP
            memory, files, threads = measure_use(process)
            assert len(list(islice(batches, STEPS))) == STEPS
            later = measure_use(process)
    finally:
        tracemalloc.stop()
    assert later[0] - memory < 500_000  # leaking one batch per step would need 4 MB
    assert later[1] <= files + 2
    assert later[2] <= threads


def test_files_are_closed_with_their_source_and_when_opening_fails(small_cells, tmp_path):
    paths = [tmp_path / f"{name}.h5ad" for name in ("one", "two")]
    small_cells[0].write_h5ad(paths[0])
    broken = small_cells[1].copy()
    broken.X = broken.X * 0.5
    broken.write_h5ad(paths[1])
    process = psutil.Process()

    def open_h5ad_files() -> list[str]:
        return [file.path for file in process.open_files() if file.path.endswith(".h5ad")]

    with AnnDataSource(paths[0]):
        assert open_h5ad_files() == [str(paths[0])]
    assert not open_h5ad_files()
    with pytest.raises(ValueError, match="expected raw counts"):
        AnnDataSource(paths)
    assert not open_h5ad_files()
