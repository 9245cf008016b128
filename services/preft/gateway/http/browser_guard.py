"""Protects the server from web pages of other sites: checks the headers Host and Origin, and answers CORS.

A page can send requests to every server that its browser reaches, the browser's own machine included. The browser
writes the page's origin into Origin. A page whose host name resolves to this server (DNS rebinding) shows this name in
Host.
"""

from __future__ import annotations

from collections.abc import Iterable

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from preft.core.web import AllowedHosts, read_origin, same_origin
from preft.gateway.http.errors import plain_error

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
METHODS = "GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
EXPOSED_HEADERS = ", ".join(
    (
        "x-request-id, retry-after",
        *(f"x-ratelimit-{what}-{kind}" for what in ("limit", "remaining", "reset") for kind in ("requests", "tokens")),
    )
)
PREFLIGHT_SECONDS = 600


class BrowserGuard:
    """ASGI middleware: 400 for other hosts, 403 for pages of other origins, CORS headers for allowed origins."""

    def __init__(self, app: ASGIApp, *, hosts: Iterable[str], origins: Iterable[str]) -> None:
        """`hosts` as for AllowedHosts; `origins` are allowed in addition to the server's own, `*` allows all."""
        self._app = app
        self._hosts = AllowedHosts(hosts)
        self._origins = {read_origin(origin) for origin in origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        hosts, origins = headers.getlist("host"), headers.getlist("origin")
        if not self._may_have(hosts, scope["http_version"]):
            message = (
                f"Host {_shown(hosts)} is not a name of this server. The setting allowed_hosts takes further names."
            )
            await plain_error(400, message, "host_not_allowed", scope["path"])(scope, receive, send)
        elif not origins:
            if scope["method"] not in SAFE_METHODS and headers.get("sec-fetch-site") in ("cross-site", "same-site"):
                await _refused("unknown", scope["path"])(scope, receive, send)
            else:
                await self._app(scope, receive, send)
        elif len(origins) == 1 and hosts and same_origin(origins[0].lower(), hosts[0]):
            await self._app(scope, receive, send)
        elif len(origins) != 1 or not self._is_allowed(origins[0]):
            await _refused(_shown(origins), scope["path"])(scope, receive, send)
        elif scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await _preflight(origins[0], headers)(scope, receive, send)
        else:
            await self._app(scope, receive, _readable_by(origins[0], send))

    def _may_have(self, hosts: list[str], http_version: str) -> bool:
        """Whether Host is allowed. Only HTTP/1.0 requests may omit it: browsers don't speak HTTP/1.0."""
        return hosts[0] in self._hosts if len(hosts) == 1 else not hosts and http_version == "1.0"

    def _is_allowed(self, origin: str) -> bool:
        try:
            return "*" in self._origins or read_origin(origin) in self._origins
        except ValueError:
            return False


def _shown(values: list[str]) -> str:
    return repr(", ".join(values)[:100])


def _refused(origin: str, path: str) -> Response:
    message = (
        f"Pages of origin {origin} may not use this server. The setting allowed_origins takes the origins that may."
    )
    return plain_error(403, message, "origin_not_allowed", path)


def _preflight(origin: str, headers: Headers) -> Response:
    answer = {
        "access-control-allow-origin": origin,
        "access-control-allow-methods": METHODS,
        "access-control-max-age": str(PREFLIGHT_SECONDS),
        "vary": "Origin, Access-Control-Request-Headers",
    }
    if wanted := headers.get("access-control-request-headers"):
        answer["access-control-allow-headers"] = wanted
    if headers.get("access-control-request-private-network") == "true":
        answer["access-control-allow-private-network"] = "true"
    return Response(status_code=204, headers=answer)


def _readable_by(origin: str, send: Send) -> Send:
    async def readable(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(raw=list(message.get("headers", ())))
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = EXPOSED_HEADERS
            headers.add_vary_header("Origin")
            message = {**message, "headers": headers.raw}
        await send(message)

    return readable
