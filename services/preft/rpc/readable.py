"""Answers calls whose message can't be read with INVALID_ARGUMENT.

gRPC's own answer is UNKNOWN with the text of a Python error, and a traceback in the log for each call.
"""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import DecodeError

from preft.core.errors import InvalidRequest
from preft.rpc.status import abort, errors_reported

_MAKE = {  # by whether requests and replies are streams
    (False, False): grpc.unary_unary_rpc_method_handler,
    (False, True): grpc.unary_stream_rpc_method_handler,
    (True, False): grpc.stream_unary_rpc_method_handler,
    (True, True): grpc.stream_stream_rpc_method_handler,
}


class ReadableMessages(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Passes on what can be read. A handler of a stream gets InvalidRequest in the place of the unreadable message."""

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        handler = await continuation(handler_call_details)
        if handler is None or handler.request_deserializer is None:
            return handler
        run = handler.unary_unary or handler.unary_stream or handler.stream_unary or handler.stream_stream
        return _MAKE[handler.request_streaming, handler.response_streaming](
            _reading_stream(run) if handler.request_streaming else _reading_one(run),
            request_deserializer=_reader(handler.request_deserializer),
            response_serializer=handler.response_serializer,
        )


class _Unreadable:
    pass


_UNREADABLE = _Unreadable()


def _reader(deserialize: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read(content: bytes) -> Any:
        try:
            return deserialize(content)
        except DecodeError:
            return _UNREADABLE

    return read


def _error() -> InvalidRequest:
    return InvalidRequest("the message can't be read: it isn't of the type that this call takes")


def _reading_one(run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """A handler of the same kind as `run`: gRPC tells generators from coroutines."""
    if inspect.isasyncgenfunction(run):

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            if request is _UNREADABLE:
                await abort(context, _error())
            async with aclosing(run(request, context)) as replies:
                async for reply in replies:
                    yield reply

        return generate

    async def answer(request: Any, context: Any) -> Any:
        if request is _UNREADABLE:
            await abort(context, _error())
        return await run(request, context)

    return answer


def _reading_stream(run: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    if inspect.isasyncgenfunction(run):

        async def generate(requests: AsyncIterator[Any], context: Any) -> AsyncIterator[Any]:
            async with errors_reported(context), aclosing(run(_readable(requests), context)) as replies:
                async for reply in replies:
                    yield reply

        return generate

    async def answer(requests: AsyncIterator[Any], context: Any) -> Any:
        async with errors_reported(context):
            return await run(_readable(requests), context)

    return answer


async def _readable(requests: AsyncIterator[Any]) -> AsyncIterator[Any]:
    async for request in requests:
        if request is _UNREADABLE:
            raise _error()
        yield request
