"""Check in a child process that the HDF5 library can read a file.

On some damaged files the HDF5 library crashes or never returns. A blanked entry in the heap where HDF5 stores strings
is enough, and nothing in the same process could stop it. So a child process first walks over everything in the file
except the numbers: groups, attributes, strings, and the indexes of the chunks. The child ignores exceptions: the reader
meets them again at the same place, and `validation.py` catches them.

The check is always on because it is cheap: for a file of one million cells it takes 0.46 s of processor time, and the
opening itself 0.98 s (on two busy cores 1.5 s and 2.9 s elapsed). Source: `benchmarks/results/h5ad_probe.json`.

Run as a script, this file is the child process. It imports nothing else of this package, so that it starts fast.
"""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import h5py

STEP_S = 10.0  # processor time of one step; a healthy one takes milliseconds, and waiting for a disk does not count
STRINGS_PER_STEP = 100_000
# A reference to a string takes 16 bytes, and zlib packs up to 1,032 bytes into one. So a dataset has at most 65 strings
# for each byte that it stores, whatever length its damaged header claims.
MOST_STRINGS_PER_BYTE = 65

_checked: set[tuple[str, int, int, int]] = set()


def require_readable(paths: Sequence[str], names: Sequence[str] | None = None) -> None:
    """Raise if the HDF5 library crashes or hangs on a file.

    One child process checks all files. Files that this process has checked before are skipped, unless they changed.

    Args:
        paths: HDF5 files.
        names: their names in errors; by default the paths.

    Raises:
        ChildProcessError: the child process cannot start or work.
        FileNotFoundError: a file does not exist.
        ValueError: HDF5 crashes or hangs on a file.
    """
    versions = {path: _version(path) for path in paths}
    name_of = dict(zip(paths, names or paths, strict=True))
    new = [path for path, version in versions.items() if version not in _checked]
    if not new:
        return
    try:
        child = subprocess.run(
            # -P: do not import the modules in this file's folder instead of Python's
            [sys.executable or "", "-P", __file__, str(STEP_S)],
            input="\0".join(new).encode(errors="surrogateescape"),
            capture_output=True,
            start_new_session=True,  # Ctrl-C goes to this process only, which ends the child
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},  # NumPy would start a thread for each core
            check=False,
        )
    except OSError as error:
        raise ChildProcessError(
            f"cannot check {name_of[new[0]]!r} before opening it: starting Python as {sys.executable!r} failed: {error}"
        ) from error
    if child.returncode > 0:
        reason = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ChildProcessError(f"cannot check {name_of[new[0]]!r} before opening it: {reason}")
    if child.returncode < 0:
        last_step = child.stdout.decode(errors="replace").strip().rpartition("\n")[2]
        raise _unreadable([name_of[path] for path in new], last_step, signal.Signals(-child.returncode))
    _checked.update(versions.values())


def _unreadable(paths: Sequence[str], last_step: str, ended_by: signal.Signals) -> ValueError:
    """Return the error for the file on which the child was ended by a signal.

    Args:
        paths: the files that were checked.
        last_step: what the child printed last: the number of the file and the place in it, or nothing.
        ended_by: SIGPROF if a step took too long, else the signal of the crash.
    """
    number, _, place = last_step.partition(" ")
    problem = "does not finish" if ended_by == signal.SIGPROF else f"crashes with {ended_by.name}"
    return ValueError(
        f"cannot read {paths[int(number or 0)]!r} as an .h5ad file: at {place or 'its start'} the HDF5 library "
        f"{problem}, so the file is damaged or incomplete; copy it again, or write it again with anndata"
    )


def _version(path: str) -> tuple[str, int, int, int]:
    """Return a path, inode, size and time that change when a file is replaced or written to."""
    found = os.stat(path)
    return os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns


def _main() -> None:
    """Walk over the files named on stdin; print each step, so that the last line shows where a crash happened."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash must not leave a core dump on the disk
    # The default action ends the process at once, even within the C library. It is set again because a parent that
    # ignores the signal, e.g. under a profiler, passes that on.
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for number, path in enumerate(sys.stdin.buffer.read().decode(errors="surrogateescape").split("\0")):
        _begin_step(number, "/")
        with suppress(Exception), h5py.File(path, "r") as file:
            _walk(file, number)


def _begin_step(number: int, place: str) -> None:
    """Print the number of the file and the place in it, and restart the time limit."""
    sys.stdout.write(f"{number} {place!a}\n")
    sys.stdout.flush()
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))


def _walk(file: h5py.File, number: int) -> None:
    """Visit every object once, even if links form a cycle; skip what raises an exception."""
    names, seen = ["/"], set()
    while names:
        _begin_step(number, name := names.pop())
        with suppress(Exception):
            item = file[name]
            info = h5py.h5o.get_info(item.id)
            if (info.fileno, info.addr) in seen:
                continue
            seen.add((info.fileno, info.addr))
            with suppress(Exception):
                _read_attributes(item)
            if isinstance(item, h5py.Group):
                names += [f"{name.rstrip('/')}/{key}" for key in item]
            elif isinstance(item, h5py.Dataset):
                _read_strings(item, number)


def _read_attributes(item: h5py.HLObject) -> None:
    for key in item.attrs:
        with suppress(Exception):
            item.attrs[key]


def _read_strings(dataset: h5py.Dataset, number: int) -> None:
    """Walk over the index of the chunks of a dataset; if it holds strings, read them."""
    stored = dataset.id.get_storage_size()  # visits the index
    if dataset.dtype.hasobject and dataset.shape == ():
        dataset[()]
    elif dataset.dtype.hasobject and dataset.shape:
        for start in range(0, min(len(dataset), MOST_STRINGS_PER_BYTE * stored), STRINGS_PER_STEP):
            _begin_step(number, dataset.name)
            dataset[start : start + STRINGS_PER_STEP]


if __name__ == "__main__":
    _main()
