"""From an HTTP request to its checked body or query string. `bodies` owns the checks, and `content` the bytes."""

from __future__ import annotations

import asyncio
import math
import time
from typing import TypeVar

from fastapi import Request
from pydantic import BaseModel

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.parse import INLINE_BYTES, checked, parse_body, parse_json
from preft.gateway.http.content import read_json_bytes

TIMEOUT = "preft-timeout"  # a header

Body = TypeVar("Body", bound=BaseModel)


async def read_body(request: Request, kind: type[Body], limit: int) -> Body:
    """Raises InvalidRequest for a bad body, HTTPException 415 and 413 as `read_json_bytes` does."""
    data = await read_json_bytes(request, limit)
    if len(data) <= INLINE_BYTES:
        return _parse(kind, data)
    return await asyncio.to_thread(_parse, kind, data)


def _parse(kind: type[Body], data: bytes) -> Body:
    return parse_body(kind, parse_json(data))


def parse_query(kind: type[Body], request: Request) -> Body:
    """The checked query string. Raises InvalidRequest that names an unknown, malformed or repeated parameter."""
    given: dict[str, str] = {}
    for name, value in request.query_params.multi_items():
        if name in given:
            raise InvalidRequest(f"{name} is given more than once.", name)
        given[name] = value
    return checked(kind, given)


def read_deadline(request: Request) -> float | None:
    """The time by which the caller wants the whole answer, in `time.time()` seconds. Raises InvalidRequest."""
    text = request.headers.get(TIMEOUT)
    if text is None:
        return None
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise InvalidRequest(f"The header {TIMEOUT} must be a positive number of seconds.", TIMEOUT)
    return time.time() + seconds
