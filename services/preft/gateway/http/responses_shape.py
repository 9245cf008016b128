"""Replies of /v1/responses: the response object, and the events of its stream.

Formats only; `respond` transports. A response is a list of items: reasoning, text, function calls, in the order of
their coming. Names and order of fields and events are OpenAI's.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable, Iterator
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from preft.core.errors import InvalidRequest, QueueFull, RateLimited
from preft.core.request import FinishReason, TokenLogprob
from preft.gateway.api_call import ApiCall
from preft.gateway.bodies.responses import LOGPROBS, ResponsesBody
from preft.gateway.http.error_forms import error_parts
from preft.gateway.http.events import dumps
from preft.gateway.http.logprobs import LogprobFormat
from preft.gateway.text.choice import ChoiceDelta, ToolCallDelta
from preft.gateway.text.tokenizer import Tokenizer

Json = dict[str, Any]
Event = tuple[str, Json]  # type and fields


class _Item:
    """One output item while it grows. `part` is its text so far."""

    prefix: str

    def __init__(self, index: int) -> None:
        self.id = f"{self.prefix}_{uuid.uuid4().hex}"
        self.at: Json = {"item_id": self.id, "output_index": index}
        self.texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def open(self) -> Iterator[Event]:
        yield "response.output_item.added", self._placed(self.as_json("in_progress"))

    def close(self, status: str) -> Iterator[Event]:
        yield "response.output_item.done", self._placed(self.as_json(status))

    def as_json(self, status: str) -> Json:
        raise NotImplementedError

    def _placed(self, item: Json) -> Json:
        return {"output_index": self.at["output_index"], "item": item}


class _Part(_Item):
    """An item with one content part."""

    kind: str  # of the text's events

    def open(self) -> Iterator[Event]:
        self.at["content_index"] = 0
        yield from super().open()
        yield "response.content_part.added", {**self.at, "part": self._part("")}

    def close(self, status: str) -> Iterator[Event]:
        yield f"response.{self.kind}.done", {**self.at, "text": self.text, **self._more()}
        yield "response.content_part.done", {**self.at, "part": self._part(self.text)}
        yield from super().close(status)

    def _content(self, status: str) -> list[Json]:
        """The content; an item that begins has none."""
        return [] if status == "in_progress" else [self._part(self.text)]

    def _part(self, text: str) -> Json:
        raise NotImplementedError

    def _more(self) -> Json:
        return {}


class _Reasoning(_Part):
    prefix, kind = "rs", "reasoning_text"

    def as_json(self, status: str) -> Json:
        return {
            "id": self.id,
            "type": "reasoning",
            "summary": [],
            "content": self._content(status),
            "encrypted_content": None,
            "status": status,
        }

    def _part(self, text: str) -> Json:
        return {"type": "reasoning_text", "text": text}


class _Message(_Part):
    prefix, kind = "msg", "output_text"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self.logprobs: list[Json] = []

    def as_json(self, status: str) -> Json:
        return {
            "id": self.id,
            "type": "message",
            "status": status,
            "role": "assistant",
            "content": self._content(status),
        }

    def _part(self, text: str) -> Json:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": self.logprobs if text else []}

    def _more(self) -> Json:
        return {"logprobs": self.logprobs}


class _Call(_Item):
    prefix = "fc"

    def __init__(self, index: int, call: ToolCallDelta) -> None:
        super().__init__(index)
        self.position, self._call_id, self._name = call.position, call.id, call.name

    def close(self, status: str) -> Iterator[Event]:
        yield "response.function_call_arguments.done", {**self.at, "name": self._name, "arguments": self.text}
        yield from super().close(status)

    def as_json(self, status: str) -> Json:
        return {
            "id": self.id,
            "type": "function_call",
            "status": status,
            "call_id": self._call_id,
            "name": self._name,
            "arguments": self.text,
        }


class ResponsesShape:
    """The format of one response."""

    def __init__(self, body: ResponsesBody, call: ApiCall, tokenizer: Tokenizer) -> None:
        self._body = body
        self._call = call
        self._created = int(time.time())
        self._logprobs = LogprobFormat(tokenizer, top=body.top_logprobs) if LOGPROBS in body.include else None
        self._unplaced: list[TokenLogprob] = []  # of tokens whose text is still to come
        self._items: list[Json] = []  # the finished ones
        self._item: _Item | None = None
        self._finish: FinishReason | None = None
        self._generated = 0  # tokens
        self._sent = 0  # events

    def start(self, cached_tokens: int) -> str:
        response = self._response("in_progress")
        return self._event("response.created", response=response) + self._event(
            "response.in_progress", response=response
        )

    def add(self, delta: ChoiceDelta) -> None:
        """Takes a delta of a reply that isn't streamed."""
        self.chunk(delta)

    def chunk(self, delta: ChoiceDelta) -> str:
        """The events for `delta`."""
        self._count(delta)
        self._finish = delta.finish_reason
        events = ""
        if delta.reasoning and self._body.include_reasoning:
            events += self._grow(_Reasoning, delta.reasoning)
        if delta.text:
            events += self._grow_text(delta.text)
        for call in delta.tool_calls:
            events += self._grow_call(call)
        return events

    def end(self, cached_tokens: int, reasoning_tokens: int | None = None) -> str:
        """The events after the last delta."""
        events, status = self._finished()
        response = self._response(status, self._usage(cached_tokens, reasoning_tokens))
        return events + self._event(f"response.{status}", response=response)

    def failure(self, error: BaseException) -> str:
        """The last events of a stream that fails: an error with the server's own code, and the failed response."""
        parts = error_parts(error)
        event = self._event("error", code=parts.code, message=parts.message, param=parts.param)
        failed = self._response("failed")
        failed["error"] = {"code": _failure_code(error), "message": parts.message}
        return event + self._event("response.failed", response=failed)

    def reply(self, cached_tokens: int, reasoning_tokens: int | None = None) -> str:
        """The JSON text of a reply that isn't streamed."""
        _, status = self._finished()
        return dumps(self._response(status, self._usage(cached_tokens, reasoning_tokens)))

    def _finished(self) -> tuple[str, str]:
        """The last item's last events, and the response's status. An answer without anything is an empty text."""
        status = "incomplete" if self._finish is FinishReason.LENGTH else "completed"
        events = "" if self._items or self._item is not None else self._switch(_Message(0))
        return events + self._close(status), status

    def _count(self, delta: ChoiceDelta) -> None:
        """Counts tokens, and keeps the log probabilities of those that may belong to the text."""
        self._generated += len(delta.token_ids)
        if self._logprobs is not None:
            self._unplaced.extend(delta.logprobs)
            if not delta.text and (delta.reasoning or delta.tool_calls):
                self._unplaced.clear()

    def _grow(self, kind: type[_Part], text: str) -> str:
        events = "" if isinstance(self._item, kind) else self._switch(kind(len(self._items) + (self._item is not None)))
        assert self._item is not None
        self._item.texts.append(text)
        return events + self._event(f"response.{kind.kind}.delta", **self._item.at, delta=text)

    def _grow_text(self, text: str) -> str:
        item = self._item
        events = ""
        if not isinstance(item, _Message):
            item = _Message(len(self._items) + (item is not None))
            events = self._switch(item)
        item.texts.append(text)
        if self._logprobs is None:  # the hot path, once per token
            head = (
                'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","sequence_number":'
                f'{self._sent},"item_id":"{item.id}","output_index":{item.at["output_index"]},"content_index":0,"delta":'
            )
            self._sent += 1
            return f'{events}{head}{quote(text)},"logprobs":[]}}\n\n'
        logprobs = self._logprobs.chat(self._unplaced)["content"]
        self._unplaced.clear()
        item.logprobs += logprobs
        return events + self._event("response.output_text.delta", **item.at, delta=text, logprobs=logprobs)

    def _grow_call(self, call: ToolCallDelta) -> str:
        item = self._item
        events = ""
        if not isinstance(item, _Call) or item.position != call.position:
            item = _Call(len(self._items) + (item is not None), call)
            events = self._switch(item)
        if not call.arguments:
            return events
        item.texts.append(call.arguments)
        return events + self._event("response.function_call_arguments.delta", **item.at, delta=call.arguments)

    def _switch(self, item: _Item) -> str:
        events = self._close("completed")
        self._item = item
        return events + self._events(item.open())

    def _close(self, status: str) -> str:
        item, self._item = self._item, None
        if item is None:
            return ""
        if isinstance(item, _Message) and self._logprobs is not None:  # of tokens without text, such as the end
            item.logprobs += self._logprobs.chat(self._unplaced)["content"]
            self._unplaced.clear()
        self._items.append(item.as_json(status))
        return self._events(item.close(status))

    def _events(self, events: Iterable[Event]) -> str:
        return "".join(self._event(kind, **fields) for kind, fields in events)

    def _event(self, kind: str, **fields: Any) -> str:
        data = dumps({"type": kind, "sequence_number": self._sent, **fields})
        self._sent += 1
        return f"event: {kind}\ndata: {data}\n\n"

    def _response(self, status: str, usage: Json | None = None) -> Json:
        body, sampling = self._body, self._call.requests[0].sampling
        items = list(self._items)
        if self._item is not None:
            items.append(self._item.as_json("incomplete"))
        return {
            "id": self._call.id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "max_tool_calls": body.max_tool_calls,
            "model": self._call.model,
            "output": items,
            "parallel_tool_calls": body.parallel_tool_calls,
            "presence_penalty": sampling.presence_penalty,
            "frequency_penalty": sampling.frequency_penalty,
            "previous_response_id": None,
            "reasoning": {"effort": body.reasoning.effort if body.reasoning is not None else None, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": _shown_format(body), "verbosity": "medium"},
            "tool_choice": body.shown_tool_choice,
            "tools": [tool.as_shown() for tool in body.tools],
            "top_logprobs": body.top_logprobs,
            "top_p": sampling.top_p,
            "truncation": body.truncation,
            "usage": usage,
            "user": body.user,
            "metadata": body.metadata or {},
        }

    def _usage(self, cached_tokens: int, reasoning_tokens: int | None) -> Json:
        prompt = self._call.prompt_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached_tokens, "cache_write_tokens": 0},
            "output_tokens": self._generated,
            "output_tokens_details": {"reasoning_tokens": reasoning_tokens or 0},
            "total_tokens": prompt + self._generated,
        }


def _shown_format(body: ResponsesBody) -> Json:
    if body.text is None or body.text.format is None:
        return {"type": "text"}
    return body.text.format.model_dump(by_alias=True, exclude_none=True)


def _failure_code(error: BaseException) -> str:
    """One of the codes that OpenAI lists for failed responses."""
    if isinstance(error, QueueFull | RateLimited):
        return "rate_limit_exceeded"
    return "invalid_prompt" if isinstance(error, InvalidRequest) else "server_error"
