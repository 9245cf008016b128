"""An ASGI app behind a real uvicorn on a free port: in the caller's event loop, or in a thread with its own loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn


@asynccontextmanager
async def served_app(app: Any) -> AsyncIterator[int]:
    """The port on 127.0.0.1."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error", http="httptools", ws="none", lifespan="off"))
    task = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    yield server.servers[0].sockets[0].getsockname()[1]
    server.should_exit = True
    await task


@contextmanager
def served_in_thread(app: Any) -> Iterator[int]:
    """Like `served_app`, for tests that block."""
    port: Future[int] = Future()
    stop = threading.Event()

    async def serve() -> None:
        async with served_app(app) as number:
            port.set_result(number)
            while not stop.is_set():
                await asyncio.sleep(0.01)

    thread = threading.Thread(target=asyncio.run, args=(serve(),))
    thread.start()
    try:
        yield port.result(10)
    finally:
        stop.set()
        thread.join()
