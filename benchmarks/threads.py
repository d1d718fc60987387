"""Measure how much the data threads slow down a busy main thread, while they read and tokenize cells.

  python benchmarks/synthetic_census.py blood_100k --cells 100000
  python benchmarks/threads.py blood_100k [--cache CACHE]

The main thread has one of two workloads: a plain Python loop, or many small torch operations on one thread, similar to
those of a training on a GPU. It runs alone; while batches are streamed at the pace that a GPU needs; and while they are
streamed as fast as possible, with and without the lower priority of the data threads. A background thread takes the
batches and discards them. A slowdown of 1 means no cost. With fewer cores than threads, part of the slowdown comes from
sharing the cores. The speed of the stream while the main thread is busy is recorded as well.
"""

import argparse
import math
import threading
import time
from collections.abc import Callable
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path

import torch
from measuring import alternate, print_medians, write_result

from scgpt_hf.cells import threads
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.source import open_source
from scgpt_hf.cli.process import tune_process
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor

# Cells per second that one H100 (989 TFLOP/s, bf16) trains on at 35 % of its peak, with scGPT's model: cells of 450
# tokens with 153 MFLOP per token (forward and backward), and cells of 120 tokens with 128 MFLOP per token.
PACE_OF_SOMA, PACE_OF_CACHE = 5_000, 22_000
CELLS_PER_WINDOW = 8 * 2048  # cells that are shuffled together


def python_loop(seconds: float) -> float:
    """Run a plain Python loop, and return additions per microsecond."""
    started, n = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        total = 0
        for number in range(10_000):
            total += number
        n += 10_000
    return n / spent / 1e6


def small_operations(seconds: float) -> float:
    """Add two small tensors repeatedly, and return thousands of additions per second."""
    one, other = torch.ones(64), torch.ones(64)
    started, n = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        for _ in range(1000):
            one = torch.add(one, other)
        n += 1000
    return n / spent / 1e3


@contextmanager
def streaming(path: Path, speeds: list[float], lowered: bool, pace: float):
    """Stream tokens in the background, at most `pace` cells per second, and append the speed to `speeds`."""
    threads.set_background_priority(lowered)
    stop, ready, counted = threading.Event(), threading.Event(), [0]
    source = open_source(path)
    cells, size = source.obs().index.to_numpy(), source.chunk_size
    order = partial(
        plan_epoch, cells, seed=0, batch_size=32, chunk_size=size, chunks_per_window=CELLS_PER_WINDOW // size
    )
    plans = [order(epoch=epoch) for epoch in range(100)]
    processor = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist())

    def consume() -> None:
        stream = stream_cells(source, plans, processor, StreamConfig(seed=0, mask_ratios=(0.25, 0.5, 0.75)))
        with closing(threads.prefetch(stream)) as batches:
            counted[0] += len(next(batches)["cu_seq_lens_q"]) - 1
            started = time.perf_counter()
            ready.set()
            for batch in batches:
                counted[0] += len(batch["cu_seq_lens_q"]) - 1
                if stop.wait(max(0.0, counted[0] / pace - (time.perf_counter() - started))):
                    return

    consumer = threading.Thread(target=consume, daemon=True)
    consumer.start()
    if not ready.wait(timeout=120):
        raise RuntimeError("no batch within two minutes")
    started, before = time.perf_counter(), counted[0]
    yield
    speeds.append((counted[0] - before) / (time.perf_counter() - started))
    stop.set()
    consumer.join()
    source.close()


def main() -> None:
    """Run all measurements and write results/threads.json."""
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="folder written by synthetic_census.py")
    parser.add_argument(
        "--cache", type=Path, help="cache of the same cells, written by cache_census.py; measured as well"
    )
    parser.add_argument(
        "--seconds", type=float, default=4.0, help="duration of each measurement (default: %(default)s)"
    )
    parser.add_argument("--repeats", type=int, default=3, help="rounds of each arm (default: %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {}

    streams = {
        f"SOMA, {PACE_OF_SOMA:,} cells/s": (arguments.census, True, PACE_OF_SOMA),
        "SOMA, as fast as possible": (arguments.census, True, math.inf),
        "SOMA, as fast as possible, equal priority": (arguments.census, False, math.inf),
    }
    if arguments.cache:
        streams[f"cache, {PACE_OF_CACHE:,} cells/s"] = (arguments.cache, True, PACE_OF_CACHE)

    def work_during(work: Callable[[float], float], speeds: list[float], stream: tuple[Path, bool, float]) -> float:
        path, lowered, pace = stream
        with streaming(path, speeds, lowered, pace):
            return work(arguments.seconds)

    for name, work in {"python loop": python_loop, "small torch operations": small_operations}.items():
        speeds: dict[str, list[float]] = {arm: [] for arm in streams}
        arms = {"alone": partial(work, arguments.seconds)}
        arms |= {arm: partial(work_during, work, speeds[arm], stream) for arm, stream in streams.items()}
        medians = alternate(arms, arguments.repeats)
        print(name)
        print_medians(medians, "alone", "units")
        stream = {key: sorted(values)[len(values) // 2] for key, values in speeds.items()}
        print("stream, cells/s:", {key: round(value) for key, value in stream.items()})
        slowdown = {arm: medians["alone"] / value for arm, value in medians.items() if arm != "alone"}
        result[name] = {"speed": medians, "slowdown": slowdown, "stream_cells_per_s": stream}
    write_result("threads", result)


if __name__ == "__main__":
    main()
