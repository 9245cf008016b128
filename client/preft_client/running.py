"""Runs calls over the gateways of a client, sync and async: the loop of attempts around the drivers.

`attempts` has the rule, the wires the forms, and the drivers the connections.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Generator
from contextlib import aclosing, closing
from typing import Any, TypeVar

from preft_client.attempts import Attempts
from preft_client.errors import BadReply, PreftError
from preft_client.http_calls import HttpCall, HttpWire
from preft_client.http_driver import AsyncHttpDriver, HttpDriver
from preft_client.rpc_calls import RpcCall, RpcWire
from preft_client.rpc_driver import AsyncRpcDriver, RpcDriver
from preft_client.settings import Settings, checked_seconds

Event = TypeVar("Event")
Ask = Callable[[HttpWire | RpcWire], HttpCall[Event] | RpcCall[Event]]
"""Makes one attempt's call."""


class _Gateways:
    """What both kinds of runs share. `current` is the gateway that answered last."""

    def __init__(self, settings: Settings) -> None:
        self.wire: HttpWire | RpcWire = RpcWire() if settings.rpc else HttpWire()
        self.settings = settings
        self.current = 0

    def attempts(self, timeout: float | None, *, repeatable: bool, only: int | None = None) -> Attempts:
        """`only`: the one gateway that may be asked."""
        settings = self.settings
        seconds = settings.timeout if timeout is None else checked_seconds(timeout, "timeout")
        targets, first = (len(settings.urls), self.current) if only is None else (1, 0)
        return Attempts(targets, first, settings.retries, seconds, repeatable=repeatable)


class Gateways(_Gateways):
    """Threads may share it."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        kind: Any = RpcDriver if settings.rpc else HttpDriver
        self._drivers = [kind(url, settings) for url in settings.urls]

    def begin(
        self, ask: Ask[Event], attempts: Attempts, only: int | None = None
    ) -> tuple[list[Event], Generator[list[Event], None, None]]:
        """The first events of the answer, and the rest. Raises PreftError once there is no further attempt."""
        while True:
            target = attempts.target if only is None else only
            seconds = attempts.seconds_left()
            try:
                events: Generator[list[Event], None, None] = self._drivers[target].events(ask(self.wire), seconds)
                first = next(events, None)
            except PreftError as error:
                time.sleep(attempts.failed(error))
                continue
            if first is None:
                raise BadReply(f"{self.settings.urls[target]} gave an empty answer")
            if only is None:
                self.current = target
            return first, events

    def result(
        self, ask: Ask[Event], timeout: float | None = None, *, repeatable: bool = True, only: int | None = None
    ) -> Event:
        """The answer of a call with one event."""
        first, events = self.begin(ask, self.attempts(timeout, repeatable=repeatable, only=only), only)
        with closing(events):
            return first[0]

    def close(self) -> None:
        for driver in self._drivers:
            driver.close()


class AsyncGateways(_Gateways):
    """Belongs to one event loop."""

    def __init__(self, settings: Settings) -> None:
        super().__init__(settings)
        kind: Any = AsyncRpcDriver if settings.rpc else AsyncHttpDriver
        self._drivers = [kind(url, settings) for url in settings.urls]

    async def begin(
        self, ask: Ask[Event], attempts: Attempts, only: int | None = None
    ) -> tuple[list[Event], AsyncGenerator[list[Event], None]]:
        """As `Gateways.begin`."""
        while True:
            target = attempts.target if only is None else only
            seconds = attempts.seconds_left()
            try:
                events: AsyncGenerator[list[Event], None] = self._drivers[target].events(ask(self.wire), seconds)
                first = await anext(events, None)
            except PreftError as error:
                await asyncio.sleep(attempts.failed(error))
                continue
            if first is None:
                raise BadReply(f"{self.settings.urls[target]} gave an empty answer")
            if only is None:
                self.current = target
            return first, events

    async def result(
        self, ask: Ask[Event], timeout: float | None = None, *, repeatable: bool = True, only: int | None = None
    ) -> Event:
        """As `Gateways.result`."""
        first, events = await self.begin(ask, self.attempts(timeout, repeatable=repeatable, only=only), only)
        async with aclosing(events):
            return first[0]

    async def close(self) -> None:
        for driver in self._drivers:
            await driver.close()
