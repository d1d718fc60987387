"""Measure reading a Census from a local S3 server with the latency and the bandwidth of a remote one.

  python benchmarks/synthetic_census.py blood_32k --cells 32768
  python benchmarks/s3_reading.py blood_32k

A server in another process, that of the tests, waits before each answer and sends no more than --mbit per second over
all connections. Each arm reads the same shuffled chunks three times: in the first pass the threads open the arrays, in
the second one those that were added, and the third one is measured. In the arm `adaptive`, the reader chooses the
number of threads, as it does by default. The server and the reader share the cores, which a real store does not.
"""

import argparse
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from measuring import peak_memory_gb, write_result

from scgpt_hf.cells.block import CHUNK_SIZE
from scgpt_hf.cells.schedule.epoch import plan_epoch
from scgpt_hf.cells.soma import remote
from scgpt_hf.cells.soma.census import CensusSource
from scgpt_hf.cells.soma.remote import MAX_THREADS
from tests.support.s3_server import Faults, S3Server

EXPERIMENT = "s3://census/census_data/homo_sapiens"
BLOCK = 1 << 16  # bytes that a connection sends at once


class Line:
    """A line of limited bandwidth that all connections share."""

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s, self.free_at, self.lock = bytes_per_s, 0.0, threading.Lock()
        self.n_bytes = 0  # sent so far

    def send(self, n_bytes: int) -> None:
        """Wait until the line has sent this number of bytes."""
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + n_bytes / self.bytes_per_s
            until = self.free_at
            self.n_bytes += n_bytes
        time.sleep(max(0.0, until - time.monotonic()))


def serve(folder: Path, latency_s: float, mbit: float, pipe: Any) -> None:
    """Serve a folder. Answer True in the pipe with the numbers of requests and bytes so far; stop at False."""
    line = Line(mbit * 1e6 / 8)

    def send_slowly(write: Callable[[bytes], object], body: bytes) -> None:
        for start in range(0, len(body), BLOCK):
            part = body[start : start + BLOCK]
            line.send(len(part))
            write(part)

    with S3Server(folder, Faults(latency_s=latency_s), send_slowly) as server:
        pipe.send(server.environment)
        while pipe.recv():
            pipe.send((sum(server.outcomes.values()), line.n_bytes))


@contextmanager
def serving(census: Path, latency_s: float, mbit: float) -> Iterator[Any]:
    """Serve a folder in another process while the block runs; yield the connection to the server, for `count`."""
    context = get_context("spawn")
    here, there = context.Pipe()
    server = context.Process(target=serve, args=(census, latency_s, mbit, there), daemon=True)
    server.start()
    os.environ |= here.recv()
    yield here
    here.send(False)
    server.join()


def count(pipe: Any) -> np.ndarray:
    """Return the numbers of requests and bytes that the server has answered so far."""
    pipe.send(True)
    return np.array(pipe.recv())


def measure(cells: np.ndarray, n_threads: int | None, pipe: Any) -> dict[str, float]:
    """Read the cells with a number of threads; None lets the reader choose."""
    remote.MAX_THREADS = n_threads or MAX_THREADS
    with CensusSource(EXPERIMENT, n_threads=n_threads or 4, primary_only=False) as source:
        passes = []
        for _ in range(3):
            before, started, cpu = count(pipe), time.perf_counter(), time.process_time()
            source.read(cells)
            passes.append((time.perf_counter() - started, time.process_time() - cpu, *(count(pipe) - before)))
        threads = source.cells_at_once // CHUNK_SIZE
    seconds, cpu, n_requests, n_bytes = passes[-1]
    return {
        "threads": threads,
        "cells_per_s": len(cells) / seconds,
        "cells_per_s_first_pass": len(cells) / passes[0][0],
        "requests_per_chunk": float(n_requests / (len(cells) / CHUNK_SIZE)),
        "bytes_per_cell": float(n_bytes / len(cells)),
        "mbit_per_s": float(n_bytes * 8e-6 / seconds),
        "cpu_us_per_cell": cpu * 1e6 / len(cells),
    }


def main() -> None:
    """Measure all arms."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("census", type=Path, help="folder written by synthetic_census.py")
    parser.add_argument("--latency_ms", type=float, nargs="+", default=[30, 150], help="wait before each answer")
    parser.add_argument("--mbit", type=float, default=1000, help="bandwidth of all connections together")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 4, 16], help="reading threads")
    parser.add_argument("--chunks", type=int, default=16, help="chunks that each arm reads")
    arguments = parser.parse_args()
    plan = plan_epoch(np.arange(arguments.chunks * CHUNK_SIZE), seed=0, epoch=0, batch_size=512)
    cells = plan.window(0).ravel()
    results: dict[str, Any] = {}
    for milliseconds in arguments.latency_ms:
        with serving(arguments.census, milliseconds / 1000, arguments.mbit) as server:
            for n_threads in (*arguments.threads, None):
                found = measure(cells, n_threads, server)
                results[f"{milliseconds:g} ms, {n_threads or 'adaptive'}"] = found
                print(milliseconds, n_threads, {name: round(value, 1) for name, value in found.items()}, flush=True)
    write_result("s3_reading", {"mbit": arguments.mbit, "peak_gb": peak_memory_gb(), "results": results})


if __name__ == "__main__":
    main()
