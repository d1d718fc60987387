"""What the data threads cost a busy main thread: how much slower it runs while cells are read and tokenised beside it.

  python benchmarks/synthetic_census.py blood_100k --cells 100000
  python benchmarks/threads.py blood_100k

The main thread does one of two things for a while, alone and beside a stream that is never allowed to rest (its batches
are thrown away by another thread): a plain Python loop, and many small torch operations on one thread, as a GPU's
training thread issues them. A slowdown of 1 means no cost; with fewer cores than threads, some is the cores' own. The
stream's speed while the main thread is busy is measured beside it, with and without the data threads' lower priority.
"""

import argparse
import threading
import time
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from measuring import alternate, print_medians, write_result

from scgpt_hf.cells import threads
from scgpt_hf.cells.census import CensusSource
from scgpt_hf.cells.plan import plan_epoch
from scgpt_hf.stream import StreamSettings, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor


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
def streaming(path: Path, speeds: list[float], niceness: int):
    """Stream tokens in the background without a rest; append its cells per second to a list."""
    threads.NICENESS = niceness
    stop, ready, counted = threading.Event(), threading.Event(), [0]
    source = CensusSource(f"{path}/census_data/homo_sapiens")
    cells = source.obs().index.to_numpy()
    plans = [plan_epoch(cells, seed=0, epoch=epoch, batch_size=32, bands_per_block=8) for epoch in range(100)]
    processor = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist())

    def consume() -> None:
        threads.give_way()
        for batch in stream_cells(source, plans, processor, StreamSettings(seed=0, mask_ratios=(0.25, 0.5, 0.75))):
            counted[0] += len(batch["cu_seq_lens_q"]) - 1
            ready.set()
            if stop.is_set():
                return

    consumer = threading.Thread(target=consume)
    consumer.start()
    ready.wait()
    started, before = time.perf_counter(), counted[0]
    yield
    speeds.append((counted[0] - before) / (time.perf_counter() - started))
    stop.set()
    consumer.join()
    source.close()


def main() -> None:
    """Measure and write `results/threads.json`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="folder that synthetic_census.py wrote")
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    usual, result = threads.NICENESS, {}

    def beside(work: Callable[[float], float], niceness: int, speeds: list[float]) -> float:
        with streaming(arguments.census, speeds, niceness):
            return work(arguments.seconds)

    for name, work in {"python loop": python_loop, "small torch operations": small_operations}.items():
        speeds: dict[str, list[float]] = {"giving way": [], "equal priority": []}
        arms = {
            "alone": partial(work, arguments.seconds),
            "beside the stream, giving way": partial(beside, work, usual, speeds["giving way"]),
            "beside the stream, equal priority": partial(beside, work, 0, speeds["equal priority"]),
        }
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
