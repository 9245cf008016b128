"""From JSON to checked bodies: parameter names and values. An InvalidRequest names the first wrong parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

import jiter
from pydantic import BaseModel, ValidationError

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.parameters import known_parameters
from preft.gateway.bodies.schemas import ApiBody

INLINE_BYTES = 256 << 10  # a few milliseconds; a thread parses larger bodies

Body = TypeVar("Body", bound=BaseModel)


def parse_json(data: bytes) -> dict[str, Any]:
    """The JSON object in a request body. Raises InvalidRequest."""
    try:
        value = jiter.from_json(data, allow_inf_nan=False, catch_duplicate_keys=True)
    except ValueError as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise InvalidRequest("The request body must be a JSON object.")
    return value


def parse_body(kind: type[Body], given: Mapping[str, Any]) -> Body:
    """The checked body; null means absent. Raises InvalidRequest that names a parameter, such as `messages[0].role`."""
    if issubclass(kind, ApiBody):
        given = known_parameters(given, kind.model_fields, kind.others)
    return checked(kind, without_nulls(given))


def without_nulls(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in given.items() if value is not None}


def checked(kind: type[Body], given: Mapping[str, Any], place: str = "") -> Body:
    """The checked value, which `place` holds. Raises InvalidRequest that names the first wrong parameter."""
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise first_problem(error, place) from None


def first_problem(error: ValidationError, within: str = "") -> InvalidRequest:
    """The first wrong parameter, in words. `within` is the parameter that holds the checked value."""
    first = error.errors(include_url=False)[0]
    param = within
    for part in first["loc"]:
        param += f"[{part}]" if isinstance(part, int) else f".{part}" if param else str(part)
    match first["type"]:
        case "missing":
            message = f"Missing required parameter: {param!r}."
        case "extra_forbidden":
            message = f"Unknown parameter: {param!r}."
        case "value_error":
            message = f"{param}: {first['ctx']['error']}."
        case _:
            message = f"{param}: {first['msg']}, got {_shown(first['input'])}."
    return InvalidRequest(message, param or None)


def _shown(value: object) -> str:
    if isinstance(value, list | dict):  # the value may be as large as the body
        return "a list" if isinstance(value, list) else "an object"
    text = repr(value[:80] if isinstance(value, str) else value)
    return text if len(text) <= 80 else f"{text[:77]}..."
