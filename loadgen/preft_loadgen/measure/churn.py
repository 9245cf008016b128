"""Churn: while a load runs, new adapters appear and versions of them are replaced, through the server's adapter API.

Touches no adapter of the server's own: all changes are of adapters that this module added, which it removes at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from preft_loadgen.errors import InvalidArgument, LoadgenError
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.reply import Reply
from preft_loadgen.transport.server import Send, Server

PREFIX = "loadgen-churn-"
CONFIGS = ("adapter_config.json", "reft_config.json")


@dataclass(frozen=True, slots=True)
class Change:
    """One change, at `started` seconds into the run: its kind is "add" or "replace". `error`: why it failed."""

    kind: str
    name: str
    folder: str
    started: float
    seconds: float
    error: str | None = None


@dataclass(frozen=True, slots=True)
class _Version:
    """A name's content: possible from `sent` on, certain from `done` on, until the next version is certain."""

    folder: str
    sent: float
    done: float


def churn_folders(parent: Path) -> tuple[str, ...]:
    """The adapter folders in `parent`, by name. Raises InvalidArgument unless there are two."""
    try:
        found = sorted(path for path in parent.iterdir() if any((path / config).is_file() for config in CONFIGS))
    except OSError as error:
        raise InvalidArgument(f"{parent} can't be read: {error.strerror}") from error
    if len(found) < 2:
        raise InvalidArgument(
            f"{parent} needs at least two adapter folders: make some with `preft loadgen make-adapters`"
        )
    return tuple(str(path.absolute()) for path in found)


class Churn:
    """Changes adapters of one server every `seconds`, in turns: a new one appears, the newest gets another version.

    A new adapter takes over the traffic of one of `models`.
    """

    def __init__(self, server: Server, models: Sequence[str], folders: Sequence[str], seconds: float) -> None:
        self.changes: list[Change] = []
        self._server, self._models, self._folders, self._seconds = server, list(models), list(folders), seconds
        self._names: dict[str, str] = {}
        self._versions: dict[str, list[_Version]] = {}
        self._begin = time.perf_counter()

    def sends(self, send: Send) -> Send:
        """`send` for the models' present names."""

        async def renamed(request: Request) -> Reply:
            name = self._names.get(request.model)
            if name is None:
                return await send(request)
            return replace(await send(replace(request, model=name)), model=name)

        return renamed

    def contents(self, model: str, sent: float, ended: float) -> set[str]:
        """The folders whose answer a request to `model` between these times may get; {model} if churn didn't add it."""
        versions = self._versions.get(model)
        if versions is None:
            return {model}
        following = [version.done for version in versions[1:]] + [float("inf")]
        return {
            version.folder
            for version, next_done in zip(versions, following, strict=True)
            if version.sent <= ended and next_done >= sent
        }

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Changes adapters inside the context; removes all that were added at its end."""
        self._begin = time.perf_counter()
        end = asyncio.Event()
        changing = asyncio.create_task(self._change(end))
        try:
            yield
        finally:
            end.set()
            await changing  # a change that was cut off could still happen later, and would leave its adapter behind
            for name in self._versions:
                with contextlib.suppress(LoadgenError):
                    await self._server.unload_adapter(name)

    async def _change(self, end: asyncio.Event) -> None:
        number = 0
        while not await self._ended(end):
            folder = self._folders[number % len(self._folders)]
            if number % 2 == 0:
                name = f"{PREFIX}{number // 2}"
                if await self._load("add", name, folder):
                    self._names[self._models[number // 2 % len(self._models)]] = name
            elif self._versions:
                await self._load("replace", list(self._versions)[-1], folder)
            number += 1

    async def _ended(self, end: asyncio.Event) -> bool:
        """Waits for the time of the next change, or for the end."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._seconds):
                await end.wait()
        return end.is_set()

    async def _load(self, kind: str, name: str, folder: str) -> bool:
        sent, error = time.perf_counter(), None
        versions = self._versions.setdefault(name, [])
        versions.append(_Version(folder, sent, float("inf")))
        try:
            await self._server.load_adapter(name, folder)
            versions[-1] = _Version(folder, sent, time.perf_counter())
        except LoadgenError as failure:
            error = str(failure)
            versions.pop()
            if not versions:
                del self._versions[name]
        self.changes.append(Change(kind, name, folder, sent - self._begin, time.perf_counter() - sent, error))
        return error is None
