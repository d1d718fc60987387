"""Measure windows read ahead from a Census on S3, a cache written in an epoch (`--cache_dir`), and a cache on S3.

  python benchmarks/synthetic_census.py blood_32k --cells 32768
  python benchmarks/s3_caching.py blood_32k

The server is that of `s3_reading.py`, with its latency and bandwidth. Every arm reads the same windows in the same
order, after a first pass in which the reader opens the arrays and chooses its number of threads. The pipeline reads at
least one window ahead: two at the same time, or as many as keep the threads of the reader busy (the arm `pipeline`).
The arm `cache_dir` stores what it reads, and completes the cache at the end; it must equal the cache that `write_cache`
makes of the same cells. The arm `download` gets that cache, in files of a chunk each, from another such server.
"""

import argparse
import tempfile
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from huggingface_hub import constants
from measuring import peak_memory_gb, write_result
from s3_reading import EXPERIMENT, count, serving

from scgpt_hf.cells.block import CHUNK_SIZE, CellBlock, Int64Array
from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.cache.write_through import CachingSource
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.cells.source import CellSource, open_source

SEED = 0


def read_all(source: CellSource, windows: Sequence[Int64Array], n_at_once: int) -> float:
    """Read the windows in order, some at the same time, and return how many seconds it took."""
    started, reading = time.perf_counter(), deque[Future[CellBlock]]()
    with ThreadPoolExecutor(n_at_once) as pool:
        for window in windows:
            if len(reading) == n_at_once:
                reading.popleft().result()
            reading.append(pool.submit(source.read, window))
        for future in reading:
            future.result()
    return time.perf_counter() - started


def measure(windows: Sequence[Int64Array], n_repeats: int, folder: Path) -> dict[str, Any]:
    """Measure all arms for one latency, in turn in each repeat.

    Args:
        windows: the cells of each window, which together are all cells from 0 on.
        n_repeats: how often each arm is measured.
        folder: an empty folder for the caches.
    """
    cell_ids = np.sort(np.concatenate(windows))
    speeds: dict[str, list[float]] = {}
    finish_s = []
    with CensusSource(EXPERIMENT, primary_only=False) as source:
        read_all(source, windows, 2)
        for repeat in range(n_repeats):
            n_pipeline = 1 + -(-source.cells_at_once // len(windows[0]))
            for name, n_at_once in {"1 at once": 1, "2 at once": 2, "4 at once": 4, "pipeline": n_pipeline}.items():
                seconds = read_all(source, windows, n_at_once)
                speeds.setdefault(name, []).append(len(cell_ids) / seconds)
            caching = CachingSource(source, folder / str(repeat), cell_ids)
            seconds = read_all(caching, windows, 2)
            speeds.setdefault("2 at once, cache_dir", []).append(len(cell_ids) / seconds)
            started = time.perf_counter()
            caching.finish().close()
            finish_s.append(time.perf_counter() - started)
        threads = source.cells_at_once // CHUNK_SIZE
        write_cache(source, folder / "expected", cell_ids=cell_ids)
        write_cache(source, folder / "store" / "blood", cell_ids=cell_ids, cells_per_shard=CHUNK_SIZE)
    n_bytes = _require_equal(folder / "0", folder / "expected")
    return {
        "threads": threads,
        "windows_of_pipeline": n_pipeline,
        "cells_per_s": {name: {"median": float(np.median(each)), "each": each} for name, each in speeds.items()},
        "finish_s": finish_s,
        "bytes_per_cell": n_bytes / len(cell_ids),
    }


def measure_download(store: Path, n_cells: int, n_repeats: int, latency_s: float, mbit: float) -> dict[str, Any]:
    """Measure `open_source` of a cache in a store until its files are on the disk."""
    speeds, sent = [], []
    with serving(store, latency_s, mbit) as server:
        for _ in range(n_repeats):
            before, started = count(server), time.perf_counter()
            with tempfile.TemporaryDirectory() as constants.HF_HOME:
                open_source("s3://census/blood")
                speeds.append(n_cells / (time.perf_counter() - started))
            sent.append(count(server) - before)
    n_requests, n_bytes = np.median(sent, axis=0)
    return {
        "cells_per_s": {"median": float(np.median(speeds)), "each": speeds},
        "requests": float(n_requests),
        "bytes_per_cell": float(n_bytes / n_cells),
    }


def _require_equal(found: Path, expected: Path) -> int:
    """Raise unless two folders have the same files; return their size in bytes."""
    contents = [{path.name: path.read_bytes() for path in folder.iterdir()} for folder in (found, expected)]
    if contents[0] != contents[1]:
        raise ValueError(f"{found} differs from {expected}")
    return sum(map(len, contents[0].values()))


def main() -> None:
    """Measure all latencies."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="folder written by synthetic_census.py")
    parser.add_argument("--latency_ms", type=float, nargs="+", default=[30, 150], help="wait before each answer")
    parser.add_argument("--mbit", type=float, default=1000, help="bandwidth of all connections together")
    parser.add_argument("--chunks", type=int, default=16, help="chunks that each arm reads")
    parser.add_argument("--chunks_per_window", type=int, default=4, help="chunks of a window")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each arm")
    arguments = parser.parse_args()
    cell_ids = np.arange(arguments.chunks * CHUNK_SIZE)
    plan = plan_epoch(cell_ids, seed=SEED, epoch=0, batch_size=512, chunks_per_window=arguments.chunks_per_window)
    windows = [plan.window(index).ravel() for index in range(plan.n_windows)]
    results = {}
    for milliseconds in arguments.latency_ms:
        server = serving(arguments.census, milliseconds / 1000, arguments.mbit)
        with server, tempfile.TemporaryDirectory() as folder:
            found = measure(windows, arguments.repeats, Path(folder))
            store = Path(folder) / "store"
            found["download"] = measure_download(
                store, len(cell_ids), arguments.repeats, milliseconds / 1000, arguments.mbit
            )
        results[f"{milliseconds:g} ms"] = found
        speeds = {name: round(speed["median"]) for name, speed in found["cells_per_s"].items()}
        print(milliseconds, speeds, found["download"], [round(seconds, 2) for seconds in found["finish_s"]], flush=True)
    write_result("s3_caching", {"mbit": arguments.mbit, "peak_gb": peak_memory_gb(), "results": results})


if __name__ == "__main__":
    main()
