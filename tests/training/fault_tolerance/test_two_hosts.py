"""Several hosts: the commands of docs/how_to/clusters.md, and the sbatch file, run on two hosts made of namespaces.

A run on two hosts equals one on a single host; one that loses a host, or is stopped by SLURM, continues.
"""

import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from scgpt_hf.training.fault_tolerance.checkpoints import checkpoints_in, newest_valid, verify
from tests.support import ROOT
from tests.support.hosts import two_hosts, why_no_hosts
from tests.support.slurm import slurm_cluster, why_no_slurm
from tests.support.training import EVERY_4, TINY, read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(why_no_hosts() is not None, reason=f"{why_no_hosts()}"),
]
ENV = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), "HOST": "host0", "NODES": "2", "GPUS": "1"}
RUN = "blood-300k --output_dir runs/blood"  # of the commands in the documentation
# Sums over 2 x 8 and over 16 cells are rounded differently, and the steps of a run add these differences up.
TOLERANCE = 1e-3


def documented(word: str) -> str:
    """Return the command of the documentation that contains a word."""
    text = (ROOT / "docs" / "how_to" / "clusters.md").read_text()
    (command,) = [block for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL) if word in block]
    return command


def small_run(command: str, census: Path, folder: Path, *flags: str) -> str:
    """Return a command of the documentation with a small run in place of its own."""
    pairs = [*TINY, *EVERY_4, "--cpu_threads", "1", "--dropout", "0", "--fit_baselines", "none", *flags]
    quoted = " ".join('"{}"'.format(text.replace('"', r"\"")) for text in pairs)  # also inside of '…'
    assert RUN in command
    small = f"--data {census} --output_dir {folder} {quoted}"
    return command.replace(RUN, small).replace("512 / WORLD_SIZE", "16 / WORLD_SIZE")


def wait_until(happened: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + 240
    while not happened():
        assert time.monotonic() < deadline, log.read_text()[-4000:]
        time.sleep(0.2)


def last_step(folder: Path) -> int:
    return max((int(path.name.split("-")[1]) for path in checkpoints_in(folder)), default=0)


def losses(folder: Path) -> dict[int, float]:
    return {line["step"]: line["loss"] for line in read_metrics(folder) if "loss" in line}


@pytest.fixture(scope="module")
def on_one_host(small_census, tmp_path_factory):
    """A run of two processes on this machine."""
    folder = tmp_path_factory.mktemp("one_host") / "run"
    command = small_run(documented("--master-addr"), small_census, folder, "--per_device_train_batch_size", "8")
    env = ENV | {"NODES": "1", "GPUS": "2", "RANK": "0", "HOST": "localhost"}
    done = subprocess.run(["bash", "-c", command], env=env, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return folder


@pytest.mark.parametrize("launcher", ["torchrun --nnodes $NODES", "accelerate launch"])
def test_a_run_on_two_hosts_equals_one_on_a_single_host(small_census, on_one_host, tmp_path, launcher):
    folder = tmp_path / "run"
    command = small_run(documented(launcher), small_census, folder, "--per_device_train_batch_size", "8")
    logs = [tmp_path / f"{rank}.log" for rank in (0, 1)]
    with two_hosts(tmp_path) as hosts:
        nodes = [
            host.start(["bash", "-c", command], ENV | {"RANK": str(rank)}, logs[rank])
            for rank, host in enumerate(hosts)
        ]
        assert [node.wait(280) for node in nodes] == [0, 0], "".join(log.read_text()[-4000:] for log in logs)
    assert losses(folder) == losses(on_one_host)
    assert verify(newest_valid(folder)) == verify(newest_valid(on_one_host))
    for name in ("model.safetensors", "optimizer.pt", "rng_state_1.pth"):
        assert (newest_valid(folder) / name).read_bytes() == (newest_valid(on_one_host) / name).read_bytes(), name


def test_a_run_continues_when_a_host_dies_and_when_it_comes_back(small_census, tmp_path):
    run = tmp_path / "run"
    flags = ("--num_train_epochs", "60", "--save_steps", "20", "--save_total_limit", "99", "--learning_rate", "1e-4")
    command = small_run(documented("--max-restarts"), small_census, run, *flags)
    logs = [tmp_path / f"{name}.log" for name in ("survivor", "killed", "returned")]
    with two_hosts(tmp_path) as (survivor, victim):
        first = survivor.start(["bash", "-c", command], ENV, logs[0])
        victim.start(["bash", "-c", command], ENV, logs[1])
        wait_until(lambda: last_step(run) >= 20, logs[0])
        victim.kill()
        killed_at = last_step(run)
        wait_until(lambda: last_step(run) > killed_at + 20, logs[0])
        assert verify(newest_valid(run)).world_size == 1
        second = victim.start(["bash", "-c", command], ENV, logs[2])
        assert [first.wait(280), second.wait(60)] == [0, 0], "".join(log.read_text()[-4000:] for log in logs)
    assert "Connection reset by peer" in logs[0].read_text() or "Connection closed by peer" in logs[0].read_text()
    assert (
        "stopped by SIGTERM" in logs[0].read_text()
    )  # torchrun stops the survivor's process to include the host again
    assert verify(newest_valid(run)).world_size == 2
    uninterrupted = tmp_path / "uninterrupted"
    alone = ["--per_device_train_batch_size", "16", *flags]
    command = small_run("python -m scgpt_hf.cli.pretrain " + RUN, small_census, uninterrupted, *alone)
    subprocess.run(shlex.split(command), env=ENV, check=True, capture_output=True, timeout=280)
    expected = losses(uninterrupted)
    assert losses(run) == pytest.approx(expected, rel=TOLERANCE)
    assert len(expected) == verify(newest_valid(run)).step > killed_at + 40


def test_torchrun_passes_the_signal_of_a_scheduler_on(small_census, tmp_path):
    run, logs = tmp_path / "run", [tmp_path / f"{rank}.log" for rank in (0, 1)]
    flags = ("--num_train_epochs", "60", "--save_steps", "20", "--per_device_train_batch_size", "8")
    command = small_run(documented("torchrun --nnodes $NODES"), small_census, run, *flags)
    text = (ROOT / "docs" / "how_to" / "clusters.md").read_text()
    (options,) = re.findall(r"`(--signals-to-handle [^`]*)`", text)
    command = command.replace("torchrun", f"torchrun {options}", 1)
    with two_hosts(tmp_path) as hosts:
        nodes = [
            host.start(["bash", "-c", f"exec {command}"], ENV | {"RANK": str(rank)}, logs[rank])
            for rank, host in enumerate(hosts)
        ]
        wait_until(lambda: last_step(run) >= 20, logs[0])
        for host in hosts:
            host.kill(signal.SIGUSR1)  # to torchrun and to the run, as srun does
        assert 0 not in [node.wait(60) for node in nodes]
    saved = verify(newest_valid(run))
    assert saved.world_size == 2
    assert f"stopped by SIGUSR1 after step {saved.step}" in logs[0].read_text()


@pytest.mark.skipif(why_no_slurm() is not None, reason=f"{why_no_slurm()}")
def test_a_job_of_slurm_saves_a_checkpoint_at_its_signal_and_is_queued_again(small_census, tmp_path):
    run, log = tmp_path / "run", tmp_path / "job.log"
    script, flags = tmp_path / "job.sbatch", ("--num_train_epochs", "30", "--save_steps", "20")
    example = (ROOT / "examples" / "slurm" / "pretrain.sbatch").read_text()
    script.write_text(small_run(example, small_census, run, *flags, "--per_device_train_batch_size", "8"))
    size = ("--ntasks-per-node=1", "--nodes=2", "--gpus-per-node=0", "--cpus-per-task=1")
    (folder := tmp_path / "slurm").mkdir()
    with slurm_cluster(folder, ENV) as cluster:
        job = cluster.submit(*size, f"--output={log}", str(script))
        wait_until(lambda: last_step(run) >= 20, log)
        cluster.run("scancel", "--signal=USR1", job)  # as --signal does before the time limit
        wait_until(lambda: cluster.state(job) == "PENDING 1", log)
        stopped_at = verify(newest_valid(run))
        assert f"stopped by SIGUSR1 after step {stopped_at.step}" in log.read_text()
        assert stopped_at.world_size == 2
        wait_until(
            lambda: cluster.state(job) == "COMPLETED 1", log
        )  # SLURM waits two minutes before it starts it again
    assert f"resumed after step {stopped_at.step} " in log.read_text()
    assert (run / "README.md").is_file()
    assert list(losses(run)) == list(range(1, verify(newest_valid(run)).step + 1))
