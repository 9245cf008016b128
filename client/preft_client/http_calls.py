"""HTTP's form of every call: the request, and the way from the answer's bytes to events. Does no input or output."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Generic, Protocol, TypeVar
from urllib.parse import quote, urlencode

from pydantic_core import from_json

from preft_client.errors import BadReply, ConnectionFailed, error_from_event
from preft_client.packing import Package, Progress
from preft_client.parameters import Asked
from preft_client.results import (
    Adapter,
    AdapterPage,
    AdapterPlace,
    Delta,
    Facts,
    TokenLogprob,
    ToolCallDelta,
    Worker,
)

Event = TypeVar("Event")
Result = TypeVar("Result")
_TOKEN = len("token_id:")


class Decoder(Protocol[Event]):
    """Reads one answer. Both methods raise PreftError, and KeyError, TypeError or ValueError for a malformed one."""

    def feed(self, data: bytes) -> list[Event]:
        """The events that `data` completes."""

    def end(self) -> list[Event]:
        """The events after the last byte. Raises ConnectionFailed if the answer isn't whole."""


@dataclass(frozen=True, slots=True)
class HttpCall(Generic[Event]):
    """One request. `upload` is a stream of `size` bytes; `good` are the statuses that `decoder` reads."""

    method: str
    path: str
    decoder: Callable[[], Decoder[Event]]
    body: bytes | None = None
    upload: Iterable[bytes] | None = None
    size: int = 0
    good: tuple[int, ...] = (200,)

    @property
    def headers(self) -> dict[str, str]:
        if self.upload is not None:
            return {"content-type": "application/x-tar", "content-length": str(self.size)}
        return {"content-type": "application/json"} if self.body is not None else {}


@dataclass(slots=True)
class Whole(Generic[Event]):
    """A JSON answer: one event."""

    read: Callable[[Any], Event]
    _data: bytearray = field(default_factory=bytearray)

    def feed(self, data: bytes) -> list[Event]:
        self._data += data
        return []

    def end(self) -> list[Event]:
        return [self.read(json.loads(self._data))]


@dataclass(slots=True)
class Events(Generic[Event]):
    """Server-sent events. `read` makes the client's events of one of the server's."""

    read: Callable[[Any], list[Event]]
    _rest: bytes = b""
    _done: bool = False

    def feed(self, data: bytes) -> list[Event]:
        *lines, self._rest = (self._rest + data).split(b"\n") if self._rest else data.split(b"\n")
        found: list[Event] = []
        for line in lines:
            if not line.startswith(b"data:"):  # a comment, or the empty line after an event
                continue
            if line.startswith(b"data: [DONE]"):
                self._done = True
                continue
            told = from_json(line[5:])
            if "error" in told:
                raise error_from_event(told["error"])
            found += self.read(told)
        return found

    def end(self) -> list[Event]:
        if not self._done:
            raise ConnectionFailed("the connection ended in the middle of the answer")
        return []


def decoded(url: str, read: Callable[..., Result], *given: Any) -> Result:
    """`read(*given)`. Raises BadReply for an answer that isn't as the reader expects."""
    try:
        return read(*given)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise BadReply(f"{url} didn't answer as a PreFT server does ({error!r})") from error


class HttpWire:
    """Makes HttpCalls. `RpcWire` makes the same calls for gRPC."""

    def generate(self, asked: Asked, facts: Facts) -> HttpCall[Delta]:
        body: dict[str, Any] = {
            **http_body(asked),
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if asked.prompt is None:
            path, read = "/v1/chat/completions", _chat_reader(facts)
        else:
            path, read = "/v1/completions", _completion_reader(facts)
        return HttpCall("POST", path, lambda: Events(read), json.dumps(body).encode())

    def add(self, name: str, source: str, replace: bool) -> HttpCall[tuple[int, int | None] | Adapter]:
        body = {"name": name, "source": source, "replace": replace, "stream": True}
        return HttpCall("POST", "/v1/adapters", lambda: Events(_read_add), json.dumps(body).encode())

    def upload(self, name: str, package: Package, replace: bool, progress: Progress | None) -> HttpCall[Adapter]:
        path = f"{_path(name)}?replace={'true' if replace else 'false'}"
        decoder = lambda: Whole(_adapter)  # noqa: E731
        return HttpCall("PUT", path, decoder, upload=package.parts(progress), size=package.size)

    def get(self, name: str) -> HttpCall[Adapter]:
        return HttpCall("GET", _path(name), lambda: Whole(_adapter))

    def places(self, name: str) -> HttpCall[tuple[AdapterPlace, ...]]:
        return HttpCall("GET", _path(name), lambda: Whole(_places))

    def page(self, limit: int, after: str, search: str) -> HttpCall[AdapterPage]:
        query = urlencode({"limit": limit, "after": after, "search": search})
        return HttpCall("GET", f"/v1/adapters?{query}", lambda: Whole(_page))

    def pin(self, name: str, pinned: bool) -> HttpCall[Adapter]:
        return HttpCall("PATCH", _path(name), lambda: Whole(_adapter), json.dumps({"pinned": pinned}).encode())

    def remove(self, name: str) -> HttpCall[Adapter]:
        return HttpCall("DELETE", _path(name), lambda: Whole(_adapter))

    def workers(self) -> HttpCall[tuple[Worker, ...]]:
        return HttpCall("GET", "/v1/workers", lambda: Whole(_workers))

    def ready(self) -> HttpCall[bool]:
        return HttpCall("GET", "/ready", lambda: Whole(_is_ready), good=(200, 503))


def http_body(asked: Asked) -> dict[str, Any]:
    """The request as HTTP's body has it, without what shapes only HTTP's reply."""
    body: dict[str, Any] = {"model": asked.model, **asked.parameters, **asked.extra}
    if "logit_bias" in body:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in body["logit_bias"].items()}
    if asked.prompt is not None:
        return {**body, "prompt": asked.prompt}
    if "logprobs" in body:  # in chats, a flag and a number
        body |= {"logprobs": True, "top_logprobs": body["logprobs"]}
    return {**body, "messages": asked.messages}


def _completion_reader(facts: Facts) -> Callable[[Any], list[Delta]]:
    def read(told: Any) -> list[Delta]:
        _note(told, facts)
        return [
            Delta(
                choice["text"],
                tuple(choice["token_ids"]),
                choice["index"],
                choice["finish_reason"],
                _stop_token(choice),
                _completion_logprobs(choice["logprobs"]),
            )
            for choice in told["choices"]
        ]

    return read


def _chat_reader(facts: Facts) -> Callable[[Any], list[Delta]]:
    def read(told: Any) -> list[Delta]:
        _note(told, facts)
        return [
            Delta(
                choice["delta"].get("content") or "",
                tuple(choice["token_ids"]),
                choice["index"],
                choice["finish_reason"],
                _stop_token(choice),
                _chat_logprobs(choice["logprobs"]),
                choice["delta"].get("reasoning", ""),
                tuple(map(_call_part, choice["delta"].get("tool_calls", ()))),
            )
            for choice in told["choices"]
            if "token_ids" in choice  # not the choice's opening, which has its role alone
        ]

    return read


def _call_part(told: Mapping[str, Any]) -> ToolCallDelta:
    function = told["function"]
    return ToolCallDelta(told["index"], function["arguments"], told.get("id", ""), function.get("name", ""))


def _note(told: Mapping[str, Any], facts: Facts) -> None:
    facts.adapter_digest = told["system_fingerprint"] or ""
    if usage := told.get("usage"):
        facts.prompt_tokens = usage["prompt_tokens"]
        facts.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)


def _stop_token(choice: Mapping[str, Any]) -> int | None:
    reason = choice.get("stop_reason")
    return reason if isinstance(reason, int) else None


def _completion_logprobs(told: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
    if told is None:
        return ()
    columns = zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True)
    return tuple(
        TokenLogprob(int(token[_TOKEN:]), logprob, {int(name[_TOKEN:]): value for name, value in top.items()})
        for token, logprob, top in columns
    )


def _chat_logprobs(told: Mapping[str, Any] | None) -> tuple[TokenLogprob, ...]:
    entries = () if told is None else told["content"]
    return tuple(
        TokenLogprob(
            int(entry["token"][_TOKEN:]),
            entry["logprob"],
            {int(one["token"][_TOKEN:]): one["logprob"] for one in (entry, *entry["top_logprobs"])},
        )
        for entry in entries
    )


def _read_add(told: Any) -> list[tuple[int, int | None] | Adapter]:
    return [_adapter(told["adapter"])] if "adapter" in told else [(told["bytes"], told["total"])]


def _adapter(told: Any) -> Adapter:
    own = {own.name: told[own.name] for own in fields(Adapter)}
    return Adapter(**{**own, "warnings": tuple(told["warnings"])})


def _places(told: Any) -> tuple[AdapterPlace, ...]:
    return tuple(AdapterPlace(place["worker"], place["state"], place["prompts"]) for place in told["workers"])


def _page(told: Any) -> AdapterPage:
    return AdapterPage(tuple(map(_adapter, told["data"])), told["has_more"], told["total"])


def _workers(told: Any) -> tuple[Worker, ...]:
    return tuple(map(_worker, told["workers"]))


def _worker(told: Any) -> Worker:
    status = told["status"]
    return Worker(
        **{name: told[name] for name in ("id", "role", "state", "address", "pid")},
        running=status["running"],
        kv_blocks=told["kv_blocks"],
        kv_blocks_used=status["kv_blocks_used"],
        seconds_since_heard=told["seconds_since_heard"],
        details=told,
    )


def _is_ready(told: Any) -> bool:
    if told.get("status") not in ("ready", "not ready"):
        raise BadReply("/ready didn't say whether the server is ready: is this a PreFT server?")
    return bool(told["status"] == "ready")


def _path(name: str) -> str:
    return f"/v1/adapters/{quote(name, safe='')}"
