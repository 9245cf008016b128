"""Methods that every path has beside its own: HEAD if it has GET, and OPTIONS. Also ignores slashes at a path's end."""

from __future__ import annotations

from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class HeadAndSlashes:
    """ASGI middleware: answers HEAD as GET without the body, and `/v1/models/` as `/v1/models`.

    An encoded slash (`%2F`) at the end stays: this slash is a part of a name.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        raw = scope.get("raw_path") or scope["path"].encode()
        slashes = len(raw) - len(raw.rstrip(b"/"))
        if slashes and len(raw) > slashes:
            scope = {**scope, "path": scope["path"][:-slashes], "raw_path": raw[:-slashes]}
        if scope["method"] == "HEAD":
            scope, send = {**scope, "method": "GET"}, _without_body(send)
        await self._app(scope, receive, send)


def _without_body(send: Send) -> Send:
    async def headers_only(message: Message) -> None:
        if message["type"] == "http.response.body":
            message = {**message, "body": b""}
        await send(message)

    return headers_only


def methods_at(routes: list[BaseRoute], scope: Scope) -> list[str]:
    """The methods of `scope`'s path, OPTIONS included; none for an unknown path."""
    methods: set[str] = set()
    for route in routes:
        if route.matches(scope)[0] is not Match.NONE:
            methods.update(getattr(route, "methods", None) or ())
    if "GET" in methods:
        methods.add("HEAD")
    return sorted(methods | {"OPTIONS"}) if methods else []


def options_response(methods: list[str]) -> Response:
    """The answer to OPTIONS for a path with `methods`."""
    return Response(status_code=204, headers={"allow": ", ".join(methods)})
