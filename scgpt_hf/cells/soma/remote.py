"""Retry reads of remote stores, and translate the errors of TileDB and Arrow into those of Python.

Two layers retry:

1. The S3 client of TileDB repeats a single request up to 5 times within 2 s, also after 3 s without an answer, and for
   about a minute if the store answers SlowDown. The environment variables `TILEDB_VFS_S3_*` change that.
2. `RetryPolicy` repeats complete reads, so that a run continues after an outage of up to two minutes.

Source: config of TileDB 2.30 (`vfs.s3.connect_max_tries`, `request_timeout_ms`); measured with
`tests/support/s3_server.py`.
"""

import errno
import logging
import random
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar
from urllib.parse import urlsplit

import pyarrow as pa
import tiledbsoma as soma

logger = logging.getLogger(__name__)

# Chunks of a remote store that are read at the same time, at most: together they take about 1 GB.
MAX_THREADS = 24
MAX_ATTEMPTS = 8  # of reading a remote object: 7 waits, together 127 s on average
# Failures that another attempt would repeat, in the words of TileDB or of Arrow. All others may be temporary.
_DENIED = re.compile(r"HTTP Response Code: 40[13]\b|ACCESS_DENIED|INVALID_ACCESS_KEY_ID|SIGNATURE_DOES_NOT_MATCH")
_PERMANENT = re.compile(rf"{_DENIED.pattern}|HTTP Response Code: 404\b|does not exist|not a valid TileDB|No such file")
# Headers and line breaks in the messages of the S3 client, which are removed
_NOISE = re.compile(r"\s*\[(Headers|Remote IP): [^\]]*\]|\s*\n\s*")

Result = TypeVar("Result")


def is_remote(uri: str) -> bool:
    """Return whether a URI is that of a remote store, not of a local file."""
    return "://" in uri and not uri.startswith("file://")


def threads_to_read(busy_s: float, cpu_s: float, n_cores: int) -> int:
    """Return how many threads keep the cores busy while some of them wait for the network, up to `MAX_THREADS`.

    Args:
        busy_s: seconds that threads took to read some chunks, added up.
        cpu_s: their processor time.
        n_cores: number of cores.

    Source: cores * (1 + waiting time / processor time), Goetz et al., Java Concurrency in Practice, section 8.2.

    Example:
        >>> threads_to_read(busy_s=4.0, cpu_s=1.0, n_cores=2)
        8
    """
    return max(1, min(MAX_THREADS, round(n_cores * busy_s / max(cpu_s, 1e-3))))


def require_no_credentials(uri: str) -> None:
    """Raise if an address contains a user name or a password; both would end up in logs, settings and model cards.

    Raises:
        ValueError: there is an "@" before the host; the message does not repeat the address.
    """
    if is_remote(uri) and "@" in urlsplit(uri).netloc:
        raise ValueError(
            "the address of the data contains a user name or password before '@'; remove it and pass credentials in "
            "environment variables, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


class RetryPolicy:
    """Read objects of a store; repeat reads of a remote store that may have failed temporarily.

    Several threads may share a policy.

    Attributes:
        n_retries: number of repeated reads so far, by all threads.
    """

    def __init__(self) -> None:
        self.n_retries = 0
        self._lock = threading.Lock()

    def read(self, uri: str, read: Callable[[], Result]) -> Result:
        """Return the result of `read`; on a remote store after up to `MAX_ATTEMPTS`, with growing waits in between.

        Args:
            uri: the object that is read, for log lines and errors.
            read: reads the complete object; may be called several times.

        Raises:
            FileNotFoundError: the object does not exist, or no longer.
            PermissionError: the store or the file system denies access.
            ConnectionError: a remote store failed in every attempt.
            OSError: a local file cannot be read.
        """
        started = time.monotonic()
        for attempt in range(1, MAX_ATTEMPTS + 1):
            try:
                return read()
            # RuntimeError: tiledbsoma lets some errors of TileDB pass as such. ArrowException: tables with damaged
            # contents. UnicodeDecodeError: damaged names.
            except (soma.SOMAError, RuntimeError, OSError, pa.ArrowException, UnicodeDecodeError) as error:
                reason = _NOISE.sub(" ", str(error)).strip()
                if not is_remote(uri) or _PERMANENT.search(reason) or attempt == MAX_ATTEMPTS:
                    raise _translate_error(uri, error, reason, attempt, time.monotonic() - started) from error
                self._wait(uri, reason, attempt)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, uri: str, reason: str, attempt: int) -> None:
        """Sleep 1, 2, 4, … s, randomly up to half more or less, so that processes do not retry at the same moment."""
        seconds = 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
        with self._lock:
            self.n_retries += 1
        logger.warning(
            "reading %s failed (%s); attempt %d of %d in %.1f s; %d retries so far",
            *(uri, reason, attempt + 1, MAX_ATTEMPTS, seconds, self.n_retries),
        )
        time.sleep(seconds)


def _translate_error(uri: str, error: Exception, reason: str, n_attempts: int, seconds: float) -> OSError:
    """Return the OSError to raise: its type is the kind of failure, its message names the object and what to do."""
    if _DENIED.search(reason):
        return PermissionError(
            errno.EACCES, f"access to {uri} was denied: {reason}; check the policy of the store and your credentials"
        )
    missing = _PERMANENT.search(reason) if is_remote(uri) else not Path(uri.removeprefix("file://")).exists()
    if missing:
        return FileNotFoundError(
            errno.ENOENT, f"{uri} does not exist: {reason}; if it existed before, restore it and resume the run"
        )
    if is_remote(uri):
        return ConnectionError(
            f"reading {uri} failed {n_attempts} times in {seconds:.0f} s, the last time with: {reason}; check the "
            "network and the store, then resume from the last checkpoint, or train on a local copy (aws s3 sync)"
        )
    if isinstance(error, OSError) and error.errno:  # an error of the operating system, such as a missing permission
        return type(error)(error.errno, f"reading {uri} failed: {reason}")
    return OSError(
        errno.EIO,
        f"reading {uri} failed: {reason}; it may be damaged or have been written to: check the disk or copy it again",
    )
