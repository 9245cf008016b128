"""A lean HTTP client for streamed completions. Owns addresses, keys, time limits and the kept connections.

Common HTTP libraries cost several times as much per token, which would show as a slower server.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

from preft_loadgen.errors import InvalidArgument, RequestFailed
from preft_loadgen.transport.connection import Connection, Stale
from preft_loadgen.transport.events import Events, HangUp
from preft_loadgen.transport.reply import Reply

MAX_JSON_BYTES = 256 << 20
MAX_TIMEOUT = 1e6  # seconds


def check_timeout(seconds: float) -> None:
    """Raises InvalidArgument unless requests can be bounded by so many seconds."""
    if not 0 < seconds <= MAX_TIMEOUT:
        raise InvalidArgument(
            f"the time limit must be more than 0 seconds, and at most {MAX_TIMEOUT:g}, not {seconds:g}"
        )


class HttpClient:
    """Sends requests to one server. `timeout` in seconds bounds each request as a whole.

    Inside `async with`, connections are kept and used again. Else each request has its own.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, api_key: str = "") -> None:
        """`api_key` has visible ASCII characters; "": the server needs none.

        Raises InvalidArgument if `url` isn't an address.
        """
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        plain = port != -1 and not parts.query and "@" not in parts.netloc
        if parts.scheme not in ("http", "https") or not parts.hostname or not plain:
            raise InvalidArgument(f"the server's address must look like http://host:port, not {url!r}")
        check_timeout(timeout)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._host, self._port = parts.hostname, port or (443 if self._tls else 80)
        host = f"[{self._host}]" if ":" in self._host else self._host
        self._base = parts.path.rstrip("/").removesuffix("/v1")  # users paste both forms
        self._timeout = timeout
        self._head = f"Host: {host}:{self._port}\r\nContent-Type: application/json\r\n"
        self._head += f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._kept: list[Connection] | None = None

    async def __aenter__(self) -> Self:
        self._kept = []
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        kept, self._kept = self._kept or [], None
        for connection in kept:
            connection.close()
        await asyncio.sleep(0)  # lets the event loop close them

    async def get_json(self, path: str) -> Any:
        """Returns the decoded JSON answer. Raises RequestFailed."""
        return await self._json("GET", path, b"")

    async def post_json(self, path: str, body: dict[str, Any]) -> Any:
        """Raises RequestFailed."""
        return await self._json("POST", path, json.dumps(body).encode())

    async def patch_json(self, path: str, body: dict[str, Any]) -> Any:
        """Raises RequestFailed."""
        return await self._json("PATCH", path, json.dumps(body).encode())

    async def post(self, path: str, body: dict[str, Any]) -> None:
        """Whatever the body of the answer is. Raises RequestFailed."""
        await self._exchange("POST", path, json.dumps(body).encode(), lambda _: None)

    async def stream(self, path: str, body: dict[str, Any], *, cancel_after: int | None = None) -> Reply:
        """Posts a completion or chat completion and reads its one choice to the end.

        With `cancel_after` the client hangs up after so many pieces of output. Raises RequestFailed if the server
        refuses, disconnects early, or sends an error or nonsense in the stream.
        """
        asked = {**body, "stream": True, "stream_options": {"include_usage": True}}
        events = Events(cancel_after)
        started = time.perf_counter()
        try:
            await self._exchange("POST", path, json.dumps(asked).encode(), events.feed)
        except HangUp:
            return events.reply(started, hung_up=True)
        return events.reply(started)

    async def _json(self, method: str, path: str, body: bytes) -> Any:
        answer = bytearray()

        def take(data: bytes) -> None:
            answer.extend(data)
            if len(answer) > MAX_JSON_BYTES:
                raise RequestFailed(f"{path} answered with more than {MAX_JSON_BYTES >> 20} MiB", kind="malformed")

        await self._exchange(method, path, body, take)
        try:
            return json.loads(answer)
        except (ValueError, RecursionError) as error:
            raise RequestFailed(f"{path} didn't answer with JSON", kind="malformed") from error

    async def _exchange(self, method: str, path: str, body: bytes, on_body: Callable[[bytes], object]) -> None:
        keep = "keep-alive" if self._kept is not None else "close"
        head = f"{method} {self._base}{path} HTTP/1.1\r\nConnection: {keep}\r\n{self._head}"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        try:
            async with asyncio.timeout(self._timeout):
                connection = self._kept_connection()
                if connection is not None:
                    try:
                        return await self._send(connection, request, on_body)
                    except Stale:
                        pass
                await self._send(await self._connect(), request, on_body)
        except TimeoutError:
            raise RequestFailed(f"no whole answer within {self._timeout:g} s", kind="timeout") from None
        except OSError as error:
            message = f"can't reach {self._host}:{self._port}: {error.strerror or error}"
            raise RequestFailed(message, kind="connection") from error

    async def _send(self, connection: Connection, request: bytes, on_body: Callable[[bytes], object]) -> None:
        try:
            await connection.send(request, on_body)
        finally:
            if connection.usable and self._kept is not None:
                self._kept.append(connection)
            else:
                connection.close()

    def _kept_connection(self) -> Connection | None:
        while self._kept:
            connection = self._kept.pop()
            if connection.usable:
                return connection
            connection.close()
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(Connection, self._host, self._port, ssl=self._tls)
        return connection
