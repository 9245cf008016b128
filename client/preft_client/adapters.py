"""The adapters of a cluster: `client.adapters`, sync and async."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, closing, suppress
from pathlib import Path

from preft_client.errors import BadReply, DeadlineExceeded, ModelNotFound
from preft_client.packing import Package, Progress
from preft_client.results import Adapter, AdapterPage, AdapterPlace
from preft_client.running import AsyncGateways, Gateways
from preft_client.settings import checked_seconds

PAGE = 1000  # entries: the server's maximum
DEFAULT_PAGE = 100
POLL_SECONDS = 0.1
WAIT_SECONDS = 60.0


class Adapters:
    """All calls raise PreftError. A `timeout` in seconds limits the whole call; None is the client's limit."""

    def __init__(self, gateways: Gateways) -> None:
        self._gateways = gateways

    def add(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Serves the adapter at `source`, a URI or a folder that the server can read, under `name`.

        Content that the name already has is no error. Other content needs `replace`, else AdapterExists is raised.
        `progress` hears of fetched bytes; over gRPC only at the end.
        """
        attempts = self._gateways.attempts(timeout, repeatable=True)
        first, rest = self._gateways.begin(lambda wire: wire.add(name, source, replace), attempts)
        with closing(rest):
            while first:
                for event in first:
                    if isinstance(event, Adapter):
                        return event
                    if progress is not None:
                        progress(*event)
                attempts.seconds_left()
                first = next(rest, [])
        raise _untold(name)

    def upload(
        self,
        name: str,
        folder: str | Path,
        *,
        replace: bool = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """Sends the adapter's files in `folder`, and serves them under `name`. HTTP only.

        A repeated attempt sends everything again, and `progress` starts again.
        """
        package = Package.of(folder)
        return self._gateways.result(lambda wire: wire.upload(name, package, replace, progress), timeout)

    def get(self, name: str, *, timeout: float | None = None) -> Adapter:
        """The version that `name` points to now. Raises ModelNotFound."""
        return self._gateways.result(lambda wire: wire.get(name), timeout)

    def places(self, name: str, *, timeout: float | None = None) -> tuple[AdapterPlace, ...]:
        """The workers that have the adapter in memory, or load it. HTTP only."""
        return self._gateways.result(lambda wire: wire.places(name), timeout)

    def page(
        self, *, limit: int = DEFAULT_PAGE, after: str = "", search: str = "", timeout: float | None = None
    ) -> AdapterPage:
        """The first `limit` (at most 1000) entries behind the name `after` whose names hold `search`, in any case."""
        return self._gateways.result(lambda wire: wire.page(limit, after, search), timeout)

    def list(self, *, search: str = "", timeout: float | None = None) -> Iterator[Adapter]:
        """All entries by name, fetched page by page. The time limit is each page's."""
        after = ""
        while True:
            page = self.page(limit=PAGE, after=after, search=search, timeout=timeout)
            yield from page.adapters
            if not page.has_more:
                return
            after = page.adapters[-1].name

    def pin(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Keeps the adapter in the host memory of every prefill worker."""
        return self._gateways.result(lambda wire: wire.pin(name, True), timeout)

    def unpin(self, name: str, *, timeout: float | None = None) -> Adapter:
        """Ends `pin`."""
        return self._gateways.result(lambda wire: wire.pin(name, False), timeout)

    def remove(self, name: str, *, timeout: float | None = None) -> Adapter:
        """From now on, new requests for `name` get ModelNotFound; running ones finish."""
        return self._gateways.result(lambda wire: wire.remove(name), timeout, repeatable=False)

    def wait(self, name: str, *, version: int | None = None, timeout: float = WAIT_SECONDS) -> Adapter:
        """Returns once every gateway of the client serves `name`, in `version` or a later one if that is given.

        A gateway learns of another gateway's additions within half a second. Raises DeadlineExceeded.
        """
        end = time.monotonic() + checked_seconds(timeout, "timeout")
        gateways = range(len(self._gateways.settings.urls))
        return [self._wait_at(number, name, version, end) for number in gateways][-1]

    def _wait_at(self, number: int, name: str, version: int | None, end: float) -> Adapter:
        while True:
            with suppress(ModelNotFound):
                left = _left(end, name)
                entry = self._gateways.result(lambda wire: wire.get(name), left, only=number)
                if version is None or entry.version >= version:
                    return entry
            time.sleep(POLL_SECONDS)


class AsyncAdapters:
    """As Adapters, with `await` and `async for`."""

    def __init__(self, gateways: AsyncGateways) -> None:
        self._gateways = gateways

    async def add(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """As `Adapters.add`."""
        attempts = self._gateways.attempts(timeout, repeatable=True)
        first, rest = await self._gateways.begin(lambda wire: wire.add(name, source, replace), attempts)
        async with aclosing(rest):
            while first:
                for event in first:
                    if isinstance(event, Adapter):
                        return event
                    if progress is not None:
                        progress(*event)
                attempts.seconds_left()
                first = await anext(rest, [])
        raise _untold(name)

    async def upload(
        self,
        name: str,
        folder: str | Path,
        *,
        replace: bool = False,
        progress: Progress | None = None,
        timeout: float | None = None,
    ) -> Adapter:
        """As `Adapters.upload`. `progress` is called in the event loop's thread or in one that reads files."""
        package = await asyncio.to_thread(Package.of, folder)
        return await self._gateways.result(lambda wire: wire.upload(name, package, replace, progress), timeout)

    async def get(self, name: str, *, timeout: float | None = None) -> Adapter:
        """As `Adapters.get`."""
        return await self._gateways.result(lambda wire: wire.get(name), timeout)

    async def places(self, name: str, *, timeout: float | None = None) -> tuple[AdapterPlace, ...]:
        """As `Adapters.places`."""
        return await self._gateways.result(lambda wire: wire.places(name), timeout)

    async def page(
        self, *, limit: int = DEFAULT_PAGE, after: str = "", search: str = "", timeout: float | None = None
    ) -> AdapterPage:
        """As `Adapters.page`."""
        return await self._gateways.result(lambda wire: wire.page(limit, after, search), timeout)

    async def list(self, *, search: str = "", timeout: float | None = None) -> AsyncIterator[Adapter]:
        """As `Adapters.list`."""
        after = ""
        while True:
            page = await self.page(limit=PAGE, after=after, search=search, timeout=timeout)
            for adapter in page.adapters:
                yield adapter
            if not page.has_more:
                return
            after = page.adapters[-1].name

    async def pin(self, name: str, *, timeout: float | None = None) -> Adapter:
        """As `Adapters.pin`."""
        return await self._gateways.result(lambda wire: wire.pin(name, True), timeout)

    async def unpin(self, name: str, *, timeout: float | None = None) -> Adapter:
        """As `Adapters.unpin`."""
        return await self._gateways.result(lambda wire: wire.pin(name, False), timeout)

    async def remove(self, name: str, *, timeout: float | None = None) -> Adapter:
        """As `Adapters.remove`."""
        return await self._gateways.result(lambda wire: wire.remove(name), timeout, repeatable=False)

    async def wait(self, name: str, *, version: int | None = None, timeout: float = WAIT_SECONDS) -> Adapter:
        """As `Adapters.wait`."""
        end = time.monotonic() + checked_seconds(timeout, "timeout")
        gateways = range(len(self._gateways.settings.urls))
        return [await self._wait_at(number, name, version, end) for number in gateways][-1]

    async def _wait_at(self, number: int, name: str, version: int | None, end: float) -> Adapter:
        while True:
            with suppress(ModelNotFound):
                left = _left(end, name)
                entry = await self._gateways.result(lambda wire: wire.get(name), left, only=number)
                if version is None or entry.version >= version:
                    return entry
            await asyncio.sleep(POLL_SECONDS)


def _left(end: float, name: str) -> float:
    if (left := end - time.monotonic()) <= 0:
        raise DeadlineExceeded(f"not every gateway serves {name!r} yet: another of its versions, or none, is there")
    return left


def _untold(name: str) -> BadReply:
    return BadReply(f"the server didn't say whether it added {name!r}: adapters.get tells")
