"""From JSON to checked bodies: parameter names and values. An InvalidRequest names the first wrong parameter."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any, TypeVar

import jiter
from fastapi import Request
from pydantic import BaseModel, ValidationError

from preft.core.errors import InvalidRequest
from preft.gateway.content import read_json_bytes
from preft.gateway.parameters import known_parameters
from preft.gateway.schemas import GenerationBody

INLINE_BYTES = 256 << 10  # a few milliseconds; a thread parses larger bodies

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], limit: int) -> Body:
    """Raises InvalidRequest for a bad body, HTTPException 415 and 413 as `read_json_bytes` does."""
    data = await read_json_bytes(request, limit)
    if len(data) <= INLINE_BYTES:
        return _parse(kind, data)
    return await asyncio.to_thread(_parse, kind, data)


def _parse(kind: type[Body], data: bytes) -> Body:
    return parse_body(kind, parse_json(data))


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
    if issubclass(kind, GenerationBody):
        given = known_parameters(given, kind.model_fields)
    try:
        return kind.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise _first_problem(error) from None


def parse_query(kind: type[Body], request: Request) -> Body:
    """The checked query string. Raises InvalidRequest that names an unknown, malformed or repeated parameter."""
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in given:
            raise InvalidRequest(f"{name} is given more than once.", name)
        given[name] = value
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        raise _first_problem(error) from None


def _first_problem(error: ValidationError) -> InvalidRequest:
    first = error.errors(include_url=False)[0]
    param = ""
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
