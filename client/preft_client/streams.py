"""Running answers: iterators of deltas that cancel the work on the server when they are left."""

from __future__ import annotations

from collections import deque
from collections.abc import AsyncGenerator, Generator
from types import TracebackType
from typing import TYPE_CHECKING

from preft_client.attempts import Attempts
from preft_client.errors import ConnectionFailed, StreamBroken
from preft_client.http_calls import HttpCall, HttpWire
from preft_client.parameters import Asked
from preft_client.results import Delta, Generation, Joined
from preft_client.rpc_calls import RpcCall, RpcWire
from preft_client.running import AsyncGateways, Gateways

if TYPE_CHECKING:
    from typing_extensions import Self


class _Stream:
    """The deltas that have arrived and aren't read yet, and those that were read."""

    def __init__(self, asked: Asked) -> None:
        self._asked = asked
        self._attempts: Attempts | None = None
        self._waiting: deque[Delta] = deque()
        self._joined = Joined()
        self._ended = False

    @property
    def generation(self) -> Generation:
        """All that was read so far, joined."""
        return self._joined.generation()

    def _take(self) -> Delta:
        delta = self._waiting.popleft()
        self._joined.add(delta)
        return delta

    def _check_time(self) -> None:
        if self._attempts is not None:
            self._attempts.seconds_left()

    def _ask(self, wire: HttpWire | RpcWire) -> HttpCall[Delta] | RpcCall[Delta]:
        return wire.generate(self._asked, self._joined.facts)


class Stream(_Stream):
    """The deltas of a running answer. Leaving the `with` block, or `cancel`, cancels the work on the server.

    The request is sent on entering the block, or with the first `next`. Once the first delta is there, nothing is
    repeated: a broken connection raises StreamBroken.
    """

    def __init__(self, gateways: Gateways, asked: Asked, timeout: float | None) -> None:
        super().__init__(asked)
        self._gateways, self._timeout = gateways, timeout
        self._events: Generator[list[Delta], None, None] | None = None

    def __enter__(self) -> Self:
        self._begin()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Delta:
        self._begin()
        while not self._waiting:
            if self._ended or self._events is None:
                raise StopIteration
            self._check_time()
            try:
                self._waiting.extend(next(self._events))
            except StopIteration:
                self._ended = True
            except ConnectionFailed as error:
                raise StreamBroken(f"the answer broke off after its beginning: {error}") from error
        return self._take()

    def read(self) -> Generation:
        """Reads to the end; returns the whole answer."""
        for _ in self:
            pass
        return self.generation

    def cancel(self) -> None:
        """Ends the answer here and on the server. `generation` keeps what was read."""
        self._ended = True
        self._waiting.clear()
        if self._events is not None:
            self._events.close()

    def _begin(self) -> None:
        if self._events is None and not self._ended:
            self._attempts = self._gateways.attempts(self._timeout, repeatable=True)
            first, self._events = self._gateways.begin(self._ask, self._attempts)
            self._waiting.extend(first)


class AsyncStream(_Stream):
    """As Stream, for `async with` and `async for`."""

    def __init__(self, gateways: AsyncGateways, asked: Asked, timeout: float | None) -> None:
        super().__init__(asked)
        self._gateways, self._timeout = gateways, timeout
        self._events: AsyncGenerator[list[Delta], None] | None = None

    async def __aenter__(self) -> Self:
        await self._begin()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.cancel()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Delta:
        await self._begin()
        while not self._waiting:
            if self._ended or self._events is None:
                raise StopAsyncIteration
            self._check_time()
            try:
                self._waiting.extend(await anext(self._events))
            except StopAsyncIteration:
                self._ended = True
            except ConnectionFailed as error:
                raise StreamBroken(f"the answer broke off after its beginning: {error}") from error
        return self._take()

    async def read(self) -> Generation:
        """Reads to the end; returns the whole answer."""
        async for _ in self:
            pass
        return self.generation

    async def cancel(self) -> None:
        """Ends the answer here and on the server. `generation` keeps what was read."""
        self._ended = True
        self._waiting.clear()
        if self._events is not None:
            await self._events.aclose()

    async def _begin(self) -> None:
        if self._events is None and not self._ended:
            self._attempts = self._gateways.attempts(self._timeout, repeatable=True)
            first, self._events = await self._gateways.begin(self._ask, self._attempts)
            self._waiting.extend(first)
