"""The client for asyncio."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar

from pydantic import BaseModel

from preft_client.adapters import POLL_SECONDS, WAIT_SECONDS, AsyncAdapters
from preft_client.errors import ConnectionFailed
from preft_client.forms import form_of, read_form
from preft_client.parameters import Message, Parameters, Prompt, asked_chat, asked_prompt
from preft_client.results import Generation, Parsed, Worker
from preft_client.running import AsyncGateways
from preft_client.settings import TLS, Settings
from preft_client.streams import AsyncStream

if TYPE_CHECKING:
    from typing_extensions import Self, Unpack

Form = TypeVar("Form", bound=BaseModel)


class AsyncClient:
    """As Client, with `await`, `async with` and `async for`. It belongs to the event loop that uses it first."""

    def __init__(
        self,
        url: str | Sequence[str] | None = None,
        *,
        api_key: str | None = None,
        timeout: float = 600.0,
        connect_timeout: float = 10.0,
        retries: int = 2,
        tls: TLS | None = None,
    ) -> None:
        self._gateways = AsyncGateways(Settings.of(url, api_key, timeout, connect_timeout, retries, tls))
        self.adapters = AsyncAdapters(self._gateways)

    async def generate(
        self, prompt: Prompt, *, model: str, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> Generation:
        """As `Client.generate`."""
        async with self.stream(prompt, model=model, timeout=timeout, **parameters) as stream:
            return await stream.read()

    def stream(
        self, prompt: Prompt, *, model: str, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> AsyncStream:
        """As `Client.stream`."""
        return AsyncStream(self._gateways, asked_prompt(model, prompt, parameters), timeout)

    async def chat(
        self, messages: Sequence[Message], *, model: str, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> Generation:
        """As `Client.chat`."""
        async with self.stream_chat(messages, model=model, timeout=timeout, **parameters) as stream:
            return await stream.read()

    def stream_chat(
        self, messages: Sequence[Message], *, model: str, timeout: float | None = None, **parameters: Unpack[Parameters]
    ) -> AsyncStream:
        """As `Client.stream_chat`."""
        return AsyncStream(self._gateways, asked_chat(model, messages, parameters), timeout)

    async def parse(
        self,
        messages: Sequence[Message],
        form: type[Form],
        *,
        model: str,
        timeout: float | None = None,
        **parameters: Unpack[Parameters],
    ) -> Parsed[Form]:
        """As `Client.parse`."""
        parameters["response_format"] = form_of(form)
        return read_form(form, await self.chat(messages, model=model, timeout=timeout, **parameters))

    async def workers(self, *, timeout: float | None = None) -> tuple[Worker, ...]:
        """As `Client.workers`."""
        return await self._gateways.result(lambda wire: wire.workers(), timeout)

    async def ready(self, *, timeout: float | None = None) -> bool:
        """As `Client.ready`."""
        return await self._gateways.result(lambda wire: wire.ready(), timeout)

    async def wait_ready(self, *, timeout: float = WAIT_SECONDS) -> None:
        """As `Client.wait_ready`."""
        attempts = self._gateways.attempts(timeout, repeatable=True)
        while True:
            left = attempts.seconds_left()
            try:
                if await self.ready(timeout=left):
                    return
            except ConnectionFailed:
                if attempts.deadline - time.monotonic() < POLL_SECONDS:
                    raise
            await asyncio.sleep(POLL_SECONDS)

    async def close(self) -> None:
        """Closes the connections. Running streams end."""
        await self._gateways.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
