"""Replies of Anthropic's /v1/messages: the message, and the events of its stream.

Formats only; `respond` transports. A message is a list of blocks: thinking, text, tool uses, in the order of their
coming. Names and order of fields and events are Anthropic's.
"""

from __future__ import annotations

import json
import uuid
from json.encoder import encode_basestring_ascii as quote
from typing import Any

import jiter

from preft.core.request import FinishReason
from preft.gateway.api_call import ApiCall
from preft.gateway.http.error_forms import anthropic_error, error_parts
from preft.gateway.http.events import dumps
from preft.gateway.text.choice import ChoiceDelta, ToolCallDelta

Json = dict[str, Any]


class _Block:
    """One content block while it grows. `delta` is the type of its deltas, and `field` the deltas' field."""

    kind = "text"
    delta = "text_delta"
    field = "text"

    def __init__(self, index: int) -> None:
        self.index = index
        self.texts: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def as_json(self) -> Json:
        return {"type": "text", "text": self.text}

    def last_delta(self) -> Json | None:
        return None


class _Thinking(_Block):
    """The API's clients want a signature. No other server can check one of this server, which has no key for it."""

    kind = "thinking"
    delta = "thinking_delta"
    field = "thinking"

    def __init__(self, index: int) -> None:
        super().__init__(index)
        self._signature = ""

    def as_json(self) -> Json:
        return {"type": "thinking", "thinking": self.text, "signature": self._signature}

    def last_delta(self) -> Json | None:
        self._signature = uuid.uuid4().hex
        return {"type": "signature_delta", "signature": self._signature}


class _ToolUse(_Block):
    kind = "tool_use"
    delta = "input_json_delta"
    field = "partial_json"

    def __init__(self, index: int, call: ToolCallDelta) -> None:
        super().__init__(index)
        self.position, self._id, self._name = call.position, call.id, call.name

    def as_json(self) -> Json:
        return {"type": "tool_use", "id": self._id, "name": self._name, "input": self._input()}

    @property
    def is_whole(self) -> bool:
        try:
            json.loads(self.text)
        except ValueError:
            return False
        return True

    def _input(self) -> Json:
        """The arguments. Of arguments that were cut off, the beginning, as Anthropic's clients read it in a stream."""
        try:
            value = jiter.from_json(self.text.encode(), partial_mode=True)
        except ValueError:
            return {}
        return value if isinstance(value, dict) else {}


class AnthropicShape:
    """The format of one message."""

    def __init__(self, call: ApiCall) -> None:
        self._call = call
        self._blocks: list[Json] = []  # the finished ones
        self._block: _Block | None = None
        self._last_use: _ToolUse | None = None
        self._generated = 0  # tokens
        self._finish: FinishReason | None = None
        self._stop: str | int | None = None

    def start(self, cached_tokens: int) -> str:
        message = self._message(None, None, cached_tokens)
        return _event("message_start", {"message": message}) + _event("ping", {})

    def add(self, delta: ChoiceDelta) -> None:
        """Takes a delta of a reply that isn't streamed."""
        self.chunk(delta)

    def chunk(self, delta: ChoiceDelta) -> str:
        """The events for `delta`."""
        self._generated += len(delta.token_ids)
        self._finish, self._stop = delta.finish_reason, delta.stop_reason
        events = ""
        if delta.reasoning:
            events += self._grow(_Thinking, delta.reasoning)
        if delta.text:
            events += self._grow(_Block, delta.text)
        for call in delta.tool_calls:
            events += self._grow_use(call)
        return events

    def end(self, cached_tokens: int, reasoning_tokens: int | None = None) -> str:
        """The events after the last delta."""
        events = self._finished()
        reason, stop = self._stop_reason()
        delta = {"stop_reason": reason, "stop_sequence": stop}
        events += _event("message_delta", {"delta": delta, "usage": self._usage(cached_tokens)})
        return events + _event("message_stop", {})

    def failure(self, error: BaseException) -> str:
        """The last event of a stream that fails."""
        return f"event: error\ndata: {dumps(anthropic_error(error_parts(error)))}\n\n"

    def reply(self, cached_tokens: int, reasoning_tokens: int | None = None) -> str:
        """The JSON text of a reply that isn't streamed."""
        self._finished()
        return dumps(self._message(*self._stop_reason(), cached_tokens))

    def _finished(self) -> str:
        """The last block's last events. An answer without anything is an empty text."""
        events = "" if self._blocks or self._block is not None else self._switch(_Block(0))
        return events + self._close()

    def _grow(self, kind: type[_Block], text: str) -> str:
        block = self._block
        events = ""
        if block is None or block.kind != kind.kind:
            block = kind(self._next())
            events = self._switch(block)
        return events + _grown(block, text)

    def _grow_use(self, call: ToolCallDelta) -> str:
        block = self._block
        events = ""
        if not isinstance(block, _ToolUse) or block.position != call.position:
            block = self._last_use = _ToolUse(self._next(), call)
            events = self._switch(block)
        return events + _grown(block, call.arguments) if call.arguments else events

    def _next(self) -> int:
        return len(self._blocks) + (self._block is not None)

    def _switch(self, block: _Block) -> str:
        events = self._close()
        self._block = block
        return events + _event("content_block_start", {"index": block.index, "content_block": block.as_json()})

    def _close(self) -> str:
        block, self._block = self._block, None
        if block is None:
            return ""
        events = ""
        if (delta := block.last_delta()) is not None:
            events = _event("content_block_delta", {"index": block.index, "delta": delta})
        self._blocks.append(block.as_json())
        return events + _event("content_block_stop", {"index": block.index})

    def _stop_reason(self) -> tuple[str, str | None]:
        """`stop_reason` and `stop_sequence`, as in vLLM: a call that a stop string has cut short must not run."""
        if self._finish is FinishReason.LENGTH:
            return "max_tokens", None
        if self._last_use is not None and (self._last_use.is_whole or not isinstance(self._stop, str)):
            return "tool_use", None
        return ("stop_sequence", self._stop) if isinstance(self._stop, str) else ("end_turn", None)

    def _message(self, reason: str | None, stop: str | None, cached_tokens: int) -> Json:
        return {
            "id": self._call.id,
            "type": "message",
            "role": "assistant",
            "model": self._call.model,
            "content": list(self._blocks),
            "stop_reason": reason,
            "stop_sequence": stop,
            "usage": self._usage(cached_tokens),
        }

    def _usage(self, cached_tokens: int) -> Json:
        """Anthropic counts the prompt tokens found in a cache apart."""
        return {
            "input_tokens": self._call.prompt_tokens - cached_tokens,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached_tokens,
            "output_tokens": self._generated,
        }


def _grown(block: _Block, text: str) -> str:
    """The hot path, once per token."""
    block.texts.append(text)
    return (
        'event: content_block_delta\ndata: {"type":"content_block_delta","index":'
        f'{block.index},"delta":{{"type":"{block.delta}","{block.field}":{quote(text)}}}}}\n\n'
    )


def _event(kind: str, fields: Json) -> str:
    return f"event: {kind}\ndata: {dumps({'type': kind, **fields})}\n\n"
