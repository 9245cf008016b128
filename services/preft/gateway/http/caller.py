"""Finds out who sends each HTTP request, and refuses requests without a valid API key, whatever their path.

A new route is closed until it is named here.
"""

from __future__ import annotations

from fastapi import Request
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from preft.core.errors import Unauthenticated
from preft.gateway.access.access import Access
from preft.gateway.access.caller import Caller
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.error_forms import is_anthropic
from preft.gateway.http.errors import error_response

# Probes have no keys. A browser can't send one before the page is there, and the page shows nothing of this server.
OPEN = frozenset({"/health", "/ready", "/docs", "/openapi.json"})
OPEN_FOLDER = "/docs/"
_CALLER = "preft.caller"


class RequireKey:
    """ASGI middleware: 401 without a valid key. The routes find the caller by `caller_of`."""

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app = app
        self._access = access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and not is_open(scope["path"]):
            try:
                scope[_CALLER] = self._access.caller(_shown(Headers(scope=scope), scope["path"]))
            except Unauthenticated as error:
                await error_response(error, scope["path"])(scope, receive, send)
                return
        await self._app(scope, receive, send)


def _shown(headers: Headers, path: str) -> str | None:
    """The one key that the request shows, as an `Authorization`; None for several, and for none."""
    shown = headers.getlist("authorization")
    if is_anthropic(path):
        shown += [f"Bearer {key}" for key in headers.getlist("x-api-key")]
    return shown[0] if len(shown) == 1 else None


def is_open(path: str) -> bool:
    """Whether a path needs no key."""
    return path in OPEN or path.startswith(OPEN_FOLDER)


def caller_of(request: Request, deps: GatewayDeps) -> Caller:
    """The sender of `request`."""
    if deps.access is None:
        return deps.anyone
    caller: Caller = request.scope[_CALLER]
    return caller
