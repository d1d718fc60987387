"""How a store is asked, and how often again, before its error is passed on.

Two layers try again. TileDB's S3 client repeats a single request, 5 times within 2 s, after 3 s of silence too, and for
about a minute where the store answers SlowDown; `TILEDB_VFS_S3_*` in the environment changes that. Above it,
`RetryPolicy` repeats whole reads, so that a run outlives an outage of two minutes.

Source: config of TileDB 2.30 (`vfs.s3.connect_max_tries`, `request_timeout_ms`); measured with `tests/s3_server.py`.
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

ATTEMPTS = 8  # reads of a remote object before its error is passed on: 7 waits, 127 s in the mean
# What the store has answered for good; asking again would give the same. Anything else may pass.
_FINAL = re.compile(r"HTTP Response Code: (401|403|404)\b|does not exist|not a valid TileDB|No such file")
_NOISE = re.compile(r"\s*\[(Headers|Remote IP): [^\]]*\]|\s*\n\s*")

Result = TypeVar("Result")


def is_remote(uri: str) -> bool:
    """Return whether a URI names something that is not on this machine's disks."""
    return "://" in uri and not uri.startswith("file://")


def require_no_credentials(uri: str) -> None:
    """Raise if an address holds a password, which would go into logs, settings and cards; it is not repeated here.

    Raises:
        ValueError: there is a user name before the host.
    """
    if is_remote(uri) and "@" in urlsplit(uri).netloc:
        raise ValueError(
            "the address of the data holds a user name or password before '@'; leave it out and give credentials by "
            "the environment, e.g. AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        )


class RetryPolicy:
    """Reads objects of a store, again where it is remote and fails for now.

    Attributes:
        n_retries: reads that were repeated so far, by all threads.
    """

    def __init__(self) -> None:
        self.n_retries = 0
        self._lock = threading.Lock()

    def read(self, uri: str, read: Callable[[], Result]) -> Result:
        """Return what `read` returns; on a remote store after at most `ATTEMPTS`, ever longer apart.

        Args:
            uri: what is read, for log and error.
            read: reads it whole; may be called several times.

        Raises:
            FileNotFoundError: the object is not there, any more or at all.
            PermissionError: the store, or the disk, refuses it.
            ConnectionError: a remote store failed to the last attempt.
            OSError: a local one failed.
        """
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return read()
            # tiledbsoma lets some of TileDB's pass as RuntimeError; pyarrow refuses what it cannot make a table of, and
            # names that are damaged are no text
            except (soma.SOMAError, RuntimeError, OSError, pa.ArrowException, UnicodeDecodeError) as error:
                reason = _NOISE.sub(" ", str(error)).strip()
                if not is_remote(uri) or _FINAL.search(reason) or attempt == ATTEMPTS:
                    raise _passed_on(uri, error, reason, attempt, time.monotonic() - started) from error
                self._wait(uri, reason, attempt)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, uri: str, reason: str, attempt: int) -> None:
        """Sleep 1, 2, 4, … s, at random up to half more or less, so that processes do not ask in step."""
        seconds = 2 ** (attempt - 1) * random.uniform(0.5, 1.5)
        with self._lock:
            self.n_retries += 1
        logger.warning(
            "reading %s failed (%s); attempt %d of %d in %.1f s; %d retries in this run so far",
            *(uri, reason, attempt + 1, ATTEMPTS, seconds, self.n_retries),
        )
        time.sleep(seconds)


def _passed_on(uri: str, error: Exception, reason: str, attempts: int, seconds: float) -> OSError:
    """Return the error that names the object and what to do."""
    if re.search(r"HTTP Response Code: 40[13]\b", reason):
        return PermissionError(
            errno.EACCES, f"the store refuses {uri}: {reason}; check its policy, or your credentials for it"
        )
    gone = _FINAL.search(reason) if is_remote(uri) else not Path(uri.removeprefix("file://")).exists()
    if gone:
        return FileNotFoundError(
            errno.ENOENT,
            f"{uri} cannot be found: {reason}; if it was there before, put it back and resume",
        )
    if is_remote(uri):
        return ConnectionError(
            f"reading {uri} failed {attempts} times in {seconds:.0f} s, in the end with: {reason}; check the network "
            "and the store, then resume from the last checkpoint, or train on a local copy (aws s3 sync)"
        )
    if isinstance(error, OSError) and error.errno:  # the system has said what it is
        return type(error)(error.errno, f"reading {uri} failed: {reason}")
    return OSError(
        errno.EIO, f"reading {uri} failed: {reason}; is it damaged, or written to? Check the disk, or copy it anew"
    )
