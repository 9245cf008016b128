"""Every error that the client raises on purpose, whatever the transport.

PreftError
├── InvalidRequest          400  the request itself is wrong; `param` names the field
│   └── InvalidAdapter      400  an adapter that can't be served
│       └── SourceNotFound  404  there is no adapter at the named source
├── Unauthenticated         401  no API key, or an unknown one
├── NotAllowed              403  the API key doesn't allow it
│   └── TooManyBytes        403  the tenant's adapters would be larger than the API key allows
├── ModelNotFound           404  no base model or adapter of that name
├── AdapterExists           409  the name is taken by another adapter
├── QueueFull               429  try again after `retry_after` seconds
├── RateLimited             429  a limit of the API key; try again after `retry_after` seconds, unless it is None
├── DeadlineExceeded        504  the call's time limit passed, here or on the server
├── Unavailable             503  no worker can take the request now
│   ├── ShuttingDown        503  the server stops
│   ├── WorkerLost          503  a worker died or became unreachable during the request
│   └── AdapterUnavailable  503  an added adapter's content can't be read now
├── TransferFailed          502  the KV cache didn't arrive, or not as it was sent
├── EngineFailed            500  the engine gave up on the request
│   └── NumbersNotFinite    500  the request's own numbers overflowed
├── ServerError             500  the server met an error without a class here
├── ConnectionFailed         -   no gateway answers, or the connection broke before the first token
│   └── StreamBroken         -   the connection broke after the first token: a repetition would be another answer
├── BadReply                 -   the answer isn't what a PreFT server sends, or doesn't fit the wanted form
├── NotSupported             -   this transport or this server doesn't have the call
└── ConfigError              -   the client's own settings are wrong
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, ClassVar


class PreftError(Exception):
    """Root of all errors. `str(error)` is one sentence.

    `code` is the server's, `status` HTTP's (None over gRPC, and for errors that the server didn't send), `param` the
    wrong field, and `retry_after` the seconds after which another attempt makes sense, if the server says so.
    """

    default_code: ClassVar[str] = ""

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.code = code or self.default_code
        self.status = status
        self.param = param
        self.retry_after = retry_after


class InvalidRequest(PreftError):
    """The request can't be served as written."""

    default_code = "invalid_request"


class InvalidAdapter(InvalidRequest):
    """The adapter is broken or doesn't fit the served model."""

    default_code = "invalid_adapter"


class SourceNotFound(InvalidAdapter):
    """There is no adapter at the named source."""

    default_code = "adapter_source_not_found"


class Unauthenticated(PreftError):
    """The request has no API key, or one that the server doesn't know."""

    default_code = "invalid_api_key"


class NotAllowed(PreftError):
    """The API key doesn't allow this."""

    default_code = "insufficient_permissions"


class TooManyBytes(NotAllowed):
    """The adapters of the key's tenant would be larger than the key allows."""

    default_code = "too_many_adapter_bytes"


class ModelNotFound(PreftError):
    """Neither the base model nor an adapter has this name."""

    default_code = "model_not_found"


class AdapterExists(PreftError):
    """The name is taken by an adapter with other content."""

    default_code = "adapter_exists"


class QueueFull(PreftError):
    """The server's queue is full."""

    default_code = "queue_full"


class RateLimited(PreftError):
    """A limit of the API key is reached. `retry_after` None: no wait helps."""

    default_code = "rate_limit_exceeded"


class DeadlineExceeded(PreftError):
    """The call's time limit passed before its end."""

    default_code = "deadline_exceeded"


class Unavailable(PreftError):
    """No worker can take the request at present."""

    default_code = "unavailable"


class ShuttingDown(Unavailable):
    """The server stops."""

    default_code = "shutting_down"


class WorkerLost(Unavailable):
    """A worker died or became unreachable while it held the request."""

    default_code = "worker_lost"


class AdapterUnavailable(Unavailable):
    """An added adapter's content can't be read any more."""

    default_code = "adapter_unavailable"


class TransferFailed(PreftError):
    """The KV cache didn't reach the decode worker intact."""

    default_code = "kv_transfer_failed"


class EngineFailed(PreftError):
    """The engine ended the request with an error."""

    default_code = "engine_failed"


class NumbersNotFinite(EngineFailed):
    """NaN or infinity in the request's own computation."""

    default_code = "numbers_not_finite"


class ServerError(PreftError):
    """The server met an error that has no class of its own."""

    default_code = "internal_error"


class ConnectionFailed(PreftError):
    """No answer. `sent` is False if the gateway can't have got the request."""

    default_code = "connection_failed"

    def __init__(self, message: str, *, sent: bool = True) -> None:
        super().__init__(message)
        self.sent = sent


class StreamBroken(ConnectionFailed):
    """The connection broke after the first token. Nothing was repeated: that would have made another answer."""

    default_code = "stream_broken"


class BadReply(PreftError):
    """The answer isn't what a PreFT server sends, or the model's output doesn't fit the wanted form."""

    default_code = "bad_reply"


class NotSupported(PreftError):
    """This transport, or this server, doesn't have the call."""

    default_code = "not_supported"


class ConfigError(PreftError):
    """An address, a key, a certificate or a time limit of the client is wrong."""

    default_code = "config_error"


def _below(cls: type[PreftError]) -> list[type[PreftError]]:
    return [cls, *(found for below in cls.__subclasses__() for found in _below(below))]


OF_THE_CLIENT = (ConnectionFailed, BadReply, NotSupported, ConfigError)
BY_CODE = {
    cls.default_code: cls for cls in _below(PreftError) if cls is not PreftError and not issubclass(cls, OF_THE_CLIENT)
}
"""The errors that a server sends, by their code."""

_BY_STATUS: dict[int, type[PreftError]] = {
    401: Unauthenticated,
    403: NotAllowed,
    404: NotSupported,  # a path that the server doesn't have: every other 404 has a code
    405: NotSupported,
    429: QueueFull,
    502: Unavailable,  # a proxy's
    503: Unavailable,
    504: DeadlineExceeded,
}


def error_from_http(status: int, headers: Mapping[str, str], body: bytes, url: str) -> PreftError:
    """The error in a whole answer. An answer without OpenAI's error body is judged by its status."""
    try:
        told = json.loads(body)["error"]
        message = str(told["message"])
    except (ValueError, KeyError, TypeError):
        told, message = {}, f"the server at {url} answered with HTTP status {status}"
    return _made(told, message, status, _seconds(headers.get("retry-after")))


def error_from_event(told: Mapping[str, Any]) -> PreftError:
    """The error that ends an event stream."""
    return _made(told, str(told.get("message", "the server ended the stream with an error")), None, None)


def error_from_rpc(status: str, details: str, trailing: Mapping[str, Any], url: str) -> PreftError:
    """The error that ends a gRPC call. A `status` (its name) without the server's own code is gRPC's or a proxy's."""
    code, param = trailing.get("preft-code"), trailing.get("preft-param")
    retry_after = _seconds(trailing.get("retry-after"))
    if code:
        return _made({"code": code, "param": param}, details, None, retry_after)
    message = f"the call to {url} ended with {status}: {details}"
    match status:
        case "UNAVAILABLE" | "CANCELLED":
            return ConnectionFailed(message, sent=not details.startswith("failed to connect"))
        case "DEADLINE_EXCEEDED":
            return DeadlineExceeded(f"{url} gave no whole answer in time")
        case "UNIMPLEMENTED":
            return NotSupported(message)
        case "UNAUTHENTICATED":
            return Unauthenticated(message)
        case "PERMISSION_DENIED":
            return NotAllowed(message)
        case "INVALID_ARGUMENT" | "OUT_OF_RANGE" | "RESOURCE_EXHAUSTED":  # the last: a message above gRPC's limit
            return InvalidRequest(message)
    return ServerError(message)


def _made(told: Mapping[str, Any], message: str, status: int | None, retry_after: float | None) -> PreftError:
    code, param = told.get("code"), told.get("param")
    cls = BY_CODE.get(str(code))
    if cls is None:
        refused = status is not None and 400 <= status < 500
        cls = _BY_STATUS.get(status or 0, InvalidRequest if refused else ServerError)
    return cls(
        message,
        code=str(code) if code else None,
        status=status,
        param=str(param) if param else None,
        retry_after=retry_after,
    )


def _seconds(text: object) -> float | None:
    try:
        seconds = float(str(text))
    except ValueError:  # absent, or a date
        return None
    return seconds if 0 <= seconds < 86_400 else None
