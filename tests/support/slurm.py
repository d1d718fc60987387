"""A SLURM cluster of two nodes, for tests: the programs of SLURM on two hosts made of namespaces."""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.hosts import Host, two_hosts, why_no_hosts

_PROGRAMS = ("slurmctld", "slurmd", "sbatch", "munged")
# Two CPUs per node, of a machine that may have fewer.
_CONFIG = """
ClusterName=test
SlurmctldHost=host0
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobAcctGatherType=jobacct_gather/none
SlurmdParameters=config_overrides
SchedulerParameters=sched_interval=5
NodeName=host[0-1] CPUs=2
PartitionName=all Nodes=ALL Default=YES
"""


@dataclass
class Slurm:
    """A cluster.

    Attributes:
        hosts: its nodes.
        env: environment of a process that uses it.
    """

    hosts: tuple[Host, Host]
    env: dict[str, str]

    def submit(self, *arguments: str) -> str:
        """Submit a job with `sbatch` and return its number."""
        return re.findall(r"Submitted batch job (\d+)", self.run("sbatch", *arguments))[0]

    def run(self, *command: str) -> str:
        """Run a command of SLURM and return what it printed."""
        return self.hosts[0].run(*command, env=self.env)

    def state(self, job: str) -> str:
        """Return the state of a job, such as RUNNING, with the number of its restarts."""
        shown = self.run("scontrol", "show", "job", job)
        return " ".join(re.findall(r"(?:JobState|Restarts)=(\w+)", shown))


def why_no_slurm() -> str | None:
    """Return why a cluster cannot be started here, or None."""
    if absent := [name for name in _PROGRAMS if shutil.which(name) is None]:
        return f"needs the programs {absent}, of the Debian packages slurm-wlm and munge"
    return why_no_hosts()


@contextmanager
def slurm_cluster(folder: Path, env: Mapping[str, str]) -> Iterator[Slurm]:
    """Start a cluster of two nodes with two CPUs each.

    Args:
        folder: for its files.
        env: environment of the jobs.
    """
    config = folder / "slurm.conf"
    config.write_text(_CONFIG.format(folder=folder))
    (folder / "state").mkdir()
    env = {**env, "SLURM_CONF": str(config)}
    with ExitStack() as stack:
        hosts = stack.enter_context(two_hosts(folder))
        stack.enter_context(_munge(folder))
        hosts[0].start(["slurmctld", "-D", "-c"], env, folder / "slurmctld.log")
        for host in hosts:
            host.start(["slurmd", "-D", "-N", host.name], env, folder / f"slurmd-{host.name}.log")
        cluster = Slurm(hosts, env)
        deadline = time.monotonic() + 60
        while "2" not in hosts[0].run("sh", "-c", "sinfo --noheader --states=idle --format=%D 2>&1 || true", env=env):
            if time.monotonic() > deadline:
                raise OSError(f"SLURM did not start: {(folder / 'slurmctld.log').read_text()[-2000:]}")
            time.sleep(0.5)
        yield cluster


@contextmanager
def _munge(folder: Path) -> Iterator[None]:
    """Run the service that identifies users to SLURM."""
    key = folder / "munge.key"
    key.write_bytes(os.urandom(1024))
    key.chmod(0o600)
    files = {"socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
    options = [f"--{option}={folder}/munge.{name}" for option, name in files.items()]
    command = ["munged", "--foreground", "--force", f"--key-file={key}", *options]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            yield
        finally:
            process.terminate()
