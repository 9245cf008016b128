"""gRPC's form of every call: the message, and the way from the reply's messages to events. Does no input or output."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, Generic, TypeVar

from preft_client.errors import InvalidRequest, NotSupported
from preft_client.http_calls import http_body
from preft_client.messages import message_class
from preft_client.packing import Package, Progress
from preft_client.parameters import Asked
from preft_client.results import (
    Adapter,
    AdapterPage,
    AdapterPlace,
    Delta,
    Facts,
    FinishReason,
    TokenLogprob,
    ToolCallDelta,
    Worker,
)

Event = TypeVar("Event")

GenerateRequest, ChatRequest, GenerateReply = map(message_class, ("GenerateRequest", "ChatRequest", "GenerateReply"))
AdapterMessage, ListReply = map(message_class, ("Adapter", "ListAdaptersReply"))
_FINISH: tuple[FinishReason | None, ...] = (None, "stop", "length", "tool_calls")
_IN_SAMPLING = frozenset(message_class("Sampling").DESCRIPTOR.fields_by_name)
_OF_REQUEST = ("n", "priority", "user")
_FLOOR = -9999.0  # stands for minus infinity, as over HTTP
_DIGITS = 16  # of a digest
_SERVING = b"\x08\x01"  # grpc.health.v1.HealthCheckResponse with status SERVING


@dataclass(frozen=True, slots=True)
class RpcCall(Generic[Event]):
    """One call of `path` with the serialized `request`. `read` makes events of one of the reply's messages."""

    path: str
    request: bytes
    parse: Callable[[bytes], Any]
    read: Callable[[Any], list[Event]]


class RpcWire:
    """Makes RpcCalls. The server has no uploads and no list of workers over gRPC: those raise NotSupported."""

    def generate(self, asked: Asked, facts: Facts) -> RpcCall[Delta]:
        if asked.prompt is None:
            method, request = "Chat", ChatRequest(body=json.dumps(http_body(asked)).encode())
        else:
            method, request = "Generate", _generate_request(asked, asked.prompt)
        path = f"/preft.v1.Inference/{method}"
        return RpcCall(path, request.SerializeToString(), GenerateReply.FromString, _delta_reader(facts))

    def add(self, name: str, source: str, replace: bool) -> RpcCall[tuple[int, int | None] | Adapter]:
        """Tells no progress before the end."""
        return _adapters("Add", "AddAdapterRequest", _added, name=name, source=source, replace=replace)

    def upload(self, name: str, package: Package, replace: bool, progress: Progress | None) -> RpcCall[Adapter]:
        raise NotSupported("adapters can't be uploaded over gRPC: use the server's http:// address for that")

    def get(self, name: str) -> RpcCall[Adapter]:
        return _adapters("Get", "GetAdapterRequest", _one, name=name)

    def places(self, name: str) -> RpcCall[tuple[AdapterPlace, ...]]:
        raise NotSupported("gRPC doesn't tell where an adapter is: use the server's http:// address for that")

    def page(self, limit: int, after: str, search: str) -> RpcCall[AdapterPage]:
        asked = _made("ListAdaptersRequest", limit=limit, after=after, search=search)
        return RpcCall("/preft.v1.Adapters/List", asked, ListReply.FromString, _page)

    def pin(self, name: str, pinned: bool) -> RpcCall[Adapter]:
        return _adapters("Pin", "PinAdapterRequest", _one, name=name, pinned=pinned)

    def remove(self, name: str) -> RpcCall[Adapter]:
        return _adapters("Remove", "RemoveAdapterRequest", _one, name=name)

    def workers(self) -> RpcCall[tuple[Worker, ...]]:
        raise NotSupported("gRPC doesn't list workers: use the server's http:// address for that")

    def ready(self) -> RpcCall[bool]:
        """The health check of all services: an empty message."""
        return RpcCall("/grpc.health.v1.Health/Check", b"", bytes, lambda reply: [reply == _SERVING])


def _adapters(method: str, kind: str, read: Callable[[Any], list[Event]], **fields: Any) -> RpcCall[Event]:
    return RpcCall(f"/preft.v1.Adapters/{method}", _made(kind, **fields), AdapterMessage.FromString, read)


def _generate_request(asked: Asked, prompt: str | tuple[int, ...]) -> Any:
    request = GenerateRequest()
    _set(request, "model", asked.model)
    if isinstance(prompt, str):
        _set(request, "text", prompt, "prompt")
    else:
        _set(request.tokens, "ids", prompt, "prompt")
        request.tokens.SetInParent()
    more = dict(asked.extra)
    for name, value in asked.parameters.items():
        if name == "stop":
            _set(request, "stop", [value] if isinstance(value, str) else value)
        elif name in _OF_REQUEST:
            _set(request, name, value)
        elif name in _IN_SAMPLING:
            _set(request.sampling, name, value)
        else:
            more[name] = value
    if more:
        request.more = json.dumps(more).encode()
    return request


def _made(kind: str, **fields: Any) -> bytes:
    message = message_class(kind)()
    for name, value in fields.items():
        _set(message, name, value)
    serialized: bytes = message.SerializeToString()
    return serialized


def _set(message: Any, name: str, value: Any, param: str = "") -> None:
    """Raises InvalidRequest for a value that the field can't hold."""
    try:
        if isinstance(value, (list, tuple)):
            getattr(message, name).extend(value)
        elif hasattr(value, "items"):
            getattr(message, name).update(value)
        else:
            setattr(message, name, value)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise InvalidRequest(f"{param or name}: {error}", param=param or name) from None


def _delta_reader(facts: Facts) -> Callable[[Any], list[Delta]]:
    def read(reply: Any) -> list[Delta]:
        delta = reply.delta
        facts.prompt_tokens = reply.prompt_tokens
        facts.cached_tokens = reply.cached_tokens
        facts.adapter_digest = reply.adapter_digest[:_DIGITS]
        return [
            Delta(
                reply.text,
                tuple(delta.token_ids),
                delta.index,
                _FINISH[delta.finish_reason],
                delta.stop_token_id if delta.HasField("stop_token_id") else None,
                tuple(map(_logprob, delta.logprobs)) if delta.logprobs else (),
                reply.reasoning,
                tuple(map(_call_part, reply.tool_calls)) if reply.tool_calls else (),
            )
        ]

    return read


def _call_part(part: Any) -> ToolCallDelta:
    return ToolCallDelta(part.position, part.arguments, part.id, part.name)


def _logprob(entry: Any) -> TokenLogprob:
    """As over HTTP, the sampled token is among the most likely ones."""
    logprob = max(entry.logprob, _FLOOR)
    top = {entry.token_id: logprob}
    for one in entry.top:
        top.setdefault(one.token_id, max(one.logprob, _FLOOR))
    return TokenLogprob(entry.token_id, logprob, top)


def _one(reply: Any) -> list[Adapter]:
    own = {own.name: getattr(reply, own.name) for own in fields(Adapter)}
    return [Adapter(**{**own, "warnings": tuple(reply.warnings)})]


def _added(reply: Any) -> list[tuple[int, int | None] | Adapter]:
    return [(reply.size, reply.size), *_one(reply)]


def _page(reply: Any) -> list[AdapterPage]:
    adapters = tuple(adapter for one in reply.adapters for adapter in _one(one))
    return [AdapterPage(adapters, reply.has_more, reply.total)]
