"""A reader stops promptly and without leftover threads: after an error, on Ctrl-C, at exit, and when a store stalls."""

import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import CancelledError
from pathlib import Path

import numpy as np
import pytest

from scgpt_hf.cells import threads
from scgpt_hf.cells.schedule.epoch import plan_validation
from scgpt_hf.cells.source import open_source
from scgpt_hf.cells.threads import DaemonThreadPool, join_within, prefetch
from scgpt_hf.pipeline.stream import StreamConfig, stream_cells
from scgpt_hf.tokens.processing_scgpt import ScGPTProcessor
from scgpt_hf.training.fault_tolerance.checkpoints import newest_valid, verify
from tests.support import ROOT
from tests.support.s3_server import Faults, S3Server

READING = Path(__file__).with_name("reading.py")
PRETRAIN = ROOT / "scripts" / "pretrain.py"
UNCACHED = {
    "TILEDB_SM_TILE_CACHE_SIZE": "0",
    "TILEDB_VFS_READ_AHEAD_CACHE_SIZE": "0",
}  # so that few cells stay in memory


class Reader:
    """A subprocess that runs `reading.py`. It must end within a minute after it is interrupted."""

    def __init__(self, how: str, address: object, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(READING), how, str(address)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )

    def wait_for(self, word: str) -> None:
        while line := self.process.stdout.readline():
            if line.startswith(word):
                return
        raise AssertionError(self.process.stderr.read())

    def interrupt(self) -> tuple[int, str, str]:
        self.process.send_signal(signal.SIGINT)
        output, errors = self.process.communicate(timeout=60)
        return self.process.returncode, output, errors


def test_ctrl_c_while_prefetching_ends_the_process(small_census):
    reader = Reader("read", small_census)
    reader.wait_for("reading")
    code, output, errors = reader.interrupt()
    assert code == -signal.SIGINT, errors
    assert "scgpt-prefetch" not in output.splitlines()[-1]
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_process_that_ignores_ctrl_c_continues(small_census):
    """A shell starts jobs with `&` in this way. TileDB's signal handler would end such a process."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # the subprocess inherits it
    try:
        reader = Reader("read", small_census)
    finally:
        signal.signal(signal.SIGINT, before)
    reader.wait_for("reading")
    reader.process.send_signal(signal.SIGINT)
    for _ in range(20):
        reader.wait_for("reading")
    reader.process.terminate()
    _, errors = reader.process.communicate(timeout=60)
    assert reader.process.returncode == -signal.SIGTERM, errors


def test_ctrl_c_while_a_store_stalls_ends_the_process_in_seconds(small_census):
    with S3Server(small_census) as server:
        reader = Reader("stall", "s3://census/", **server.environment)
        reader.wait_for("opened")
        server.faults = Faults(probability=1, kinds=("stall",), stall_s=600)
        reader.process.stdin.write("\n")
        reader.process.stdin.flush()
        assert server.stalled.wait(30)
        code, _, errors = reader.interrupt()
    assert code == -signal.SIGINT, errors
    assert "a read hangs" in errors


@pytest.mark.slow
def test_sigterm_while_a_store_stalls_ends_a_run_with_a_checkpoint(small_census, tmp_path):
    """A stalled read, in training or validation, does not prevent the checkpoint."""
    sizes = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--min_gene_counts", "1"]
    flags = ["--data", "s3://census/", "--output_dir", str(tmp_path / "run"), *sizes, "--num_train_epochs", "500"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TILEDB_"))}
    with S3Server(small_census) as server, (tmp_path / "stderr").open("w+") as stderr:
        process = subprocess.Popen(
            [sys.executable, str(PRETRAIN), *flags, "--use_cpu", "true"],
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**clean, **server.environment, **UNCACHED, "OMP_NUM_THREADS": "1"},
        )
        assert wait_until((tmp_path / "run" / "split.json").exists, timeout_s=200), process.kill()
        server.faults = Faults(probability=1, kinds=("stall",), stall_s=300)
        assert server.stalled.wait(60), process.kill()
        process.terminate()
        started = time.monotonic()
        assert process.wait(60) == 143, (tmp_path / "stderr").read_text()
    assert time.monotonic() - started < 30
    assert "stopped by SIGTERM" in (tmp_path / "stderr").read_text()
    verify(newest_valid(tmp_path / "run"))


@pytest.mark.slow
def test_a_stream_that_is_neither_exhausted_nor_closed_does_not_block_exit(small_census):
    done = subprocess.run([sys.executable, str(READING), "leave", str(small_census)], capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr


def reader_threads(before: Sequence[threading.Thread] = ()) -> list[str]:
    """Return the names of our threads that are alive and not in `before`."""
    alive = [thread.name for thread in threading.enumerate() if thread not in before]
    return [name for name in alive if name.startswith(("scgpt-", "census-"))]


def test_readers_that_stop_early_or_fail_leave_no_thread(small_census):
    before = threading.enumerate()
    with open_source(small_census) as source:
        processor = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist())
        plans = [plan_validation(source.obs().index.to_numpy(np.int64), 10, cells_per_window=20)] * 3
        for _ in range(5):
            batches = prefetch(stream_cells(source, plans, processor, StreamConfig(0)))
            next(batches)
            batches.close()
            unknown = {"domain_ids": ("donor_id", {"nobody": 0})}
            with pytest.raises(ValueError, match="donor_id"):
                list(prefetch(stream_cells(source, plans, processor, StreamConfig(0, categories=unknown))))
        del batches

    def left() -> list[str]:
        gc.collect()  # frees a block that was being read when its stream was closed
        return reader_threads(before)

    assert wait_until(lambda: not left()), left()


def wait_until(condition, timeout_s: float = 60) -> bool:
    """Wait until a condition holds and return whether it does; threads take a moment to end."""
    until = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < until:
        time.sleep(0.01)
    return condition()


def test_a_pool_returns_results_in_order_and_raises_the_errors_of_tasks():
    pool = DaemonThreadPool(3, "scgpt-test")
    assert list(pool.map(lambda number: number**2, range(50))) == [number**2 for number in range(50)]
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result()
    pool.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(int)
    assert not [name for name in reader_threads() if name.startswith("scgpt-test")]


def test_shutdown_cancels_waiting_tasks_and_does_not_wait_for_hanging_ones(monkeypatch, caplog):
    monkeypatch.setattr(threads, "JOIN_TIMEOUT_S", 0.05)
    pool, released = DaemonThreadPool(1, "scgpt-test"), threading.Event()
    hanging, waiting = pool.submit(released.wait), pool.submit(int)
    assert wait_until(hanging.running)
    pool.shutdown()
    assert "scgpt-test_0" in caplog.text
    with pytest.raises(CancelledError):
        waiting.result(timeout=60)
    released.set()
    assert hanging.result(timeout=60)
    join_within([thread for thread in threading.enumerate() if thread.name == "scgpt-test_0"], 60)


def test_the_interpreter_waits_for_a_running_read_and_starts_no_other():
    """A thread that returns from C++ after the interpreter has finished would abort the process."""
    code = (
        "import threading, time; from scgpt_hf.cells.threads import DaemonThreadPool\n"
        "begun = threading.Event()\n"
        "def read():\n    begun.set(); time.sleep(0.5); print('read', flush=True)\n"
        "pool = DaemonThreadPool(1, 'test')\n"
        "for _ in range(3): pool.submit(read)\n"
        "begun.wait()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "read\n", "")
