"""The one place that turns exceptions into error replies. `error_forms` owns the JSON."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse, Response

from preft.core.errors import InvalidRequest, PreftError, RateLimited, Unauthenticated, retry_seconds, short
from preft.core.limits import rate_headers
from preft.gateway.http.error_forms import ErrorParts, error_json, error_parts
from preft.gateway.http.events import DONE, event
from preft.gateway.http.methods import methods_at, options_response

CLIENT_GONE = 499  # for the metrics alone: the client can't read it any more


def error_body(error: BaseException) -> dict[str, Any]:
    """OpenAI's body for any error."""
    return error_json(error_parts(error))


def failure_events(error: BaseException) -> str:
    """The last events of an OpenAI stream that fails, as in vLLM."""
    return event(error_body(error)) + DONE


def error_response(error: BaseException, path: str = "") -> JSONResponse:
    """The whole reply to a request for `path`: status, body, and Retry-After if a second try can succeed."""
    parts = error_parts(error)
    headers = {}
    if (seconds := retry_seconds(error)) is not None:
        headers["retry-after"] = str(seconds)
    if isinstance(error, RateLimited):
        headers |= dict(rate_headers(error.standing) if error.standing is not None else ())
        if seconds is None:
            headers["x-should-retry"] = "false"  # OpenAI's clients would try again
    if isinstance(error, Unauthenticated):
        headers["www-authenticate"] = "Bearer"
    return JSONResponse(error_json(parts, path), parts.status, headers)


async def answer_error(request: Request, error: Exception) -> Response:
    """The response for any error, in the form of an exception handler."""
    return error_response(error, request.url.path)


def plain_error(status: int, message: str, code: str, path: str = "") -> JSONResponse:
    """The response for requests that are refused outside the routes."""
    return JSONResponse(_plain(status, message, code, path), status)


def error_code(status: HTTPStatus) -> str:
    """The status in words, as the code of errors without a code of their own."""
    return status.phrase.lower().replace(" ", "_")


def install_error_handlers(app: FastAPI) -> None:
    """Gives every error of `app`, FastAPI's 404 and 405 included, the body of its API."""

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
        body = _plain(status, message, error_code(status), request.url.path)
        return JSONResponse(body, status, headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        first = error.errors()[0]
        refusal = InvalidRequest(first["msg"], ".".join(map(str, first["loc"][1:])) or None)
        return error_response(refusal, request.url.path)

    async def gone(_: Request, error: Exception) -> Response:
        return Response(status_code=CLIENT_GONE)

    app.add_exception_handler(PreftError, answer_error)
    app.add_exception_handler(HTTPException, http)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(ClientDisconnect, gone)
    app.add_exception_handler(Exception, answer_error)


def _plain(status: int, message: str, code: str, path: str) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return error_json(ErrorParts(status, short(message), kind, None, code), path)
