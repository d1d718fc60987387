"""A reader stops promptly and leaves nothing behind: on an error, on Ctrl-C, at exit, and while a store is silent."""

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
UNCACHED = {"TILEDB_SM_TILE_CACHE_SIZE": "0", "TILEDB_VFS_READ_AHEAD_CACHE_SIZE": "0"}  # so few cells stay in memory


class Reader:
    """A process of `reading.py`; it is given a minute to end after it was told to."""

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
        said, errors = self.process.communicate(timeout=60)
        return self.process.returncode, said, errors


def test_ctrl_c_while_reading_ahead_ends_the_process_at_once(small_census):
    reader = Reader("read", small_census)
    reader.wait_for("reading")
    code, said, errors = reader.interrupt()
    assert code == -signal.SIGINT, errors
    assert "scgpt-prefetch" not in said.splitlines()[-1]
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_a_process_that_was_started_to_ignore_ctrl_c_reads_on(small_census):
    """As a script starts one with `&`; of TileDB's own handler it would die."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # what it inherits
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


def test_ctrl_c_while_a_store_is_silent_ends_the_process_in_seconds(small_census):
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
def test_sigterm_while_a_store_is_silent_ends_a_run_with_a_checkpoint(small_census, tmp_path):
    """Cells that never come, for a step or for a validation, keep nobody from saving what was learned."""
    sizes = ["--hidden_size", "16", "--num_hidden_layers", "1", "--num_attention_heads", "2", "--min_gene_counts", "1"]
    flags = ["--data", "s3://census/", "--output_dir", str(tmp_path / "run"), *sizes, "--num_train_epochs", "500"]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "TILEDB_"))}
    with S3Server(small_census) as server, (tmp_path / "said").open("w+") as said:
        process = subprocess.Popen(
            [sys.executable, str(PRETRAIN), *flags, "--use_cpu", "true"],
            stdout=subprocess.DEVNULL,
            stderr=said,
            env={**clean, **server.environment, **UNCACHED, "OMP_NUM_THREADS": "1"},
        )
        assert wait_until((tmp_path / "run" / "split.json").exists, timeout_s=200), process.kill()
        server.faults = Faults(probability=1, kinds=("stall",), stall_s=300)
        assert server.stalled.wait(60), process.kill()
        process.terminate()
        started = time.monotonic()
        assert process.wait(60) == 143, (tmp_path / "said").read_text()
    assert time.monotonic() - started < 30
    assert "stopped by SIGTERM" in (tmp_path / "said").read_text()
    verify(newest_valid(tmp_path / "run"))


@pytest.mark.slow
def test_a_stream_that_is_neither_exhausted_nor_closed_does_not_keep_the_process(small_census):
    done = subprocess.run([sys.executable, str(READING), "leave", str(small_census)], capture_output=True, timeout=100)
    assert done.returncode == 0, done.stderr


def ours(before: Sequence[threading.Thread] = ()) -> list[str]:
    """The names of reading threads that are alive, but for those that were there before."""
    alive = [thread.name for thread in threading.enumerate() if thread not in before]
    return [name for name in alive if name.startswith(("scgpt-", "census-"))]


def test_no_thread_is_left_after_readers_that_stopped_early_or_failed(small_census):
    before = threading.enumerate()
    with open_source(small_census) as source:
        processor = ScGPTProcessor.from_genes(source.genes["feature_id"].tolist())
        plans = [plan_validation(source.obs().index.to_numpy(np.int64), 10, cells_per_window=20)] * 3
        for _ in range(5):
            batches = prefetch(stream_cells(source, plans, processor, StreamConfig(0)))
            next(batches)
            batches.close()
            unknown = {"domain_ids": ("donor_id", {"nobody": 0})}
            with pytest.raises(ValueError, match="have no class"):
                list(prefetch(stream_cells(source, plans, processor, StreamConfig(0, categories=unknown))))
        del batches

    def left() -> list[str]:
        gc.collect()  # a block that was still being read when its stream was given up is freed after that
        return ours(before)

    assert wait_until(lambda: not left()), left()


def wait_until(true, timeout_s: float = 60) -> bool:
    """Whether it becomes true in time: a thread that was told to end still takes a moment."""
    until = time.monotonic() + timeout_s
    while not true() and time.monotonic() < until:
        time.sleep(0.01)
    return true()


def test_reading_threads_return_results_in_order_and_raise_what_the_task_raised():
    pool = DaemonThreadPool(3, "scgpt-test")
    assert list(pool.map(lambda number: number**2, range(50))) == [number**2 for number in range(50)]
    with pytest.raises(ZeroDivisionError):
        pool.submit(lambda: 1 / 0).result()
    pool.shutdown()
    with pytest.raises(RuntimeError, match="shut down"):
        pool.submit(int)
    assert not [name for name in ours() if name.startswith("scgpt-test")]


def test_shutting_down_cancels_what_has_not_begun_and_leaves_what_hangs(monkeypatch, caplog):
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


def test_the_interpreter_waits_for_a_read_in_progress_and_begins_no_other():
    """A thread that comes back from C++ to an interpreter that has gone would abort the process."""
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
