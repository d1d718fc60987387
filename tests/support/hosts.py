"""Two hosts on one machine: namespaces of Linux with their own network, host name and processes, joined by a cable.

They share the disk, as the nodes of a cluster do. Nothing of them is left when their first process ends.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

_START = 'hostname "$1" && mount --bind "$2" /etc/hosts && ip link set lo up && echo ready && exec sleep infinity'
_NAMESPACES = ("--net", "--uts", "--mount", "--pid")


@dataclass
class Host:
    """A host.

    Attributes:
        name: host name, which all hosts can resolve.
        address: IP address.
        first_process: keeps the host alive; all its processes die with it.
        pid: process id of the host's process 1, as this process sees it.
        started: the commands that were started on it.
    """

    name: str
    address: str
    first_process: subprocess.Popen[str]
    pid: int
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, command: Sequence[str], env: Mapping[str, str], log: Path) -> subprocess.Popen[bytes]:
        """Start a command on the host, in this process's folder; its output goes to a file."""
        enter = ["nsenter", "--target", str(self.pid), *_NAMESPACES, f"--wd={os.getcwd()}"]
        with log.open("wb") as output:
            process = subprocess.Popen([*enter, *command], env=dict(env), stdout=output, stderr=subprocess.STDOUT)
        self.started.append(process)
        return process

    def run(self, *command: str, env: Mapping[str, str] | None = None) -> str:
        """Run a command on the host and return what it printed."""
        enter = ["nsenter", "--target", str(self.pid), *_NAMESPACES, f"--wd={os.getcwd()}"]
        return subprocess.run(
            [*enter, *command], env=env, check=True, timeout=60, stdout=subprocess.PIPE, text=True
        ).stdout

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """Send a signal to all processes of the host but its first one."""
        # Of a process namespace, -1 is every process but the first and the one that sends.
        self.run(sys.executable, "-c", f"import os; os.kill(-1, {int(number)})")


def why_no_hosts() -> str | None:
    """Return why hosts cannot be made here, or None."""
    if not sys.platform.startswith("linux"):
        return "needs the namespaces of Linux"
    if absent := [name for name in ("ip", "unshare", "nsenter", "mount") if shutil.which(name) is None]:
        return f"needs the commands {absent}"
    tried = subprocess.run(["unshare", *_NAMESPACES, "--fork", "ip", "link"], capture_output=True, text=True)
    return f"needs the right to make namespaces: {tried.stderr.strip()}" if tried.returncode else None


@contextmanager
def two_hosts(folder: Path) -> Iterator[tuple[Host, Host]]:
    """Yield two hosts, `host0` and `host1`, that reach each other by name and nothing else.

    Args:
        folder: for their file of host names.
    """
    addresses = {"host0": "10.77.0.1", "host1": "10.77.0.2"}
    names = folder / "hosts"
    names.write_text("127.0.0.1 localhost\n" + "".join(f"{ip} {name}\n" for name, ip in addresses.items()))
    hosts: list[Host] = []
    try:
        for name, address in addresses.items():
            hosts.append(_start_host(name, address, names))
        ends: list[Any] = [["netns", str(host.pid), "name", "cable"] for host in hosts]
        _ip("link", "add", "cable", *ends[0][:2], "type", "veth", "peer", *ends[1][2:], *ends[1][:2])
        for host in hosts:
            host.run("ip", "addr", "add", f"{host.address}/24", "dev", "cable")
            host.run("ip", "link", "set", "cable", "up")
        yield hosts[0], hosts[1]
    finally:
        for host in hosts:
            host.first_process.kill()
            host.first_process.communicate()
            for process in host.started:
                process.wait()


def _start_host(name: str, address: str, names: Path) -> Host:
    command = ["unshare", *_NAMESPACES, "--mount-proc", "--fork", "--kill-child", "sh", "-c", _START, "sh", name]
    process = subprocess.Popen([*command, str(names)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    if process.stdout.readline() != "ready\n":
        raise OSError(f"host {name} did not start")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text()
    return Host(name, address, process, int(children))


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=60)
