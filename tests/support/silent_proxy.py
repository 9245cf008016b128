"""A TCP relay that can fall silent: connections stay open, but no byte gets through in either direction."""

from __future__ import annotations

import asyncio
from types import TracebackType


class SilentProxy:
    """Relays connections to `target`, `host:port`, until `fall_silent`."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._speaking = asyncio.Event()
        self._speaking.set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> SilentProxy:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def fall_silent(self) -> None:
        self._speaking.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        to_target = None
        try:
            await self._speaking.wait()
            from_target, to_target = await asyncio.open_connection(self._host, self._port)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._relay(reader, to_target))
                both.create_task(self._relay(from_target, writer))
        except* (ConnectionError, OSError):
            pass
        finally:
            self._tasks.discard(task)
            for end in (writer, to_target):
                if end is not None:
                    end.close()

    async def _relay(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(65536):
            await self._speaking.wait()
            writer.write(data)
            await writer.drain()
        writer.close()
