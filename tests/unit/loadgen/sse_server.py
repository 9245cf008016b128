"""A fake OpenAI-style server on a raw asyncio socket: each request gets what a script says, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
DONE = b"data: [DONE]\n\n"


@dataclass
class Call:
    """One request as the server got it."""

    method: str
    path: str
    body: Any
    writer: asyncio.StreamWriter
    headers: dict[str, str] = field(default_factory=dict)
    disconnected: asyncio.Event = field(default_factory=asyncio.Event)

    async def write(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()


Script = Callable[[Call], Awaitable[None]]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def event(text: str, finish_reason: str | None = None, **more: Any) -> bytes:
    body = {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}], **more}
    return b"data: " + json.dumps(body).encode() + b"\n\n"


def usage(tokens: int) -> bytes:
    return b"data: " + json.dumps({"choices": [], "usage": {"completion_tokens": tokens}}).encode() + b"\n\n"


def json_reply(status: str, body: Any) -> bytes:
    data = json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


async def tokens(call: Call, delay: float = 0.0) -> None:
    """As many one-token events as were asked for, then usage and the end."""
    count = call.body["max_tokens"]
    await call.write(HEAD)
    for number in range(count):
        if delay:
            await asyncio.sleep(delay)
        await call.write(chunk(event(" t", "length" if number == count - 1 else None)))
    await call.write(chunk(usage(count)) + chunk(DONE) + b"0\r\n\r\n")


@asynccontextmanager
async def fake_server(script: Script, calls: list[Call] | None = None) -> AsyncIterator[str]:
    """Serves `script` until the context is left; gives the URL. `calls` collects the requests."""

    tasks: set[asyncio.Task[None] | None] = set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError), contextlib.closing(writer):
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            method, path, _ = head.split(" ", 2)
            length = next(int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:"))
            body = await reader.readexactly(length)
            fields = [line.split(": ", 1) for line in head.strip().split("\r\n")[1:]]
            headers = {name.lower(): value for name, value in fields}
            call = Call(method, path, json.loads(body) if body else None, writer, headers)
            if calls is not None:
                calls.append(call)

            async def watch() -> None:
                with contextlib.suppress(ConnectionError):
                    await reader.read()
                call.disconnected.set()

            watcher = asyncio.create_task(watch())
            try:
                await script(call)
            finally:
                watcher.cancel()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    finally:
        server.close()
        for task in tasks:
            assert task is not None
            task.cancel()
        await asyncio.gather(*filter(None, tasks), return_exceptions=True)
