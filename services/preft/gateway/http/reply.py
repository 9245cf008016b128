"""Reply bodies: the JSON of completions and chat completions, whole and in stream chunks.

Formats only; `respond` transports. Field names and their order follow OpenAI with vLLM's additions.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import dataclass, field
from json import JSONEncoder
from json.encoder import encode_basestring_ascii as quote
from typing import Any

from preft.core.request import FinishReason, PromptLogprobs, TokenLogprob
from preft.gateway.api_call import ApiCall
from preft.gateway.http.errors import failure_events
from preft.gateway.http.events import DONE, dumps
from preft.gateway.http.logprobs import LogprobFormat, prompt_json
from preft.gateway.text.choice import ChoiceDelta, ToolCallDelta
from preft.gateway.text.choice_reader import joined_calls
from preft.gateway.text.tokenizer import Tokenizer

_dump_text = JSONEncoder(separators=(",", ":"), allow_nan=False, ensure_ascii=False).encode


@dataclass(frozen=True, slots=True)
class ReplyOptions:
    """The parts of a reply that a caller chooses. `top_logprobs` None: no log probabilities."""

    top_logprobs: int | None = None
    tokens_as_ids: bool = False
    token_ids: bool = False
    usage: bool = False
    continuous_usage: bool = False
    prompt_logprobs: bool = False


@dataclass(slots=True)
class WholeChoice:
    """Joins the deltas of one choice."""

    index: int
    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    reasoning: list[str] = field(default_factory=list)
    tool_calls: list[ToolCallDelta] = field(default_factory=list)
    prompt_logprobs: PromptLogprobs | None = None

    def add(self, delta: ChoiceDelta) -> None:
        if delta.prompt_logprobs is not None:
            self.prompt_logprobs = delta.prompt_logprobs
        self.texts.append(delta.text)
        self.reasoning.append(delta.reasoning)
        self.tool_calls.extend(delta.tool_calls)
        self.token_ids.extend(delta.token_ids)
        self.logprobs.extend(delta.logprobs)
        self.finish_reason = delta.finish_reason
        self.stop_reason = delta.stop_reason

    def joined(self) -> ChoiceDelta:
        return ChoiceDelta(
            self.index,
            "".join(self.texts),
            tuple(self.token_ids),
            tuple(self.logprobs),
            self.finish_reason,
            self.stop_reason,
            "".join(self.reasoning),
            joined_calls(self.tool_calls),
            self.prompt_logprobs,
        )


class Shape:
    """One API's format of deltas and choices. One object serves one reply, and counts its tokens and text offsets.

    Subclasses name the `object` types and write one choice.
    """

    whole_object: str
    chunk_object: str
    plain_head: str  # a choice up to its text, without the index
    plain_tail: str  # the rest of the choice, without the end of the event

    def __init__(self, call: ApiCall, tokenizer: Tokenizer, options: ReplyOptions) -> None:
        self._call = call
        self._options = options
        self._tokenizer = tokenizer
        adapter = call.requests[0].adapter  # the version that answers, of all versions of the name
        self._envelope = {
            "id": call.id,
            "object": "",
            "created": int(time.time()),
            "model": call.model,
            "system_fingerprint": adapter.digest[:16] if adapter is not None else None,
        }
        self._logprobs: LogprobFormat | None = None
        if options.top_logprobs is not None:
            self._logprobs = LogprobFormat(tokenizer, top=options.top_logprobs, as_ids=options.tokens_as_ids)
        choices = len(call.requests) * call.n
        self._generated = [0] * choices
        self._started = [False] * choices
        self._wholes = [WholeChoice(index) for index in range(choices)]
        self._detailed = self._logprobs is not None or options.token_ids or options.continuous_usage
        head = dumps({**self._envelope, "object": self.chunk_object})[:-1]
        self._heads = [f'data: {head},"choices":[{{"index":{i},{self.plain_head}' for i in range(choices)]
        self._tail = self.plain_tail + (',"usage":null}\n\n' if options.usage else "}\n\n")

    def start(self, cached_tokens: int) -> str:
        """No events: a choice begins with its first delta."""
        return ""

    def chunk(self, delta: ChoiceDelta) -> str:
        """The server-sent events for `delta`; empty if `delta` shows nothing new."""
        index = delta.index
        opening = "" if self._started[index] else self._open(index)
        self._generated[index] += len(delta.token_ids)
        if self._detailed or delta.finish_reason is not None:
            return opening + self._event([self._chunk_choice(delta)], **self._usage_so_far(index))
        if delta.reasoning or delta.tool_calls:
            return opening + self._parts_chunk(delta)
        if not delta.text:
            return opening
        # The hot path, once per token: one JSON string between two prepared pieces.
        return f"{opening}{self._heads[index]}{quote(delta.text)}{self._tail}"

    def end(self, cached_tokens: int, reasoning_tokens: int | None = None) -> str:
        """The events after the last delta: usage, if the request asks for it, and the end."""
        if not self._options.usage:
            return DONE
        usage = self._usage(self._call.prompt_tokens, sum(self._generated), cached_tokens, reasoning_tokens)
        return self._event([], usage=usage) + DONE

    def failure(self, error: BaseException) -> str:
        """The last events of a stream that fails."""
        return failure_events(error)

    def add(self, delta: ChoiceDelta) -> None:
        """Takes a delta of a reply that isn't streamed."""
        self._wholes[delta.index].add(delta)

    def reply(self, cached_tokens: int, reasoning_tokens: int | None = None) -> str:
        """The JSON text of a reply that isn't streamed, after its last delta."""
        return self.whole_json([choice.joined() for choice in self._wholes], cached_tokens, reasoning_tokens)

    def whole(
        self, choices: list[ChoiceDelta], cached_tokens: int, reasoning_tokens: int | None = None
    ) -> dict[str, Any]:
        """The body of a reply that consists of `choices`."""
        generated = sum(len(choice.token_ids) for choice in choices)
        return {
            **self._envelope,
            "object": self.whole_object,
            "choices": [self._whole_choice(choice) for choice in choices],
            "service_tier": None,
            "usage": self._usage(self._call.prompt_tokens, generated, cached_tokens, reasoning_tokens),
        }

    def whole_json(self, choices: list[ChoiceDelta], cached_tokens: int, reasoning_tokens: int | None = None) -> str:
        """The JSON text of `whole`, with the prompt's log probabilities."""
        return _dump_text(self.whole(choices, cached_tokens, reasoning_tokens))

    def _open(self, index: int) -> str:
        self._started[index] = True
        return ""

    def _prompt_json(self, choice: ChoiceDelta) -> str:
        if not self._options.prompt_logprobs or choice.prompt_logprobs is None:
            return "null"
        return prompt_json(choice.prompt_logprobs, self._tokenizer)

    def _parts_chunk(self, delta: ChoiceDelta) -> str:
        """The event for a delta that isn't text alone."""
        return self._event([self._chunk_choice(delta)], **self._usage_so_far(delta.index))

    def _chunk_choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        raise NotImplementedError

    def _whole_choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        return self._chunk_choice(choice)

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        body = {**self._envelope, "object": self.chunk_object, "choices": choices, **more}
        return f"data: {dumps(body)}\n\n"

    def _usage_so_far(self, index: int) -> dict[str, Any]:
        """The usage field of a chunk. In OpenAI's streams with usage it is null until the last chunk."""
        if self._options.continuous_usage:
            return {"usage": self._usage(len(self._prompt(index)), self._generated[index])}
        return {"usage": None} if self._options.usage else {}

    def _prompt(self, index: int) -> tuple[int, ...]:
        return self._call.requests[index // self._call.n].prompt_token_ids

    @staticmethod
    def _usage(prompt: int, generated: int, cached: int | None = None, reasoning: int | None = None) -> dict[str, Any]:
        usage: dict[str, Any] = {
            "prompt_tokens": prompt,
            "total_tokens": prompt + generated,
            "completion_tokens": generated,
        }
        if cached is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": cached}
        if reasoning is not None:
            usage["completion_tokens_details"] = {"reasoning_tokens": reasoning}
        return usage


class CompletionShape(Shape):
    """/v1/completions."""

    whole_object = "text_completion"
    chunk_object = "text_completion"
    plain_head = '"text":'
    plain_tail = ',"logprobs":null,"finish_reason":null,"stop_reason":null}]'

    def __init__(self, call: ApiCall, tokenizer: Tokenizer, options: ReplyOptions) -> None:
        super().__init__(call, tokenizer, options)
        self._offsets = [0] * len(self._generated)
        self._prompt_shown = [not options.token_ids] * len(self._generated)

    def whole_json(self, choices: list[ChoiceDelta], cached_tokens: int, reasoning_tokens: int | None = None) -> str:
        body = self.whole(choices, cached_tokens, reasoning_tokens)
        ends = [self._prompt_json(choice) for choice in choices[:: self._call.n]]  # the same for choices of one prompt
        texts = [
            f'{_dump_text(choice)[:-1]},"prompt_logprobs":{ends[place // self._call.n]}}}'
            for place, choice in enumerate(body.pop("choices"))
        ]
        return f'{_dump_text(body)[:-1]},"choices":[{",".join(texts)}]}}'

    def chunk(self, delta: ChoiceDelta) -> str:
        """Begins a choice with its prompt, if the reply shall have it."""
        if not self._call.echoes or self._started[delta.index]:
            return super().chunk(delta)
        prompt = ChoiceDelta(delta.index, "", (), prompt_logprobs=delta.prompt_logprobs)
        opening = self._event([self._choice(prompt, echo=True)], **self._usage_so_far(delta.index))
        return opening + super().chunk(delta)

    def _whole_choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        return self._choice(choice, echo=bool(self._call.echoes))

    def _chunk_choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        return self._choice(delta, echo=False)

    def _choice(self, delta: ChoiceDelta, *, echo: bool) -> dict[str, Any]:
        """The choice, behind its prompt if `echo`."""
        index, logprobs = delta.index, None
        if self._logprobs is not None:
            first, entries = None, itertools.chain(delta.logprobs)
            if echo:
                first = self._prompt(index)[0]
                entries = itertools.chain(delta.prompt_logprobs or (), delta.logprobs)
            logprobs, self._offsets[index] = self._logprobs.completion(entries, self._offsets[index], first)
        choice = {
            "index": index,
            "text": self._call.echoes[index // self._call.n] + delta.text if echo else delta.text,
            "logprobs": logprobs,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }
        if self._options.token_ids:
            choice["token_ids"] = delta.token_ids
        if not self._prompt_shown[index]:
            self._prompt_shown[index] = True
            choice["prompt_token_ids"] = self._prompt(index)
        return choice


class ChatShape(Shape):
    """/v1/chat/completions."""

    whole_object = "chat.completion"
    chunk_object = "chat.completion.chunk"
    plain_head = '"delta":{"content":'
    plain_tail = '},"logprobs":null,"finish_reason":null}]'

    def __init__(self, call: ApiCall, tokenizer: Tokenizer, options: ReplyOptions) -> None:
        super().__init__(call, tokenizer, options)
        own = len(self.plain_head)
        self._thought_heads = [f'{head[:-own]}"delta":{{"reasoning":' for head in self._heads]
        self._call_heads = [f'{head[:-own]}"delta":{{"tool_calls":[{{"index":' for head in self._heads]

    def _parts_chunk(self, delta: ChoiceDelta) -> str:
        """Nearly as quick as the event for text, if the delta has thoughts alone or a piece of a call's arguments."""
        index, calls = delta.index, delta.tool_calls
        if not delta.text and not calls:
            return f"{self._thought_heads[index]}{quote(delta.reasoning)}{self._tail}"
        if not delta.text and not delta.reasoning and len(calls) == 1 and not calls[0].id and not calls[0].name:
            arguments = f'"function":{{"arguments":{quote(calls[0].arguments)}}}'
            return f"{self._call_heads[index]}{calls[0].position},{arguments}}}]{self._tail}"
        return super()._parts_chunk(delta)

    def _open(self, index: int) -> str:
        """Begins a choice with its role."""
        self._started[index] = True
        first = {"role": "assistant", "content": "".join(self._call.echoes)}
        more = self._about_prompt() | self._usage_so_far(index)
        return self._event([{"index": index, "delta": first, "logprobs": None, "finish_reason": None}], **more)

    def whole(
        self, choices: list[ChoiceDelta], cached_tokens: int, reasoning_tokens: int | None = None
    ) -> dict[str, Any]:
        return super().whole(choices, cached_tokens, reasoning_tokens) | self._about_prompt()

    def whole_json(self, choices: list[ChoiceDelta], cached_tokens: int, reasoning_tokens: int | None = None) -> str:
        body = super().whole_json(choices, cached_tokens, reasoning_tokens)
        return f'{body[:-1]},"prompt_logprobs":{self._prompt_json(choices[0])}}}'

    def _about_prompt(self) -> dict[str, Any]:
        about: dict[str, Any] = {"prompt_token_ids": self._prompt(0)} if self._options.token_ids else {}
        return about if self._call.rendered is None else about | {"prompt_text": self._call.rendered}

    def _chunk_choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": delta.index,
            "delta": _parts_of(delta),
            "logprobs": None if self._logprobs is None else self._logprobs.chat(delta.logprobs),
            "finish_reason": delta.finish_reason,
        }
        if delta.finish_reason is not None:
            choice["stop_reason"] = delta.stop_reason
        if self._options.token_ids:
            choice["token_ids"] = delta.token_ids
        return choice

    def _whole_choice(self, choice: ChoiceDelta) -> dict[str, Any]:
        body: dict[str, Any] = {
            "index": choice.index,
            "message": _message_of(choice, "".join(self._call.echoes)),
            "logprobs": None if self._logprobs is None else self._logprobs.chat(choice.logprobs),
            "finish_reason": choice.finish_reason,
            "stop_reason": choice.stop_reason,
        }
        if self._options.token_ids:
            body["token_ids"] = choice.token_ids
        return body


def _parts_of(delta: ChoiceDelta) -> dict[str, Any]:
    """A chunk's `delta`. A call's later parts have neither id nor name, as in OpenAI's streams."""
    if not (delta.reasoning or delta.tool_calls):
        return {"content": delta.text}
    parts: dict[str, Any] = {"content": delta.text} if delta.text else {}
    if delta.reasoning:
        parts["reasoning"] = delta.reasoning
    if delta.tool_calls:
        parts["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "index": call.position,
                "function": {"name": call.name, "arguments": call.arguments},
            }
            if call.id or call.name
            else {"index": call.position, "function": {"arguments": call.arguments}}
            for call in delta.tool_calls
        ]
    return parts


def _message_of(choice: ChoiceDelta, echo: str) -> dict[str, Any]:
    """A whole choice's message. Its content begins with `echo`, and is null if there is only reasoning or calls."""
    text = echo + choice.text
    content = text if text or not (choice.reasoning or choice.tool_calls) else None
    message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
    if choice.reasoning:
        message["reasoning"] = choice.reasoning
    if choice.tool_calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in choice.tool_calls
        ]
    return message
