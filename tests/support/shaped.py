"""What the official clients make of a reply that a `Shape` formats from given deltas: no engine, no socket."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import anthropic
import httpx2
import openai

from preft.core.request import GenerateRequest, Sampling
from preft.gateway.api_call import ApiCall
from preft.gateway.http.respond import Shape
from preft.gateway.text.choice import ChoiceDelta
from preft.gateway.text.choice import TextOptions as Options

CACHED = 2  # prompt tokens
REASONED = 4  # tokens


def call_of(call_id: str) -> ApiCall:
    """A call with a prompt of 5 tokens."""
    request = GenerateRequest(call_id, (5, 6, 7, 8, 9), Sampling(max_tokens=50, temperature=0.5))
    return ApiCall(call_id, "ann", (request,), 1, Options())


def streamed(shape: Shape, deltas: Sequence[ChoiceDelta]) -> str:
    """The whole event stream."""
    return shape.start(CACHED) + "".join(map(shape.chunk, deltas)) + shape.end(CACHED, REASONED)


def whole(shape: Shape, deltas: Sequence[ChoiceDelta]) -> dict[str, Any]:
    for delta in deltas:
        shape.add(delta)
    return dict(json.loads(shape.reply(CACHED, REASONED)))


def data_of(stream: str) -> list[dict[str, Any]]:
    """The events of a stream. Each has its type as its name."""
    events = []
    for block in stream.removesuffix("\n\n").split("\n\n"):
        name, data = block.split("\n")
        events.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {events[-1]['type']}"
    return events


def _transport(stream: str, body: dict[str, Any]) -> httpx2.MockTransport:
    def answer(request: httpx2.Request) -> httpx2.Response:
        if json.loads(request.content).get("stream"):
            return httpx2.Response(200, text=stream, headers={"content-type": "text/event-stream"})
        return httpx2.Response(200, json=body)

    return httpx2.MockTransport(answer)


def openai_client(stream: str = "", body: dict[str, Any] | None = None) -> openai.OpenAI:
    """A client whose server answers with `stream`, or with `body`."""
    http = httpx2.Client(transport=_transport(stream, body or {}))
    return openai.OpenAI(base_url="http://test/v1", api_key="none", max_retries=0, http_client=http)


def anthropic_client(stream: str = "", body: dict[str, Any] | None = None) -> anthropic.Anthropic:
    http = httpx2.Client(transport=_transport(stream, body or {}))
    return anthropic.Anthropic(base_url="http://test", api_key="none", max_retries=0, http_client=http)
