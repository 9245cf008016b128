"""The client's two styles behind one blocking face, so that each test is written once."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from preft_client import AsyncClient, AsyncStream, Client

STYLES = [(transport, style) for transport in ("http", "grpc") for style in ("sync", "async")]
IDS = [f"{transport}-{style}" for transport, style in STYLES]


class LoopThread:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="client-loop")
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(120)

    def close(self) -> None:
        self.run(self.loop.shutdown_asyncgens())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Blocking:
    """Any object of the async client: coroutines are awaited, streams and async iterators become blocking ones."""

    def __init__(self, inner: Any, thread: LoopThread) -> None:
        self._inner, self._thread = inner, thread

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._inner, name)
        return self._call(value) if callable(value) else self._shown(value)

    def __enter__(self) -> Any:
        self._thread.run(self._inner.__aenter__())
        return self

    def __exit__(self, *error: Any) -> None:
        self._thread.run(self._inner.__aexit__(*error))

    def __iter__(self) -> Iterator[Any]:
        while True:
            try:
                yield self._thread.run(anext_of(self._inner))
            except StopAsyncIteration:
                return

    def __next__(self) -> Any:
        try:
            return self._thread.run(anext_of(self._inner))
        except StopAsyncIteration:
            raise StopIteration from None

    def _call(self, method: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            value = method(*args, **options)
            return self._thread.run(value) if inspect.iscoroutine(value) else self._shown(value)

        return call

    def _shown(self, value: Any) -> Any:
        parts = isinstance(value, AsyncStream) or hasattr(value, "_gateways") or inspect.isasyncgen(value)
        return Blocking(value, self._thread) if parts else value


async def anext_of(iterator: Any) -> Any:
    return await anext(iterator)


@contextmanager
def a_client(style: str, url: Any, **options: Any) -> Iterator[Any]:
    """A Client, or an AsyncClient that looks like one."""
    if style == "sync":
        with Client(url, **options) as client:
            yield client
        return
    thread = LoopThread()
    try:
        with Blocking(AsyncClient(url, **options), thread) as client:
            yield client
    finally:
        thread.close()
