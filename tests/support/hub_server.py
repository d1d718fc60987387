"""Serve the Hub of `hub_api.py` over HTTP on localhost, and inject faults: error responses and dropped connections.

Tests use the unmodified `huggingface_hub` as client; HF_ENDPOINT directs it here (see `client_environment`).
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.support.hub_api import Answer, Files, HubState, Request, respond

# Type of the fixture `client`, which calls a function in a process whose `huggingface_hub` talks to the local Hub.
Client = Callable[..., Any]


@dataclass
class Fault:
    """A fault in the next `times` requests whose "METHOD /path" contains `match`.

    With a `status`, the request is answered with it. Otherwise the connection is closed after `after_bytes` of the
    request's body, or of the response's body if the request has none.
    """

    match: str
    status: int | None = None
    after_bytes: int = 0
    times: int = 1


class Hub:
    """A running Hub: `with Hub() as hub: ... hub.url`."""

    def __init__(self) -> None:
        self.state = HubState()
        self.faults: list[Fault] = []
        self.requests: list[str] = []  # "METHOD /path" of every request, in the order of arrival
        self._lock = threading.Lock()

    def __enter__(self) -> "Hub":
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (_Handler,), {"hub": self}))
        self.url = self.state.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def files(self, repo_id: str, revision: str = "main", kind: str = "models") -> Files:
        """Return the files of a repository by name."""
        repository = self.state.repositories[f"{kind}/{repo_id}"]
        return repository.commits[repository.branches[revision]]

    @contextmanager
    def fault(self, match: str, **options: int) -> Iterator[Fault]:
        """Inject a fault inside a `with` block; see `Fault`."""
        fault = Fault(match, **options)
        self.faults.append(fault)
        try:
            yield fault
        finally:
            self.faults.remove(fault)

    def record(self, request: str) -> Fault | None:
        """Add a request to `requests`, and return the fault to inject into it."""
        with self._lock:
            self.requests.append(request)
            for fault in self.faults:
                if fault.times and fault.match in request:
                    fault.times -= 1
                    return fault
        return None


def client_environment(hub: Hub, home: Path) -> dict[str, str]:
    """Return environment variables that direct `huggingface_hub` to this server; it reads them on import."""
    proxies = ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")
    return dict.fromkeys((*proxies, "HF_TOKEN"), "") | {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
    }


class _Handler(BaseHTTPRequestHandler):
    """Handle one connection: read requests, inject faults, send answers."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, format: str, *arguments: Any) -> None:
        """Log nothing."""

    def do_GET(self) -> None:
        """Answer a request, or inject its fault."""
        address = urlsplit(self.path)
        fault = self.hub.record(f"{self.command} {address.path}")
        drop_after = fault.after_bytes if fault and fault.status is None else None
        body = self._read(drop_after)
        if body is None:
            return self._hang_up()
        if fault and fault.status:
            return self._send(Answer(fault.status, b'{"error": "fault on demand"}', {"Retry-After": "0"}), None)
        query = {name: values[-1] for name, values in parse_qs(address.query).items()}
        request = Request(self.hub.state, self.command, address.path, query, self.headers, body)
        self._send(respond(request), drop_after)

    do_HEAD = do_POST = do_PUT = do_GET

    def _read(self, drop_after: int | None) -> bytes | None:
        """Return the body, or None if the connection is to be dropped while reading it."""
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        length = int(self.headers.get("Content-Length", 0))
        if drop_after is not None and (length or chunked):
            self.rfile.read(drop_after)
            return None
        if not chunked:
            return self.rfile.read(length)
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, answer: Answer, drop_after: int | None) -> None:
        self.send_response(answer.status)
        headers = {"Content-Type": "application/json", "Content-Length": str(len(answer.content)), **answer.headers}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer.content[:drop_after])
        if drop_after is not None:
            self.wfile.flush()
            self._hang_up()

    def _hang_up(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(2)
