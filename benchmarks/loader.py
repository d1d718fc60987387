"""Compare the speed of reading a Census with this package, with tiledbsoma-ml, and with a full scan of the array.

  python benchmarks/synthetic_census.py blood_100k --cells 100000
  python benchmarks/loader.py blood_100k

Reading is warm: every file is read once before. A full scan by TileDB, with --threads threads that discard what they
read, is the upper limit of the disk format. This package reads the files of a local Census with its native reader;
another arm reads them through TileDB, which is the only way for a remote Census. tiledbsoma-ml yields raw rows,
shuffled as well as ours: chunks of 2,048 cells, and as many in its buffer as we have in a shuffle window. It is
measured with two sizes of TileDB's buffers; the better one counts. If it is not installed, its arms are skipped.

How well cells are mixed is measured on the batches, relative to uniform sampling: the entropy of the donors, and the
share of pairs of cells in a batch that come from the same chunk of 2,048 cells.
"""

import argparse
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import closing, contextmanager
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import tiledbsoma as soma
from measuring import alternate, peak_memory_gb, print_medians, ratios, write_result

from scgpt_hf.cells.block import CHUNK_SIZE
from scgpt_hf.cells.schedule.epoch import EpochPlan, plan_epoch
from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.cells.soma.context import TILEDB_CONFIG, open_context
from scgpt_hf.cells.source import open_source
from scgpt_hf.cells.threads import in_order, prefetch
from scgpt_hf.cli.process import tune_process
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.counts_scgpt import SparseCounts
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

try:
    from tiledbsoma_ml import ExperimentDataset
except ImportError:
    ExperimentDataset = None

BATCH = 32
# Selects a third of the cells of a synthetic Census, in runs of about 12.
THIRD = "cell_type in ['CD4-positive, alpha-beta T cell', 'platelet']"
CELLS_PER_TAKE = 512  # cells whose rows are gathered together, as in the pipeline
CHUNKS_PER_WINDOW = 32  # default of plan_epoch
BUFFERS = (
    64 * 2**20,
    2**30,
)  # bytes per column of a query, for tiledbsoma-ml; the second is the default of TileDB-SOMA


def full_scan(path: Path, n_threads: int) -> float:
    """Read all of X in aligned chunks, discard it, and return cells per second."""
    uri = f"{path}/census_data/homo_sapiens/ms/RNA/X/raw"
    with soma.SparseNDArray.open(uri) as array:
        n_cells = array.shape[0]
    starts = range(0, n_cells, 4 * CHUNK_SIZE)

    def scan(thread: int) -> None:
        with soma.SparseNDArray.open(uri, context=open_context(False, n_threads=1)) as array:
            for start in starts[thread::n_threads]:
                for _ in array.read((slice(start, min(start + 4 * CHUNK_SIZE, n_cells) - 1),)).tables():
                    pass

    started = time.perf_counter()
    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(scan, range(n_threads)))
    return n_cells / (time.perf_counter() - started)


def plan_of(source: CensusSource) -> EpochPlan:
    """Plan the first epoch over all cells of the source."""
    return plan_epoch(source.obs().index.to_numpy(), seed=0, epoch=0, batch_size=BATCH)


def raw_rows(source: CensusSource, plan: EpochPlan) -> Iterator[SparseCounts]:
    """Yield the CSR arrays of each batch of an epoch, shape (cells, genes). The next window is read meanwhile."""
    reads = (partial(source.read, plan.window(index).ravel()) for index in range(plan.n_windows))
    with ThreadPoolExecutor(2) as readers:
        for block in in_order(readers, reads, n_ahead=1):
            for start in range(0, len(block), CELLS_PER_TAKE):
                cells = block.take(np.arange(start, min(start + CELLS_PER_TAKE, len(block))))
                for first in range(0, len(cells), BATCH):
                    yield cells.take(np.arange(first, min(first + BATCH, len(cells))))
            del block  # otherwise two blocks would be in memory while the next one is taken


def ours_through_tiledb(path: Path, n_threads: int) -> float:
    """Read an epoch of raw rows through TileDB, with the native reader turned off, and return cells per second."""
    return ours_raw(path, n_threads, native=False)


def ours_raw(path: Path, n_threads: int, obs_filter: str | None = None, *, native: bool = True) -> float:
    """Read an epoch of raw rows, and return cells per second."""
    uri = f"{path}/census_data/homo_sapiens"
    with CensusSource(uri, obs_filter=obs_filter, n_threads=n_threads, native=native) as source:
        plan = plan_of(source)
        started = time.perf_counter()
        n_cells = sum(rows.shape[0] for rows in raw_rows(source, plan))
        return n_cells / (time.perf_counter() - started)


@contextmanager
def token_batches(path: Path, n_threads: int) -> Iterator[Iterator[dict]]:
    """Open an iterator over the batches of an epoch, tokenized, masked, packed and prefetched."""
    with CensusSource(f"{path}/census_data/homo_sapiens", n_threads=n_threads) as source:
        plan, processor = plan_of(source), processor_of(source)
        batches = stream_cells(source, [plan], processor, StreamConfig(seed=0, mask_ratios=(0.25, 0.5, 0.75)))
        with closing(prefetch(batches)) as ready:
            yield ready


def ours_tokens(path: Path, n_threads: int) -> float:
    """Read an epoch of such batches, and return cells per second."""
    with token_batches(path, n_threads) as batches:
        started = time.perf_counter()
        n_cells = sum(len(batch["cu_seq_lens_q"]) - 1 for batch in batches)
        return n_cells / (time.perf_counter() - started)


def processor_of(source: CensusSource) -> ScGPTProcessor:
    """Return a processor for all genes of the source, with 51 bins and up to 1,200 genes per cell."""
    return ScGPTProcessor.from_genes(source.genes["feature_id"].tolist())


def soma_ml(path: Path, buffer_bytes: int, obs_filter: str | None = None, batches: list | None = None) -> float:
    """Read an epoch of raw rows with tiledbsoma-ml, and return cells per second. Append cell ids to `batches`."""
    config = TILEDB_CONFIG | {"soma.init_buffer_bytes": buffer_bytes}
    context = soma.SOMATileDBContext(tiledb_config=config)
    with soma.Experiment.open(f"{path}/census_data/homo_sapiens", context=context) as experiment:
        query = experiment.axis_query("RNA", obs_query=soma.AxisQuery(value_filter=obs_filter))
        dataset = ExperimentDataset(
            query, "raw", batch_size=BATCH, io_batch_size=CHUNKS_PER_WINDOW * CHUNK_SIZE, shuffle_chunk_size=CHUNK_SIZE,
            return_sparse_X=True, seed=0,
        )  # fmt: skip
        started, n_cells = time.perf_counter(), 0
        for rows, obs in dataset:
            n_cells += rows.shape[0]
            if batches is not None:
                batches.append(obs["soma_joinid"].to_numpy())
        return n_cells / (time.perf_counter() - started)


def soma_ml_arms(arms: dict) -> dict:
    """Return these arms under names that begin with tiledbsoma-ml, or none if it is not installed."""
    return {} if ExperimentDataset is None else {f"tiledbsoma-ml, {name}": arm for name, arm in arms.items()}


def mixing(batches: list[np.ndarray], donors: np.ndarray) -> dict[str, float]:
    """Measure how well donors and chunks are mixed in batches of cell ids, relative to uniform sampling."""
    rng = np.random.default_rng(0)
    uniform = [rng.choice(len(donors), BATCH, replace=False) for _ in range(2000)]
    same_chunk = [share_of_pairs(ids // CHUNK_SIZE) for ids in batches]
    return {
        "donor_entropy_of_uniform": float(np.mean([entropy(donors[ids]) for ids in batches]))
        / float(np.mean([entropy(donors[ids]) for ids in uniform])),
        "same_chunk_pairs": float(np.mean(same_chunk)),
        "same_chunk_pairs_uniform": float(np.mean([share_of_pairs(ids // CHUNK_SIZE) for ids in uniform])),
    }


def entropy(labels: np.ndarray) -> float:
    """Return the Shannon entropy of the labels, in nats."""
    shares = np.unique(labels, return_counts=True)[1] / len(labels)
    return float(-(shares * np.log(shares)).sum())


def share_of_pairs(labels: np.ndarray) -> float:
    """Return the share of all pairs of cells that have the same label."""
    counts = np.unique(labels, return_counts=True)[1]
    return float((counts * (counts - 1)).sum() / (len(labels) * (len(labels) - 1)))


def compare_mixing(path: Path) -> dict[str, dict[str, float]]:
    """Measure the mixing of our batches and, if it is installed, of tiledbsoma-ml's."""
    source = open_source(path)
    donors = pd.factorize(source.obs(["donor_id"])["donor_id"])[0]
    plan = plan_of(source)
    ours = [step for index in range(plan.n_windows) for step in plan.window(index)]
    mixed = {"ours": mixing(ours, donors)}
    if ExperimentDataset is not None:
        theirs: list[np.ndarray] = []
        soma_ml(path, BUFFERS[0], batches=theirs)
        mixed["tiledbsoma-ml"] = mixing(theirs[: len(ours)], donors)
    return mixed


def first_batch_s(path: Path, n_threads: int) -> float:
    """Return the time from opening the source to the first packed batch, in seconds."""
    started = time.perf_counter()
    with token_batches(path, n_threads) as batches:
        next(batches)
        return time.perf_counter() - started


def memory_gb(path: Path, n_threads: int) -> float:
    """Return the peak memory of a subprocess that streams an epoch of tokens."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(_stream_and_measure, path, n_threads).result()


def _stream_and_measure(path: Path, n_threads: int) -> float:
    tune_process()
    ours_tokens(path, n_threads)
    return peak_memory_gb()


def main() -> None:
    """Run the chosen measurements and write results/loader_CENSUS.json."""
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="folder written by synthetic_census.py")
    parser.add_argument(
        "--threads", type=int, default=4, help="reading threads, of the scan and of ours (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each arm (default: %(default)s)")
    parser.add_argument("--parts", nargs="+", default=["speed", "filter", "threads", "start"],
                        choices=["speed", "filter", "threads", "start"], help="default: all")  # fmt: skip
    arguments = parser.parse_args()
    path, n_threads, repeats = arguments.census, arguments.threads, arguments.repeats
    if ExperimentDataset is None:
        print("tiledbsoma-ml is not installed, so its arms are skipped; `pip install tiledbsoma-ml` adds them")
    result = {}
    full_scan(path, n_threads)
    if "speed" in arguments.parts:
        arms = {
            "full scan": partial(full_scan, path, n_threads),
            "ours, raw rows": partial(ours_raw, path, n_threads),
            "ours, raw rows, through TileDB": partial(ours_through_tiledb, path, n_threads),
            "ours, tokens masked and packed": partial(ours_tokens, path, n_threads),
            **soma_ml_arms({f"{size >> 20} MiB buffers": partial(soma_ml, path, size) for size in BUFFERS}),
        }
        result["speed"] = compare(arms, repeats)
        result["mixing"] = compare_mixing(path)
        print(pd.DataFrame(result["mixing"]).to_string())
    if "filter" in arguments.parts:
        arms = {
            "ours, a third in short runs": partial(ours_raw, path, n_threads, THIRD),
            **soma_ml_arms({"a third in short runs": partial(soma_ml, path, BUFFERS[0], THIRD)}),
        }
        result["filter"] = compare(arms, repeats)
    if "threads" in arguments.parts:
        arms = {f"{n} threads, {what}": partial(arm, path, n) for n in (1, 2, 4)
                for what, arm in (("full scan", full_scan), ("raw", ours_raw), ("tokens", ours_tokens))}  # fmt: skip
        result["threads"] = compare(arms, repeats)
    if "start" in arguments.parts:
        result["start"] = alternate({"first batch, s": partial(first_batch_s, path, n_threads)}, repeats)
        result["start"]["peak memory, GB"] = memory_gb(path, n_threads)
        print(result["start"])
    write_result(f"loader_{path.name}", result)


def compare(arms: dict, repeats: int) -> dict[str, dict[str, float]]:
    """Measure arms after a warm-up round; print and return medians in cells per second and ratios to the first arm."""
    alternate(arms, 1)
    medians = alternate(arms, repeats)
    print_medians(medians, next(iter(arms)), "cells/s")
    return {"cells_per_s": medians, "ratio": ratios(medians, next(iter(arms)))}


if __name__ == "__main__":
    main()
