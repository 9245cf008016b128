"""Server-sent events: the head of their response, their JSON, one event, and the sending of events."""

from __future__ import annotations

import json
from collections.abc import Mapping
from json import JSONEncoder
from typing import Any

from starlette.types import Send

dumps = JSONEncoder(separators=(",", ":"), allow_nan=False).encode
DONE = "data: [DONE]\n\n"
FAILURE = "preft.failure"
"""The key of an ASGI scope. A list there holds the function that writes the last events of the open stream if it must
end with an error."""
_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
)


def event(data: Mapping[str, Any]) -> str:
    return f"data: {json.dumps(data)}\n\n"


async def start_events(send: Send, *more_headers: tuple[bytes, bytes]) -> None:
    """Sends status and headers of an event stream."""
    await send({"type": "http.response.start", "status": 200, "headers": [*_HEADERS, *more_headers]})


async def send_events(send: Send, events: str, *, last: bool = False) -> None:
    """Sends `events`; `last` ends the response."""
    await send({"type": "http.response.body", "body": events.encode(), "more_body": not last})
