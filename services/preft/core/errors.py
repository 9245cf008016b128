"""Every error that a user can meet, and its form at each boundary.

PreftError
├── InvalidRequest        400  the request itself is wrong; `param` names the field
│   └── InvalidAdapter    400  an adapter that can't be served
│       └── SourceNotFound 404 there is no adapter at the named source
├── Unauthenticated       401  no API key, or an unknown one
├── NotAllowed            403  the API key doesn't allow it
│   └── TooManyBytes      403  the tenant's adapters would be larger than the API key allows
├── ModelNotFound         404  no base model or adapter of that name
├── AdapterExists         409  the name is taken by another adapter
├── QueueFull             429  try again after `retry_after` seconds
├── RateLimited           429  a limit of the API key; try again after `retry_after` seconds, if there is any use
├── DeadlineExceeded      504  the request's own time limit passed
├── Unavailable           503  no worker can take the request now
│   ├── ShuttingDown      503  the server stops; try again after `retry_after` seconds
│   ├── WorkerLost        503  a worker died or became unreachable during the request
│   ├── WorkerFull        503  a worker's adapter slots are taken by other routers' requests
│   └── AdapterUnavailable 503 an added adapter's content can't be read now
├── TransferFailed        502  the KV cache didn't arrive, or not as it was sent
├── EngineFailed          500  the engine gave up on the request
│   └── NumbersNotFinite  500  the request's own numbers overflowed
└── ConfigError           -    settings or set-up are wrong (start-up only)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from preft.core.limits import Standing


class PreftError(Exception):
    """Root of all errors raised on purpose. `str(error)` is one sentence for the user.

    The sentence may quote names in files. It escapes what can't be printed in them: control characters end or hide a
    line of a log, and no reply and no log can hold lone surrogates.
    """

    def __str__(self) -> str:
        text = super().__str__()
        return text if text.isprintable() else "".join(map(_shown, text))


class InvalidRequest(PreftError):
    """The request can't be served as written. `param` names the wrong field, if any."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class InvalidAdapter(InvalidRequest):
    """The adapter is broken or doesn't fit the served model."""


class SourceNotFound(InvalidAdapter):
    """There is no adapter at the named source."""


class Unauthenticated(PreftError):
    """The request has no API key, or one that this server doesn't know."""


class NotAllowed(PreftError):
    """The API key doesn't allow this."""


class TooManyBytes(NotAllowed):
    """The adapters of the key's tenant would be larger than the key allows."""


class ModelNotFound(PreftError):
    """Neither the base model nor an adapter has this name."""


class AdapterExists(PreftError):
    """The name is taken by an adapter with another content digest."""


class QueueFull(PreftError):
    """The bounded queue is full. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimited(PreftError):
    """A limit of the API key is reached.

    `kind` is OpenAI's error type: "requests" or "tokens". `retry_after` is in seconds; None: no wait helps. `standing`
    is what the limits leave.
    """

    def __init__(
        self, message: str, kind: str = "requests", retry_after: float | None = None, standing: Standing | None = None
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.retry_after = retry_after
        self.standing = standing


class DeadlineExceeded(PreftError):
    """The request's deadline passed before it was finished."""


class Unavailable(PreftError):
    """No worker can take the request at present."""


class ShuttingDown(Unavailable):
    """The server stops: it refuses new requests and ends late ones. `retry_after` is in seconds."""

    def __init__(self, message: str, retry_after: float = 5.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WorkerLost(Unavailable):
    """A worker died or became unreachable while it held the request."""


class WorkerFull(Unavailable):
    """All adapter slots of the worker are taken: the router places the request again. Clients never see this error."""


class AdapterUnavailable(Unavailable):
    """An added adapter's content can't be read any more. The caller did nothing wrong."""


class TransferFailed(PreftError):
    """The KV cache didn't reach the decode worker intact: unknown, stale, expired or corrupted handle."""


class EngineFailed(PreftError):
    """The engine ended the request with an error."""


class NumbersNotFinite(EngineFailed):
    """NaN or infinity in the request's KV cache or logits: every worker would compute the same."""


class ConfigError(PreftError):
    """A setting is unknown, malformed or contradicts another. Names the key."""


@dataclass(frozen=True, slots=True)
class ErrorMapping:
    """The public form of one error class: HTTP status, OpenAI error type and code, gRPC status code name."""

    status: int
    type: str
    code: str
    grpc: str


def _shown(character: str) -> str:
    return character if character.isprintable() else ascii(character)[1:-1]


MESSAGE_CHARS = 1000
UNEXPECTED = "The server met an unexpected error."  # the text of an error that was not raised on purpose is not shown


def retry_seconds(error: BaseException) -> int | None:
    """Whole seconds after which another attempt makes sense; None if the error doesn't say."""
    if isinstance(error, QueueFull | ShuttingDown | RateLimited) and error.retry_after is not None:
        return max(1, math.ceil(error.retry_after))
    return None


def short(text: str) -> str:
    """Shortens a message for the caller: a message can quote the request, and a request can be large."""
    return text if len(text) <= MESSAGE_CHARS else f"{text[:MESSAGE_CHARS]}..."


# Looked up along the MRO: a subclass without an entry reports as its parent.
ERROR_MAP: dict[type[PreftError], ErrorMapping] = {
    SourceNotFound: ErrorMapping(404, "invalid_request_error", "adapter_source_not_found", "NOT_FOUND"),
    InvalidAdapter: ErrorMapping(400, "invalid_request_error", "invalid_adapter", "INVALID_ARGUMENT"),
    InvalidRequest: ErrorMapping(400, "invalid_request_error", "invalid_request", "INVALID_ARGUMENT"),
    Unauthenticated: ErrorMapping(401, "invalid_request_error", "invalid_api_key", "UNAUTHENTICATED"),
    TooManyBytes: ErrorMapping(403, "invalid_request_error", "too_many_adapter_bytes", "RESOURCE_EXHAUSTED"),
    NotAllowed: ErrorMapping(403, "invalid_request_error", "insufficient_permissions", "PERMISSION_DENIED"),
    ModelNotFound: ErrorMapping(404, "invalid_request_error", "model_not_found", "NOT_FOUND"),
    AdapterExists: ErrorMapping(409, "invalid_request_error", "adapter_exists", "ALREADY_EXISTS"),
    QueueFull: ErrorMapping(429, "rate_limit_error", "queue_full", "RESOURCE_EXHAUSTED"),
    RateLimited: ErrorMapping(429, "requests", "rate_limit_exceeded", "RESOURCE_EXHAUSTED"),
    DeadlineExceeded: ErrorMapping(504, "timeout_error", "deadline_exceeded", "DEADLINE_EXCEEDED"),
    ShuttingDown: ErrorMapping(503, "service_unavailable_error", "shutting_down", "UNAVAILABLE"),
    WorkerLost: ErrorMapping(503, "service_unavailable_error", "worker_lost", "UNAVAILABLE"),
    WorkerFull: ErrorMapping(503, "service_unavailable_error", "worker_full", "UNAVAILABLE"),
    AdapterUnavailable: ErrorMapping(503, "service_unavailable_error", "adapter_unavailable", "UNAVAILABLE"),
    Unavailable: ErrorMapping(503, "service_unavailable_error", "unavailable", "UNAVAILABLE"),
    TransferFailed: ErrorMapping(502, "server_error", "kv_transfer_failed", "DATA_LOSS"),
    NumbersNotFinite: ErrorMapping(500, "server_error", "numbers_not_finite", "INTERNAL"),
    EngineFailed: ErrorMapping(500, "server_error", "engine_failed", "INTERNAL"),
    PreftError: ErrorMapping(500, "server_error", "internal_error", "INTERNAL"),
}


def mapping_of(error: PreftError) -> ErrorMapping:
    """The public form of `error`, inherited from the nearest mapped ancestor."""
    for cls in type(error).__mro__:
        if cls in ERROR_MAP:
            return ERROR_MAP[cls]
    return ERROR_MAP[PreftError]
