"""A web server over a folder, with faults on demand. Answers HEAD and GET alone, without ranges."""

from __future__ import annotations

import hashlib
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

RESET_ON_CLOSE = struct.pack("ii", 1, 0)


@dataclass(slots=True)
class Faults:
    """The faults. `status` is by file name. The numbers count the body's bytes that are sent before the fault."""

    status: dict[str, int] = field(default_factory=dict)
    drop_after: int | None = None  # the connection is reset
    cut_after: int | None = None  # the connection is closed in order
    stall_after: int | None = None  # no more bytes come
    stall: bool = False  # not even a status comes
    lengthless: bool = False  # no Content-Length: the end of the connection is the end of the file
    headless: bool = False  # HEAD isn't allowed
    tagless: bool = False  # no header tells a file's version
    redirect: str = ""  # the address of the folder to redirect to
    dribble: float | None = None  # seconds between a body's bytes, which are sent singly


@dataclass(frozen=True, slots=True)
class FaultyServer:
    """A running server. `requests` records them as "METHOD /path"."""

    url: str
    faults: Faults
    requests: list[str]


class _Server(ThreadingHTTPServer):
    request_queue_size = 64  # a connection to a full queue waits a second


@contextmanager
def serve_folder(folder: Path, faults: Faults | None = None) -> Iterator[FaultyServer]:
    """Serves `folder` on 127.0.0.1 until the end of the context. Tests may change the faults meanwhile."""
    faults = faults or Faults()
    requests: list[str] = []
    over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            self._answer(body=True)

        def log_message(self, format: str, *args: object) -> None:
            pass

        def _answer(self, body: bool) -> None:
            requests.append(f"{self.command} {self.path}")
            path = folder / unquote(urlsplit(self.path).path).lstrip("/")
            if faults.stall:
                over.wait()
                self.close_connection = True
                return
            if faults.redirect:
                self.send_response(302)
                self.send_header("Location", f"{faults.redirect}{self.path}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            status = faults.status.get(path.name, 200 if path.is_file() else 404)
            if faults.headless and not body:
                status = 405
            content = path.read_bytes() if status == 200 else b"no"
            self.send_response(status)
            if faults.lengthless:
                self.send_header("Connection", "close")
            else:
                self.send_header("Content-Length", str(len(content)))
            if status == 200:
                self.send_header("Last-Modified", formatdate(path.stat().st_mtime, usegmt=True))
            if status == 200 and not faults.tagless:
                self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
            self.end_headers()
            if body:
                self._send(content)

        def _send(self, content: bytes) -> None:
            # After a complete answer, a client may reuse the connection: such a connection must not stall.
            stalls = faults.stall_after is not None and len(content) > faults.stall_after
            try:
                for limit in (faults.drop_after, faults.cut_after, faults.stall_after):
                    if limit is not None:
                        content = content[:limit]
                for byte in content if faults.dribble is not None else ():
                    self.wfile.write(bytes([byte]))
                    if over.wait(faults.dribble):
                        break
                else:
                    self.wfile.write(content if faults.dribble is None else b"")
            except OSError:
                self.close_connection = True  # the client has hung up
                return
            if stalls:
                over.wait()
            if faults.drop_after is not None:
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET_ON_CLOSE)
            if (faults.drop_after, faults.cut_after, faults.stall_after) != (None, None, None):
                self.close_connection = True

    with _Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield FaultyServer(f"http://127.0.0.1:{server.server_port}", faults, requests)
        finally:
            over.set()
            server.shutdown()
            thread.join()
