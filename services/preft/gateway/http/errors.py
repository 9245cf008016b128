"""The one place that turns exceptions into OpenAI's error body.

{"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from preft.core.errors import (
    UNEXPECTED,
    InvalidRequest,
    PreftError,
    RateLimited,
    Unauthenticated,
    mapping_of,
    retry_seconds,
    short,
)
from preft.core.limits import rate_headers
from preft.gateway.http.methods import methods_at, options_response

CLIENT_GONE = 499  # for the metrics alone: the client can't read it any more


def error_body(error: BaseException) -> dict[str, Any]:
    """The body for any error. The text of unexpected errors isn't shown."""
    if not isinstance(error, PreftError):
        return _body(UNEXPECTED, "server_error", None, "internal_error")
    mapping = mapping_of(error)
    param = error.param if isinstance(error, InvalidRequest) else None
    kind = error.kind if isinstance(error, RateLimited) else mapping.type
    return _body(str(error), kind, param and short(param), mapping.code)


def error_response(error: BaseException) -> JSONResponse:
    """The whole response: status, body, and Retry-After if a second try can succeed."""
    status = mapping_of(error).status if isinstance(error, PreftError) else 500
    headers = {}
    if (seconds := retry_seconds(error)) is not None:
        headers["retry-after"] = str(seconds)
    if isinstance(error, RateLimited):
        headers |= dict(rate_headers(error.standing) if error.standing is not None else ())
        if seconds is None:
            headers["x-should-retry"] = "false"  # OpenAI's clients would try again
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_body(error), status, headers)


async def answer_error(_: Request, error: Exception) -> Response:
    """The response for any error, in the form of an exception handler."""
    return error_response(error)


def plain_error(status: int, message: str, code: str) -> JSONResponse:
    """The response for requests that are refused outside the routes."""
    return JSONResponse(_body(message, _kind(status), None, code), status)


def error_code(status: HTTPStatus) -> str:
    """The status in words, as the code of errors without a code of their own."""
    return status.phrase.lower().replace(" ", "_")


def install_error_handlers(app: FastAPI) -> None:
    """Gives every error of `app`, FastAPI's 404 and 405 included, OpenAI's error body."""

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        status = HTTPStatus(error.status_code)
        headers = dict(error.headers or {})
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            methods = methods_at(request.app.routes, request.scope)
            if request.method == "OPTIONS":
                return options_response(methods)
            headers["Allow"] = ", ".join(methods)
        message = str(error.detail)
        if message == status.phrase:
            message = f"{request.method} {request.url.path}: {status.phrase}."
        body = _body(message, _kind(status), None, error_code(status))
        return JSONResponse(body, status, headers)

    async def invalid(_: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        return error_response(InvalidRequest(first["msg"], ".".join(map(str, first["loc"][1:])) or None))

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(PreftError, answer_error)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, answer_error)


def _kind(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


def _body(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    return {"error": {"message": short(message), "type": kind, "param": param, "code": code}}
