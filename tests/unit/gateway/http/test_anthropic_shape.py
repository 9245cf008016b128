"""Anthropic messages with thinking, text and tool uses: the official client reads them, streamed and whole."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import pytest
from anthropic.types import Message, RawMessageStreamEvent
from pydantic import TypeAdapter

from preft.core.errors import EngineFailed, QueueFull, ShuttingDown
from preft.core.request import FinishReason
from preft.gateway.bodies.anthropic import MessagesBody
from preft.gateway.bodies.parse import parse_body
from preft.gateway.http.anthropic_shape import AnthropicShape
from preft.gateway.text.choice import ChoiceDelta, ToolCallDelta
from support.shaped import anthropic_client, call_of, data_of, streamed, whole

EVENT: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)
USER: list[Any] = [{"role": "user", "content": "hi"}]


def delta(text: str = "", **more: Any) -> ChoiceDelta:
    return ChoiceDelta(0, text, (70,), **more)


def use(position: int, arguments: str = "", name: str = "", **more: Any) -> ChoiceDelta:
    first = {"id": f"toolu_{position}", "name": name} if name else {}
    return delta(tool_calls=(ToolCallDelta(position, arguments, **first),), **more)


STOP = {"finish_reason": FinishReason.STOP}
TEXT = (delta("hel"), delta("lo"), delta(**STOP))
USES = (
    delta(reasoning="I think"), delta(reasoning=" so"), delta("Let me see."), use(0, name="look"), use(0, '{"at": '),
    use(0, "3}"), use(1, '{"at": 4}', name="look"), delta(**STOP),
)  # fmt: skip
AT_ONCE = (
    delta(
        "ok", reasoning="hm",
        tool_calls=(ToolCallDelta(0, "{}", "a", "f"), ToolCallDelta(1, "{", "b", "g"), ToolCallDelta(1, "}")), **STOP,
    ),
)  # fmt: skip
EMPTY = (delta(**STOP),)
CUT = (use(0, '{"at": [1, "a', name="look"), delta(finish_reason=FinishReason.LENGTH))
REPLIES = {"text": TEXT, "uses": USES, "at once": AT_ONCE, "empty": EMPTY, "cut": CUT}


def shape() -> AnthropicShape:
    return AnthropicShape(call_of("msg_1"))


def without_signatures(message: dict[str, Any]) -> dict[str, Any]:
    blocks = [{**block, "signature": ""} if "signature" in block else block for block in message["content"]]
    return {**message, "content": blocks}


@pytest.mark.parametrize("name", REPLIES)
def test_events_are_anthropics_and_tell_the_whole_reply(name: str) -> None:
    stream, body = streamed(shape(), REPLIES[name]), whole(shape(), REPLIES[name])
    Message.model_validate(body)
    for event in data_of(stream):
        if event["type"] != "ping":
            EVENT.validate_python(event)
    with anthropic_client(stream).messages.stream(model="ann", max_tokens=5, messages=USER) as reading:
        final = reading.get_final_message()
    told = json.loads(final.model_dump_json(include=set(body), exclude_unset=True))
    assert without_signatures(told) == without_signatures(body)


def test_blocks_in_the_order_of_their_coming() -> None:
    body = whole(shape(), USES)
    thoughts, text, first, second = body["content"]
    assert (thoughts["thinking"], text["text"]) == ("I think so", "Let me see.")
    assert len(thoughts["signature"]) == 32
    assert (first["id"], first["name"], first["input"]) == ("toolu_0", "look", {"at": 3})
    assert (second["id"], second["name"], second["input"]) == ("toolu_1", "look", {"at": 4})
    assert body["stop_reason"] == "tool_use"
    assert body["usage"] == {
        "input_tokens": 3, "cache_creation_input_tokens": 0, "cache_read_input_tokens": 2, "output_tokens": 8,
    }  # fmt: skip


def test_the_order_of_events() -> None:
    kinds = [event["type"] for event in data_of(streamed(shape(), USES))]
    start, one, stop = "content_block_start", "content_block_delta", "content_block_stop"
    assert kinds == [
        "message_start", "ping", start, one, one, one, stop, start, one, stop, start, one, one, stop, start, one, stop,
        "message_delta", "message_stop",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("deltas", "reason", "sequence"),
    [
        (TEXT, "end_turn", None),
        ((delta("a", **STOP, stop_reason="END"),), "stop_sequence", "END"),
        ((delta("a", **STOP, stop_reason=7),), "end_turn", None),
        ((delta("a", finish_reason=FinishReason.LENGTH),), "max_tokens", None),
        (CUT, "max_tokens", None),
        ((use(0, "{}", "f", **STOP, stop_reason="END"),), "tool_use", None),
        ((use(0, '{"a', "f", **STOP, stop_reason="END"),), "stop_sequence", "END"),
    ],
)
def test_stop_reasons(deltas: tuple[ChoiceDelta, ...], reason: str, sequence: str | None) -> None:
    body = whole(shape(), deltas)
    assert (body["stop_reason"], body["stop_sequence"]) == (reason, sequence)


def test_an_empty_answer_has_an_empty_text() -> None:
    assert whole(shape(), EMPTY)["content"] == [{"type": "text", "text": ""}]


def test_arguments_that_were_cut_off() -> None:
    assert whole(shape(), CUT)["content"][0]["input"] == {"at": [1]}
    for arguments in ("", "[1, 2]", "nothing"):
        cut = (use(0, arguments, name="f"), delta(finish_reason=FinishReason.LENGTH))
        assert whole(shape(), cut)["content"][0]["input"] == {}


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (EngineFailed("boom"), "api_error"),
        (ShuttingDown("bye"), "overloaded_error"),
        (QueueFull("full"), "rate_limit_error"),
        (ValueError("a secret"), "api_error"),
    ],
)
def test_a_stream_that_fails(error: Exception, kind: str) -> None:
    failing = shape()
    stream = failing.start(0) + "".join(map(failing.chunk, TEXT[:2])) + failing.failure(error)
    assert data_of(stream)[-1]["error"]["type"] == kind
    assert "secret" not in stream
    client = anthropic_client(stream)
    with (
        client.messages.stream(model="ann", max_tokens=5, messages=USER) as reading,
        pytest.raises(anthropic.APIStatusError),
    ):
        reading.until_done()


def test_a_reply_can_be_sent_back() -> None:
    """As agents do: the content, as the client has read it, is an assistant's message."""
    message = anthropic_client(body=whole(shape(), USES)).messages.create(model="ann", max_tokens=5, messages=USER)
    content = [json.loads(block.model_dump_json()) for block in message.content]
    results = [{"type": "tool_result", "tool_use_id": one["id"], "content": "found"} for one in content[2:]]
    messages = [*USER, {"role": "assistant", "content": content}, {"role": "user", "content": results}]
    body = parse_body(MessagesBody, {"model": "ann", "max_tokens": 5, "messages": messages})
    _, assistant, *tools = body.chat.messages
    assert (assistant.reasoning, assistant.said.texts) == ("I think so", ("Let me see.",))
    assert [one.arguments for one in assistant.tool_calls] == ['{"at": 3}', '{"at": 4}']
    assert [tool.tool_call_id for tool in tools] == ["toolu_0", "toolu_1"]
