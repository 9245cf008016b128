"""The JSON of errors in the forms of OpenAI's and Anthropic's APIs. A request's path decides on the form.

OpenAI: {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}
Anthropic: {"type": "error", "error": {"type": ..., "message": ...}}
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from preft.core.errors import UNEXPECTED, InvalidRequest, PreftError, RateLimited, mapping_of, short

ANTHROPIC = "/v1/messages"
_ANTHROPIC_TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}


@dataclass(frozen=True, slots=True)
class ErrorParts:
    """What is said of an error. `type` and `code` are OpenAI's."""

    status: int
    message: str
    type: str
    param: str | None
    code: str


def error_parts(error: BaseException) -> ErrorParts:
    """The parts of any error. The text of unexpected errors isn't shown."""
    if not isinstance(error, PreftError):
        return ErrorParts(500, UNEXPECTED, "server_error", None, "internal_error")
    mapping = mapping_of(error)
    param = error.param if isinstance(error, InvalidRequest) else None
    kind = error.kind if isinstance(error, RateLimited) else mapping.type
    return ErrorParts(mapping.status, short(str(error)), kind, param and short(param), mapping.code)


def is_anthropic(path: str) -> bool:
    """Whether the path belongs to Anthropic's API."""
    return path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")


def error_json(parts: ErrorParts, path: str = "") -> dict[str, Any]:
    """The body of an error reply to a request for `path`."""
    return anthropic_error(parts) if is_anthropic(path) else openai_error(parts)


def openai_error(parts: ErrorParts) -> dict[str, Any]:
    return {"error": {"message": parts.message, "type": parts.type, "param": parts.param, "code": parts.code}}


def anthropic_error(parts: ErrorParts) -> dict[str, Any]:
    fallback = "invalid_request_error" if parts.status < 500 else "api_error"
    return {
        "type": "error",
        "error": {"type": _ANTHROPIC_TYPES.get(parts.status, fallback), "message": parts.message},
    }
