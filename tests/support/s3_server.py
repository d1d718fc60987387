"""A small S3 server for tests. It serves a folder as a public, read-only bucket and can inject faults.

It supports the unsigned requests that TileDB's S3 client sends to a public bucket: GET (with Range), HEAD and
ListObjectsV2. Whether a request fails depends on the seed, the request and the number of times it was sent, and not on
the order in which threads send requests.
"""

import re
import socket
import struct
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KINDS = ("500", "503", "reset", "truncate", "stall")
_ERRORS = {"403": "AccessDenied", "404": "NoSuchKey", "500": "InternalError", "503": "SlowDown"}
_CHANGING = re.compile(
    r"[0-9a-f]{32}|\d{10,}"
)  # ids and timestamps in TileDB's file names, which differ between builds
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # with SO_LINGER of 0 s, close() sends RST


@dataclass
class Faults:
    """The faults to inject. They may be changed while the server runs.

    Attributes:
        probability: share of the requests that fail.
        kinds: kinds of faults, equally likely: an error 500, a 503 SlowDown, a connection reset, a body cut in half, or
            a body that stalls for `stall_s`.
        seed: seed of the random choice.
        stall_s: seconds without data in a stall; then the connection closes.
        only: regular expression of the keys that may fail.
        gone: whether the bucket is empty from now on.
        latency_s: seconds before each answer.
        n_requests: number of times each request was sent.
    """

    probability: float = 0.0
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    stall_s: float = 30.0
    only: str = ""
    gone: bool = False
    latency_s: float = 0.0
    n_requests: Counter[str] = field(default_factory=Counter)

    def draw(self, request: str, key: str) -> str | None:
        """Choose the fault of a request; None if it succeeds."""
        request = _CHANGING.sub("", request)
        self.n_requests[request] += 1
        digest = sha256(f"{self.seed} {request} {self.n_requests[request]}".encode()).digest()
        if not re.search(self.only, key) or int.from_bytes(digest[:7], "big") >= self.probability * 2**56:
            return None
        return self.kinds[digest[7] % len(self.kinds)]


class S3Server:
    """Serves the files of a folder as the bucket `s3://census` within a `with` block.

    Attributes:
        faults: the faults to inject.
        outcomes: number of requests by outcome: "ok" or a kind of fault.
        stalled: event that is set when a request stalls.
        send: sends the body of an answer: called with the function that writes bytes to the connection, and the body.
    """

    def __init__(
        self,
        folder: str | Path,
        faults: Faults | None = None,
        send: Callable[[Callable[[bytes], object], bytes], object] = lambda write, body: write(body),
    ) -> None:
        self.files = {str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        self.faults, self.outcomes, self.send = faults or Faults(), Counter[str](), send
        self.stalled, self._closing = threading.Event(), threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, self))
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "S3Server":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that make TileDB use this server, without credentials."""
        return {
            "TILEDB_VFS_S3_ENDPOINT_OVERRIDE": f"127.0.0.1:{self._server.server_port}",
            "TILEDB_VFS_S3_SCHEME": "http",
            "TILEDB_VFS_S3_USE_VIRTUAL_ADDRESSING": "false",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def found(self) -> dict[str, Path]:
        """Return the files of the bucket by key."""
        return {} if self.faults.gone else self.files

    def wait(self) -> None:
        """Wait for the latency of a request."""
        self._closing.wait(self.faults.latency_s)

    def stall(self) -> None:
        """Wait for `stall_s`, or until the server closes."""
        self.stalled.set()
        self._closing.wait(self.faults.stall_s)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise each response waits 40 ms for an acknowledgement

    def __init__(self, s3: S3Server, *arguments: object) -> None:
        self.s3 = s3
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.s3.wait()
        url = urlsplit(self.path)
        key, query = unquote(url.path).removeprefix("/census").lstrip("/"), parse_qs(url.query)
        request = f"{self.command} {self.path} {self.headers.get('Range', '')}"
        fault = self.s3.faults.draw(request, key or query.get("prefix", [""])[0])
        if fault is None and key and key not in self.s3.found():
            fault = "404"
        self.s3.outcomes[fault or "ok"] += 1
        try:
            if fault in _ERRORS:
                self._answer(int(fault), f"<Error><Code>{_ERRORS[fault]}</Code></Error>".encode())
            elif fault == "reset":
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_ON_CLOSE)
                self.close_connection = True
            elif key in self.s3.found():
                self._send_object(key, fault)
            else:
                self._answer(200, b"" if key else self._listing(query), fault=fault)
        except (BrokenPipeError, ConnectionResetError):  # the client closed the connection, for example after a timeout
            self.close_connection = True

    def _send_object(self, key: str, fault: str | None) -> None:
        body = self.s3.files[key].read_bytes()
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if requested is None:
            self._answer(200, body, fault=fault)
            return
        first, last = int(requested[1]), min(int(requested[2]), len(body) - 1)
        self._answer(206, body[first : last + 1], fault=fault, content_range=f"bytes {first}-{last}/{len(body)}")

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        """Return the response to ListObjectsV2: keys with a prefix, grouped by common prefix up to the delimiter."""
        prefix, delimiter = (query.get(name, [""])[0] for name in ("prefix", "delimiter"))
        most, after = int(query.get("max-keys", ["1000"])[0]), query.get("continuation-token", [""])[0]
        found = dict.fromkeys(
            prefix + rest[: rest.index(delimiter) + 1] if delimiter and delimiter in rest else key
            for key in sorted(self.s3.found())
            if key.startswith(prefix)
            for rest in (key[len(prefix) :],)
        )
        names = [name for name in found if name > after]
        parts = [
            f"<CommonPrefixes><Prefix>{escape(name)}</Prefix></CommonPrefixes>"
            if name not in self.s3.files
            else f"<Contents><Key>{escape(name)}</Key><Size>{self.s3.files[name].stat().st_size}</Size></Contents>"
            for name in names[:most]
        ]
        cut = len(names) > most
        token = f"<NextContinuationToken>{escape(names[most - 1])}</NextContinuationToken>" if cut and most else ""
        return (
            f"<ListBucketResult><Name>census</Name><KeyCount>{len(parts)}</KeyCount>"
            f"<IsTruncated>{str(cut).lower()}</IsTruncated>{token}{''.join(parts)}</ListBucketResult>"
        ).encode()

    def _answer(self, status: int, body: bytes, *, fault: str | None = None, content_range: str = "") -> None:
        if fault == "stall" and self.command == "HEAD":
            self.s3.stall()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/xml")
        self.send_header("Last-Modified", "Mon, 23 Nov 2026 00:00:00 GMT")
        if content_range:
            self.send_header("Content-Range", content_range)
        self.end_headers()
        self.close_connection = self.close_connection or fault is not None
        if self.command == "HEAD":
            return
        if fault is None:
            self.s3.send(self.wfile.write, body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.s3.stall()
