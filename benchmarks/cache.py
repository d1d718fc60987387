"""Measure a cache: write it from a SOMA, read it in uniformly random order (raw and tokenized), and plan an epoch.

  python benchmarks/synthetic_census.py census100k --cells 100000
  python benchmarks/cache.py census100k --out cache100k

Reading is warm: each arm has read the cache once before. The raw arms build the CSR arrays of 512 cells at a time, as
the pipeline does. The tokenized arms read, bin, and sample up to 1,200 genes per cell, from all genes and from 1,200
highly variable genes as in scGPT's recipe; worker threads take 512 cells of a block at a time. For comparison, the
library `datasets` reads the same rows of the same folder as NumPy arrays, map-style. Medians are printed.
"""

import argparse
import shutil
import time
import tracemalloc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from measuring import alternate, print_medians, write_result

from scgpt_hf.cells.block import CellBlock
from scgpt_hf.cells.cache.jobs import write_cache
from scgpt_hf.cells.cache.manifest import read_manifest
from scgpt_hf.cells.cache.reader import CacheSource, uniform_chunk_size
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.selection.hvg import highly_variable_genes
from scgpt_hf.cells.source import open_source
from scgpt_hf.cli.process import tune_process
from scgpt_hf.pipeline.genes import match_source_genes
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

BLOCK = 32_768  # cells read together
PIECE = 512  # cells that a thread takes and tokenizes at a time, as in the pipeline
HVG_CELLS = 10_000  # cells from which the variable genes are chosen
CENSUS_CELLS = 160_000_000


def write(census: Path, folder: Path) -> float:
    """Write a new cache with verified hashes and its manifest, and return the speed in cells per second."""
    shutil.rmtree(folder, ignore_errors=True)
    with closing(open_source(census)) as source:
        n_cells = len(source.obs())
        started = time.perf_counter()
        write_cache(source, folder)
        return n_cells / (time.perf_counter() - started)


def read(source: CacheSource, cell_ids: np.ndarray, n_workers: int, work: Callable[[CellBlock, np.ndarray], Any]
         ) -> float:  # fmt: skip
    """Read all cells in random order, block by block, apply `work` to pieces, and return cells per second."""
    order = np.random.default_rng(0).permutation(cell_ids)

    def take(block: CellBlock, first: int) -> int:
        cells = np.arange(first, min(first + PIECE, len(block)))
        work(block.take(cells), block.cell_ids[cells])
        return len(cells)

    n_cells, started = 0, time.perf_counter()
    with ThreadPoolExecutor(n_workers) as pool:
        for start in range(0, len(order), BLOCK):
            block = source.read(order[start : start + BLOCK])
            n_cells += sum(pool.map(partial(take, block), range(0, len(block), PIECE)))
    return n_cells / (time.perf_counter() - started)


def do_nothing(counts: CellBlock, cell_ids: np.ndarray) -> None:
    """Do nothing, to measure only reading."""


def tokenize(processor: ScGPTProcessor, columns: np.ndarray, counts: CellBlock, cell_ids: np.ndarray) -> None:
    """Tokenize the cells."""
    processor.tokenize(counts, columns, cell_ids=cell_ids, seed=0, epoch=0)


def read_map_style(folder: Path, n_cells: int) -> float:
    """Read a block of random rows as NumPy with `datasets`, and return cells per second."""
    rows = datasets.load_from_disk(str(folder)).select_columns(["gene", "count"]).with_format("numpy")
    order = np.random.default_rng(0).permutation(len(rows))[:n_cells]
    started = time.perf_counter()
    for start in range(0, len(order), PIECE):
        rows[order[start : start + PIECE]]
    return len(order) / (time.perf_counter() - started)


def plan(n_cells: int, chunk_size: int) -> dict[str, float]:
    """Return the time and memory of planning one epoch, not counting the memory of the ids themselves."""
    cell_ids = np.arange(n_cells, dtype=np.int64)
    arguments: dict[str, Any] = {"seed": 0, "epoch": 0, "batch_size": 4096, "chunk_size": chunk_size}
    arguments["chunks_per_window"] = BLOCK // chunk_size
    started = time.perf_counter()
    plan_epoch(cell_ids, **arguments)
    seconds = time.perf_counter() - started
    tracemalloc.start()
    planned = plan_epoch(cell_ids, **arguments)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    started = time.perf_counter()
    planned.window(7)
    window_s = time.perf_counter() - started
    return {
        "chunk_size": chunk_size,
        "seconds": seconds,
        "peak_gb": peak / 1e9,
        "kept_gb": kept / 1e9,
        "window_s": window_s,
    }


def main() -> None:
    """Run all measurements, print the medians and write results/cache.json."""
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="local SOMA in the Census layout")
    parser.add_argument("--out", type=Path, required=True, help="folder of the cache; replaced if it exists")
    parser.add_argument("--keep", action="store_true", help="read an existing cache, and do not measure writing")
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each arm (default: %(default)s)")
    parser.add_argument(
        "--threads", type=int, nargs="*", default=[1, 2, 4], help="numbers of threads to measure (default: 1 2 4)"
    )
    options = parser.parse_args()
    open_source(options.census).read(np.arange(PIECE)).take(np.arange(PIECE))  # compile first
    written = {} if options.keep else alternate({"write": partial(write, options.census, options.out)}, options.repeats)
    sources = {n: CacheSource(options.out, n_threads=n) for n in options.threads}
    cell_ids = sources[1].obs().index.to_numpy()
    genes = sources[1].genes["feature_id"].to_numpy()
    chosen = highly_variable_genes(sources[1], cell_ids[:HVG_CELLS], 1200, batch_key=None)
    processors = {
        "all genes": ScGPTProcessor.from_genes(genes.tolist(), max_tokens=1201),
        "1,200 variable genes": ScGPTProcessor.from_genes(genes[chosen].tolist(), max_tokens=1201),
    }
    arms = {f"raw, {n} threads": partial(read, source, cell_ids, n, do_nothing) for n, source in sources.items()}
    for name, processor in processors.items():
        work = partial(tokenize, processor, match_source_genes(sources[1].genes, processor)[0])
        for n, source in sources.items():
            arms[f"tokenized, {name}, {n} threads"] = partial(read, source, cell_ids, n, work)
    arms["datasets, map-style, 1 thread"] = partial(read_map_style, options.out, BLOCK)
    for arm in arms.values():
        arm()
    medians = written | alternate(arms, options.repeats)
    print_medians(medians, "datasets, map-style, 1 thread", "cells/s")
    plans = [plan(CENSUS_CELLS, size) for size in (2048, uniform_chunk_size(CENSUS_CELLS))]
    for planned in plans:
        print("plan of 160 million cells:", ", ".join(f"{name} {value:,.3g}" for name, value in planned.items()))
    shards = read_manifest(options.out)[1]
    size = {"cells": len(cell_ids), "bytes_per_cell": sum(shard.n_bytes for shard in shards) / len(cell_ids)}
    write_result("cache", {"cache": size, "cells_per_second": medians, "plans": plans})


if __name__ == "__main__":
    main()
