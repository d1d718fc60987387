"""A small S3 server for tests: one folder as a public read-only bucket, with faults on demand.

It answers what TileDB's S3 client asks of a public bucket: GET (with Range), HEAD and ListObjectsV2, unsigned. Whether
a request fails follows from the seed, the request and how often it was made, not from which thread came first.
"""

import re
import socket
import struct
import threading
from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

KINDS = ("500", "503", "reset", "truncate", "stall")
_ERRORS = {"404": "NoSuchKey", "500": "InternalError", "503": "SlowDown"}
_CHANGING = re.compile(r"[0-9a-f]{32}|\d{10,}")  # what TileDB puts into file names: other in every build
_RESET_ON_CLOSE = struct.pack("ii", 1, 0)  # SO_LINGER of 0 s: close sends RST


@dataclass
class Faults:
    """What goes wrong; may be changed while the server runs.

    Attributes:
        probability: share of the requests that fail.
        kinds: of faults, drawn evenly: an error 500, a 503 SlowDown, a connection reset, a body cut in half, or a
            body that does not come for `stall_s`.
        seed: of the draws.
        stall_s: seconds of silence of a stall, after which the connection is closed.
        only: pattern of the keys that are affected.
        gone: the bucket is empty from now on.
    """

    probability: float = 0.0
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    stall_s: float = 30.0
    only: str = ""
    gone: bool = False
    asked: Counter[str] = field(default_factory=Counter)

    def draw(self, request: str, key: str) -> str | None:
        """Return the fault of this request, or None."""
        request = _CHANGING.sub("", request)
        self.asked[request] += 1
        digest = sha256(f"{self.seed} {request} {self.asked[request]}".encode()).digest()
        if not re.search(self.only, key) or int.from_bytes(digest[:7], "big") >= self.probability * 2**56:
            return None
        return self.kinds[digest[7] % len(self.kinds)]


class S3Server:
    """The bucket `s3://census` with the files of a folder, while the `with` block lasts.

    Attributes:
        faults: what goes wrong.
        outcomes: number of requests answered "ok" and by each fault.
        stalled: set as soon as a request stalls.
    """

    def __init__(self, folder: str | Path, faults: Faults | None = None) -> None:
        self.files = {str(path.relative_to(folder)): path for path in sorted(Path(folder).rglob("*")) if path.is_file()}
        self.faults, self.outcomes = faults or Faults(), Counter[str]()
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
        """The variables that lead TileDB here; nothing else on the machine, nor any credential, may lead elsewhere."""
        return {
            "TILEDB_VFS_S3_ENDPOINT_OVERRIDE": f"127.0.0.1:{self._server.server_port}",
            "TILEDB_VFS_S3_SCHEME": "http",
            "TILEDB_VFS_S3_USE_VIRTUAL_ADDRESSING": "false",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def found(self) -> dict[str, Path]:
        """Return the files of the bucket by key."""
        return {} if self.faults.gone else self.files

    def stall(self) -> None:
        """Be silent for as long as the fault asks, or until the server closes."""
        self.stalled.set()
        self._closing.wait(self.faults.stall_s)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for an acknowledgement

    def __init__(self, s3: S3Server, *arguments: object) -> None:
        self.s3 = s3
        super().__init__(*arguments)  # type: ignore[arg-type]

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
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
        except (BrokenPipeError, ConnectionResetError):  # the client has given up, as after a time-out
            self.close_connection = True

    def _send_object(self, key: str, fault: str | None) -> None:
        body = self.s3.files[key].read_bytes()
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self._answer(200, body, fault=fault)
            return
        first, last = int(asked[1]), min(int(asked[2]), len(body) - 1)
        self._answer(206, body[first : last + 1], fault=fault, content_range=f"bytes {first}-{last}/{len(body)}")

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        """Return the answer to ListObjectsV2: keys below a prefix, those behind a delimiter as one common prefix."""
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
            self.wfile.write(body)
            return
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        if fault == "stall":
            self.s3.stall()
