"""A web site on loopback that answers as it is told to: documented replies, and what hostile or broken servers send."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Answer = Callable[["Request"], None]


class Request(BaseHTTPRequestHandler):
    """One request; a route answers it with the methods here."""

    protocol_version = "HTTP/1.1"
    server: Any
    body: bytes

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        route = self.server.routes.get(self.path.partition("?")[0], self.server.default)
        if route is None:
            self.send(b'{"error": "no such thing"}', 404, {"Content-Type": "application/json"})
        else:
            route(self)

    do_POST = do_PUT = do_HEAD = do_GET

    def send(self, data: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def redirect(self, to: str, status: int = 307) -> None:
        self.send(b"", status, {"Location": to})

    def send_file(self, data: bytes, etag: str = '"v1"', *, stop_after: int | None = None) -> None:
        """Send a file as servers do that let downloads go on; `stop_after` bytes of it, and then nothing more."""
        start, status = 0, 200
        wanted = self.headers.get("Range")
        if wanted and self.headers.get("If-Range") in (None, etag):
            start, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
        if start >= len(data) and status == 206:
            self.send(b"", 416, {"Content-Range": f"bytes */{len(data)}"})
            return
        part = data[start:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("ETag", etag)
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part if stop_after is None else part[:stop_after])
        if stop_after is not None:
            self.wfile.flush()
            self.close_connection = True

    def dribble(self, data: bytes, pause_s: float = 0.05) -> None:
        """Send bytes one by one, so that no single wait is long."""
        try:
            for byte in data:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(pause_s)
        except OSError:
            pass


class Site(ThreadingHTTPServer):
    """The server: `routes` by path, `seen` as (method, path, headers)."""

    daemon_threads = True

    def __init__(self) -> None:
        self.routes: dict[str, Answer] = {}
        self.default: Answer | None = None
        self.seen: list[tuple[str, str, dict[str, str]]] = []
        super().__init__(("127.0.0.1", 0), Request)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *args: object) -> None:
        pass  # clients that hang up are what is tested


@contextmanager
def running() -> Iterator[Site]:
    site = Site()
    threading.Thread(target=site.serve_forever, args=(0.02,), daemon=True).start()
    try:
        yield site
    finally:
        site.shutdown()
        site.server_close()
