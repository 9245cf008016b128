"""Sends HttpCalls with httpx, sync and async: one gateway each. Maps httpx's errors, once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Generator, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import httpx

from preft_client.errors import ConnectionFailed, DeadlineExceeded, NotSupported, error_from_http
from preft_client.http_calls import HttpCall, decoded
from preft_client.settings import Settings

Event = TypeVar("Event")

TIMEOUT_HEADER = "preft-timeout"  # tells the server by when the caller wants the whole answer
_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=100, keepalive_expiry=30.0)


class HttpDriver:
    """Threads may share it."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._connect_timeout = settings.connect_timeout
        self._client = httpx.Client(**_options(url, settings))

    def events(self, call: HttpCall[Event], seconds: float) -> Generator[list[Event], None, None]:
        """The events of the answer, as they arrive. Closing the generator cancels the call. Raises PreftError."""
        decoder = call.decoder()
        with _errors(self._url), self._client.stream(**_request(call, seconds, self._connect_timeout)) as response:
            if response.status_code not in call.good:
                raise error_from_http(response.status_code, response.headers, response.read(), self._url)
            for data in response.iter_raw():
                if found := decoded(self._url, decoder.feed, data):
                    yield found
            if found := decoded(self._url, decoder.end):
                yield found

    def close(self) -> None:
        self._client.close()


class AsyncHttpDriver:
    """Belongs to one event loop."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._connect_timeout = settings.connect_timeout
        self._client = httpx.AsyncClient(**_options(url, settings))

    async def events(self, call: HttpCall[Event], seconds: float) -> AsyncGenerator[list[Event], None]:
        """As `HttpDriver.events`."""
        decoder = call.decoder()
        request = _request(call, seconds, self._connect_timeout)
        if call.upload is not None:
            request["content"] = _in_thread(call.upload)
        with _errors(self._url):
            async with self._client.stream(**request) as response:
                if response.status_code not in call.good:
                    body = await response.aread()
                    raise error_from_http(response.status_code, response.headers, body, self._url)
                async for data in response.aiter_raw():
                    if found := decoded(self._url, decoder.feed, data):
                        yield found
                if found := decoded(self._url, decoder.end):
                    yield found

    async def close(self) -> None:
        await self._client.aclose()


def _options(url: str, settings: Settings) -> dict[str, Any]:
    headers = {"accept-encoding": "identity", **settings.authorization()}
    verify = settings.tls.context() if settings.tls is not None else True
    return {"base_url": url, "headers": headers, "limits": _LIMITS, "verify": verify}


def _request(call: HttpCall[Any], seconds: float, connect_timeout: float) -> dict[str, Any]:
    """Arguments of `stream`. httpx limits each read, not the whole answer: the server gets the whole limit."""
    return {
        "method": call.method,
        "url": call.path,
        "content": call.body if call.upload is None else call.upload,
        "headers": {**call.headers, TIMEOUT_HEADER: f"{max(seconds, 0.001):.3f}"},
        "timeout": httpx.Timeout(seconds, connect=min(seconds, connect_timeout)),
    }


@contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise ConnectionFailed(f"no server answers at {url}: {_reason(error)}", sent=False) from error
    except httpx.TimeoutException as error:
        raise DeadlineExceeded(f"{url} gave no whole answer in time") from error
    except httpx.UnsupportedProtocol as error:
        raise NotSupported(f"{url}: {error}") from error
    except httpx.TransportError as error:
        raise ConnectionFailed(f"the connection to {url} broke: {_reason(error)}") from error
    except ConnectionFailed as error:
        raise ConnectionFailed(f"{url}: {error}", sent=error.sent) from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


async def _in_thread(parts: Iterable[bytes]) -> AsyncIterator[bytes]:
    """The parts, each made in a thread: files block."""
    left = iter(parts)
    while (part := await asyncio.to_thread(next, left, None)) is not None:
        yield part
