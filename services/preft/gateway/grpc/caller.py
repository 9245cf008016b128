"""Finds out who makes each call of the public gRPC services, and refuses calls without a valid API key.

Health checks need no key: probes have none. All other methods need one, reflection included.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from preft.core.errors import Unauthenticated
from preft.gateway.access.access import Access
from preft.gateway.access.caller import Caller
from preft.gateway.deps import GatewayDeps
from preft.rpc.secret import HEALTH
from preft.rpc.status import abort

KEY = "authorization"


class RequireKey(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """UNAUTHENTICATED without a valid key. The services find the caller by `caller_of`."""

    def __init__(self, access: Access) -> None:
        self._access = access

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        if not handler_call_details.method.startswith(HEALTH):
            try:
                self._access.caller(_shown(handler_call_details.invocation_metadata))
            except Unauthenticated as error:
                return _refusal(error)
        return await continuation(handler_call_details)


def caller_of(context: Any, deps: GatewayDeps) -> Caller:
    """The sender of the call. Raises Unauthenticated."""
    return deps.anyone if deps.access is None else deps.access.caller(_shown(context.invocation_metadata()))


def _shown(metadata: Sequence[tuple[str, str | bytes]] | None) -> str | None:
    values = [value for key, value in metadata or () if key == KEY]
    return values[0] if len(values) == 1 and isinstance(values[0], str) else None


def _refusal(error: Unauthenticated) -> Any:
    async def refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
        await abort(context, error)

    return grpc.stream_stream_rpc_method_handler(refuse)  # this kind of handler ends without reading a message
