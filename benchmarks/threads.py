"""What the data threads cost a busy main thread: how much slower it runs while cells are read and tokenised beside it.

  python benchmarks/synthetic_census.py blood_100k --cells 100000
  python benchmarks/threads.py blood_100k [--cache CACHE]

The main thread does one of two things for a while: a plain Python loop, and many small torch operations on one thread,
as a GPU's training thread issues them. It does them alone; beside a stream that rests while nobody asks for a batch, at
a pace that a GPU asks for; and beside one that is never allowed to rest, with and without the data threads' lower
priority. Another thread takes the batches and throws them away. A slowdown of 1 means no cost; with fewer cores than
threads, some is the cores' own. The stream's speed while the main thread is busy is measured beside it.
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

# Cells per second that one H100 (989 TFLOP/s, bf16) asks for at 35 % of its peak: of 450 tokens, 153 MFLOP each in the
# seed's model, forward and backward; of 120 tokens, 128 MFLOP each.
PACE_OF_SOMA, PACE_OF_CACHE = 5_000, 22_000
POOL = 8 * 2048  # cells that are shuffled together


def python_loop(seconds: float) -> float:
    """Return additions per microsecond of a plain Python loop."""
    started, n = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        total = 0
        for number in range(10_000):
            total += number
        n += 10_000
    return n / spent / 1e6


def small_operations(seconds: float) -> float:
    """Return thousands per second of additions of two small tensors."""
    one, other = torch.ones(64), torch.ones(64)
    started, n = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        for _ in range(1000):
            one = torch.add(one, other)
        n += 1000
    return n / spent / 1e3


@contextmanager
def streaming(path: Path, speeds: list[float], lowered: bool, pace: float):
    """Stream tokens in the background, at most `pace` cells per second; append its speed to a list."""
    threads.set_background_priority(lowered)
    stop, ready, counted = threading.Event(), threading.Event(), [0]
    source = open_source(path)
    cells, size = source.obs().index.to_numpy(), source.chunk_size
    order = partial(plan_epoch, cells, seed=0, batch_size=32, chunk_size=size, chunks_per_window=POOL // size)
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
    """Measure and write `results/threads.json`."""
    tune_process()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="folder that synthetic_census.py wrote")
    parser.add_argument("--cache", type=Path, help="folder that cache_census.py wrote of it: measure that, too")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {}

    beside = {
        f"SOMA, {PACE_OF_SOMA:,} cells/s": (arguments.census, True, PACE_OF_SOMA),
        "SOMA, without a rest": (arguments.census, True, math.inf),
        "SOMA, without a rest, equal priority": (arguments.census, False, math.inf),
    }
    if arguments.cache:
        beside[f"cache, {PACE_OF_CACHE:,} cells/s"] = (arguments.cache, True, PACE_OF_CACHE)

    def work_beside(work: Callable[[float], float], speeds: list[float], stream: tuple[Path, bool, float]) -> float:
        path, lowered, pace = stream
        with streaming(path, speeds, lowered, pace):
            return work(arguments.seconds)

    for name, work in {"python loop": python_loop, "small torch operations": small_operations}.items():
        speeds: dict[str, list[float]] = {arm: [] for arm in beside}
        arms = {"alone": partial(work, arguments.seconds)}
        arms |= {arm: partial(work_beside, work, speeds[arm], stream) for arm, stream in beside.items()}
        medians = alternate(arms, arguments.repeats)
        print(name)
        print_medians(medians, "alone", "a time")
        stream = {key: sorted(values)[len(values) // 2] for key, values in speeds.items()}
        print("stream, cells/s:", {key: round(value) for key, value in stream.items()})
        slowdown = {arm: medians["alone"] / value for arm, value in medians.items() if arm != "alone"}
        result[name] = {"speed": medians, "slowdown": slowdown, "stream_cells_per_s": stream}
    write_result("threads", result)


if __name__ == "__main__":
    main()
