"""Sends RpcCalls with grpcio, sync and async: one gateway each. Maps gRPC's errors, once.

Every method of the server is called as one that streams its reply: on the wire there is no difference.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar
from urllib.parse import urlsplit

import grpc
import grpc.aio
import grpc.experimental

from preft_client.errors import error_from_rpc
from preft_client.http_calls import decoded
from preft_client.rpc_calls import RpcCall
from preft_client.settings import TLS, Settings

Event = TypeVar("Event")

PING_SECONDS, PING_TIMEOUT_SECONDS = 30.0, 10.0
MAX_MESSAGE = 64 << 20  # bytes of a reply's message


class RpcDriver:
    """Threads may share it."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        options = [*_options(settings), (grpc.experimental.ChannelOptions.SingleThreadedUnaryStream, 1)]
        credentials, target = _credentials(url, settings.tls), urlsplit(url).netloc
        if credentials is None:
            self._channel = grpc.insecure_channel(target, options)
        else:
            self._channel = grpc.secure_channel(target, credentials, options)
        self._metadata = tuple(settings.authorization().items())

    def events(self, call: RpcCall[Event], seconds: float) -> Generator[list[Event], None, None]:
        """The events of the reply, as they arrive. Closing the generator cancels the call. Raises PreftError."""
        with _errors(self._url):
            stub = self._channel.unary_stream(call.path, response_deserializer=call.parse)
            running = stub(call.request, timeout=seconds, metadata=self._metadata)
            try:
                for message in running:
                    yield decoded(self._url, call.read, message)
            finally:
                running.cancel()

    def close(self) -> None:
        self._channel.close()


class AsyncRpcDriver:
    """Belongs to the event loop of its first call: grpc.aio ties channels to loops."""

    def __init__(self, url: str, settings: Settings) -> None:
        self._url = url
        self._credentials, self._options = _credentials(url, settings.tls), _options(settings)
        self._metadata = tuple(settings.authorization().items())
        self._opened: Any = None

    async def events(self, call: RpcCall[Event], seconds: float) -> AsyncGenerator[list[Event], None]:
        """As `RpcDriver.events`."""
        with _errors(self._url):
            stub = self._channel().unary_stream(call.path, response_deserializer=call.parse)
            running = stub(call.request, timeout=seconds, metadata=self._metadata)
            try:
                async for message in running:
                    yield decoded(self._url, call.read, message)
            finally:
                running.cancel()

    async def close(self) -> None:
        if self._opened is not None:
            await self._opened.close()

    def _channel(self) -> Any:
        if self._opened is None:
            target = urlsplit(self._url).netloc
            if self._credentials is None:
                self._opened = grpc.aio.insecure_channel(target, self._options)
            else:
                self._opened = grpc.aio.secure_channel(target, self._credentials, self._options)
        return self._opened


def _options(settings: Settings) -> list[tuple[str, int]]:
    return [
        ("grpc.keepalive_time_ms", round(PING_SECONDS * 1000)),
        ("grpc.keepalive_timeout_ms", round(PING_TIMEOUT_SECONDS * 1000)),
        ("grpc.http2.max_pings_without_data", 0),  # no limit
        ("grpc.max_receive_message_length", MAX_MESSAGE),
        ("grpc.initial_reconnect_backoff_ms", 100),
        ("grpc.min_reconnect_backoff_ms", round(settings.connect_timeout * 1000)),  # limits each try to connect
        ("grpc.max_reconnect_backoff_ms", 2000),
        ("grpc.use_local_subchannel_pool", 1),  # a closed client leaves no connection to the next one
    ]


def _credentials(url: str, tls: TLS | None) -> Any:
    if not url.startswith("grpcs://"):
        return None
    if tls is None:
        return grpc.ssl_channel_credentials()
    tls.context()  # its error says which file is wrong; gRPC's would come with the first call
    ca, cert, key = tls.content()
    return grpc.ssl_channel_credentials(ca, key, cert)


@contextmanager
def _errors(url: str) -> Iterator[None]:
    try:
        yield
    except grpc.RpcError as error:
        trailing = dict(error.trailing_metadata() or ())
        raise error_from_rpc(error.code().name, error.details() or "", trailing, url) from error
