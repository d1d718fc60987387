"""Whether the HDF5 library survives a file: a process of its own finds out first.

On some damaged files the C library itself loops for ever or crashes: a blanked entry in the heap where HDF5 keeps its
strings is enough, and nothing in the same process could stop it. So a child walks over groups, attributes, strings and
the indexes of chunks, all but the numbers. What merely raises there raises again where it is read (`soundness.py`).

Run as a script, this file is the child; it imports nothing of ours, for it has to start fast.
"""

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress

import h5py

STEP_S = 10.0  # processor time of one step: an honest one takes milliseconds, and waiting for a slow disk takes none
STRINGS = 100_000  # read in one step
PACKED = 65  # most strings whose addresses of 16 bytes zlib packs into one

_survived: set[tuple[str, int, int, int]] = set()


def require_readable(paths: Sequence[str]) -> None:
    """Return if HDF5 can walk over these files; one child for all, and none for files that this process has had walked.

    Args:
        paths: HDF5 files.

    Raises:
        OSError: a file does not exist, or the child cannot work at all.
        ValueError: HDF5 crashes on a file, or does not come to an end.
    """
    versions = {path: _version(path) for path in paths}
    new = [path for path, version in versions.items() if version not in _survived]
    if not new:
        return
    try:
        child = subprocess.run(
            [sys.executable or "", "-P", __file__, str(STEP_S)],  # -P: the modules beside this file are not Python's
            input="\0".join(new).encode(errors="surrogateescape"),
            capture_output=True,
            start_new_session=True,  # Ctrl-C is ours to answer, not the child's
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            check=False,
        )
    except OSError as error:
        raise ChildProcessError(
            f"cannot examine {new[0]!r} before it is opened: starting Python as {sys.executable!r} failed: {error}"
        ) from error
    if child.returncode > 0:
        said = child.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise ChildProcessError(f"cannot examine {new[0]!r} before it is opened: {said}")
    if child.returncode < 0:
        number, _, place = child.stdout.decode(errors="replace").strip().rpartition("\n")[2].partition(" ")
        fate = signal.Signals(-child.returncode).name
        raise ValueError(
            f"cannot read {new[int(number or 0)]!r} as an .h5ad file: at {place or 'its start'} the HDF5 library "
            f"{'does not come to an end' if fate == 'SIGPROF' else f'dies of {fate}'}; is it whole? Copy it again, or "
            "write it anew with anndata"
        )
    _survived.update(versions.values())


def _version(path: str) -> tuple[str, int, int, int]:
    found = os.stat(path)
    return os.path.realpath(path), found.st_ino, found.st_size, found.st_mtime_ns


def _main() -> None:
    """Walk over the files named on stdin, saying each step on stdout; the first that takes too long is the last."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a crash leaves nothing on the disk
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # ends the process, also in the middle of the C library
    for number, path in enumerate(sys.stdin.buffer.read().decode(errors="surrogateescape").split("\0")):
        _begin(number, "/")
        with suppress(Exception), h5py.File(path, "r") as file:
            _walk(file, number)


def _begin(number: int, place: str) -> None:
    sys.stdout.write(f"{number} {place!a}\n")
    sys.stdout.flush()
    signal.setitimer(signal.ITIMER_PROF, float(sys.argv[1]))


def _walk(file: h5py.File, number: int) -> None:
    """Touch every object once, however links run; go on where something raises."""
    names, seen = ["/"], set()
    while names:
        _begin(number, name := names.pop())
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
                _touch(item, number)


def _read_attributes(item: h5py.HLObject) -> None:
    for key in item.attrs:
        with suppress(Exception):
            item.attrs[key]


def _touch(dataset: h5py.Dataset, number: int) -> None:
    """Walk over the index of the chunks; read the strings."""
    stored = dataset.id.get_storage_size()
    if dataset.dtype.hasobject and dataset.shape == ():
        dataset[()]
    elif dataset.dtype.hasobject and dataset.shape:
        for start in range(0, min(len(dataset), PACKED * stored), STRINGS):  # whatever length a damaged file claims
            _begin(number, dataset.name)
            dataset[start : start + STRINGS]


if __name__ == "__main__":
    _main()
