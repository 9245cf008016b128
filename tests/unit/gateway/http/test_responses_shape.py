"""Responses with reasoning, text and function calls: the official client reads them, streamed and whole."""

from __future__ import annotations

import json
from typing import Any

import pytest
from openai import pydantic_function_tool
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import BaseModel, TypeAdapter

from preft.core.errors import EngineFailed, QueueFull, ShuttingDown
from preft.core.request import FinishReason, TokenLogprob
from preft.gateway.bodies.parse import parse_body
from preft.gateway.bodies.responses import ResponsesBody
from preft.gateway.http.responses_shape import ResponsesShape
from preft.gateway.text.choice import ChoiceDelta, ToolCallDelta
from support.shaped import call_of, data_of, openai_client, streamed, whole

EVENT: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
LOGPROBS = "message.output_text.logprobs"


def delta(text: str = "", *, tokens: int = 1, **more: Any) -> ChoiceDelta:
    return ChoiceDelta(0, text, (70,) * tokens, **more)


def call(position: int, arguments: str = "", name: str = "") -> ChoiceDelta:
    first = {"id": f"call_{position}", "name": name} if name else {}
    return delta(tool_calls=(ToolCallDelta(position, arguments, **first),))


STOP = {"finish_reason": FinishReason.STOP}
LENGTH = {"finish_reason": FinishReason.LENGTH}
TEXT = (delta("hel"), delta("lo"), delta(**STOP))
CALLS = (
    delta(reasoning="I think"), delta(tokens=2), delta(reasoning=" so"), delta(tokens=1), delta("Let me see."),
    call(0, name="look"), call(0, '{"at": '), call(0, "3}"), call(1, '{"at": 4}', name="look"), delta(**STOP),
)  # fmt: skip
AT_ONCE = (
    delta(
        "ok", reasoning="hm",
        tool_calls=(ToolCallDelta(0, "{}", "a", "f"), ToolCallDelta(1, "{", "b", "g"), ToolCallDelta(1, "}")), **STOP,
    ),
)  # fmt: skip
EMPTY = (delta(**STOP),)
CUT = (call(0, '{"at"', name="look"), delta(**LENGTH))
REPLIES = {"text": TEXT, "calls": CALLS, "at once": AT_ONCE, "empty": EMPTY, "cut": CUT}


def shape(tokenizer: Any, **body: Any) -> ResponsesShape:
    parsed = parse_body(ResponsesBody, {"model": "ann", "input": "hi", **body})
    return ResponsesShape(parsed, call_of("resp_1"), tokenizer)


def without_ids(response: dict[str, Any]) -> dict[str, Any]:
    items = [{**item, "id": ""} for item in response["output"]]
    return {**response, "output": items, "created_at": 0, "completed_at": 0}


@pytest.mark.parametrize("name", REPLIES)
def test_events_are_openais_and_tell_the_whole_reply(tokenizer: Any, name: str) -> None:
    events = data_of(streamed(shape(tokenizer), REPLIES[name]))
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"] for event in events[:2]] == ["response.created", "response.in_progress"]
    last = events[-1]["response"]
    assert events[-1]["type"] == f"response.{last['status']}"
    body = whole(shape(tokenizer), REPLIES[name])
    assert without_ids(last) == without_ids(body)
    Response.model_validate(body)
    done = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    assert done == last["output"]
    ids = [event["item"]["id"] for event in events if event["type"] == "response.output_item.added"]
    assert ids == [item["id"] for item in done]


def test_items_in_the_order_of_their_coming(tokenizer: Any) -> None:
    body = whole(shape(tokenizer), CALLS)
    thoughts, message, first, second = body["output"]
    assert thoughts["content"] == [{"type": "reasoning_text", "text": "I think so"}]
    assert message["content"] == [{"type": "output_text", "text": "Let me see.", "annotations": [], "logprobs": []}]
    assert (first["call_id"], first["name"], first["arguments"]) == ("call_0", "look", '{"at": 3}')
    assert (second["call_id"], second["name"], second["arguments"]) == ("call_1", "look", '{"at": 4}')
    assert body["usage"] == {
        "input_tokens": 5,
        "input_tokens_details": {"cached_tokens": 2, "cache_write_tokens": 0},
        "output_tokens": 11,
        "output_tokens_details": {"reasoning_tokens": 4},
        "total_tokens": 16,
    }


def test_the_order_of_events(tokenizer: Any) -> None:
    kinds = [event["type"].removeprefix("response.") for event in data_of(streamed(shape(tokenizer), CALLS))]
    assert kinds == [
        "created", "in_progress",
        "output_item.added", "content_part.added", "reasoning_text.delta", "reasoning_text.delta",
        "reasoning_text.done", "content_part.done", "output_item.done",
        "output_item.added", "content_part.added", "output_text.delta",
        "output_text.done", "content_part.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "output_item.added", "function_call_arguments.delta",
        "function_call_arguments.done", "output_item.done",
        "completed",
    ]  # fmt: skip


def test_an_answer_that_was_cut_off_is_incomplete(tokenizer: Any) -> None:
    body = whole(shape(tokenizer), CUT)
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert [(item["type"], item["status"]) for item in body["output"]] == [("function_call", "incomplete")]
    text = whole(shape(tokenizer), (delta("a"), delta("b", **LENGTH)))
    assert text["output"][0]["status"] == "incomplete"


def test_reasoning_can_be_left_out(tokenizer: Any) -> None:
    body = whole(shape(tokenizer, include_reasoning=False), CALLS)
    assert [item["type"] for item in body["output"]] == ["message", "function_call", "function_call"]
    assert body["usage"]["output_tokens_details"]["reasoning_tokens"] == 4


def test_logprobs_are_those_of_the_text(tokenizer: Any) -> None:
    def token(number: int) -> tuple[TokenLogprob, ...]:
        return (TokenLogprob(number, -0.5, 1, ((number, -0.5),)),)

    deltas = (
        delta(reasoning="hm", logprobs=token(70)), delta("a", logprobs=token(71)), delta(logprobs=token(72)),
        delta("b", logprobs=token(73)), delta(logprobs=token(1), **STOP),
    )  # fmt: skip
    asked = {"include": [LOGPROBS], "top_logprobs": 1}
    events = data_of(streamed(shape(tokenizer, **asked), deltas))
    parts = [event["logprobs"] for event in events if event["type"] == "response.output_text.delta"]
    assert [len(part) for part in parts] == [1, 2]
    [done] = [event for event in events if event["type"] == "response.output_text.done"]
    found = whole(shape(tokenizer, **asked), deltas)["output"][1]["content"][0]["logprobs"]
    assert done["logprobs"] == found
    assert [entry["token"] for entry in found] == [tokenizer.token_text(number) for number in (71, 72, 73, 1)]
    assert all(len(entry["top_logprobs"]) == 1 for entry in found)
    plain = whole(shape(tokenizer), deltas)
    assert plain["output"][1]["content"][0]["logprobs"] == []


@pytest.mark.parametrize(
    ("error", "code", "listed"),
    [
        (EngineFailed("boom"), "engine_failed", "server_error"),
        (ShuttingDown("bye"), "shutting_down", "server_error"),
        (QueueFull("full"), "queue_full", "rate_limit_exceeded"),
        (ValueError("a secret"), "internal_error", "server_error"),
    ],
)
def test_a_stream_that_fails(tokenizer: Any, error: Exception, code: str, listed: str) -> None:
    failing = shape(tokenizer)
    stream = failing.start(0) + "".join(map(failing.chunk, TEXT[:2])) + failing.failure(error)
    events = data_of(stream)
    for event in events:
        EVENT.validate_python(event)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert (events[-2]["type"], events[-2]["code"]) == ("error", code)
    response = events[-1]["response"]
    assert (events[-1]["type"], response["status"], response["error"]["code"]) == ("response.failed", "failed", listed)
    assert response["output"][0]["status"] == "incomplete"
    assert response["output"][0]["content"][0]["text"] == "hello"
    assert "secret" not in stream


def test_the_request_is_repeated(tokenizer: Any) -> None:
    tool = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": True}
    form = {"type": "json_schema", "name": "it", "schema": {"type": "object"}}
    body = whole(
        shape(
            tokenizer, instructions="be", tools=[tool], tool_choice="none", metadata={"a": "b"}, max_output_tokens=9,
            text={"format": form}, reasoning={"effort": "none"}, user="ann", parallel_tool_calls=False,
            max_tool_calls=3,
        ),
        TEXT,
    )  # fmt: skip
    assert body["tools"] == [{**tool, "description": None}]
    assert (body["tool_choice"], body["parallel_tool_calls"], body["max_tool_calls"]) == ("none", False, 3)
    assert (body["text"]["format"], body["reasoning"]["effort"]) == (form, "none")
    assert (body["instructions"], body["metadata"], body["user"]) == ("be", {"a": "b"}, "ann")
    assert (body["max_output_tokens"], body["temperature"], body["model"]) == (9, 0.5, "ann")


class Look(BaseModel):
    at: int


@pytest.mark.parametrize("name", ["text", "calls", "at once", "empty"])
def test_the_official_client_streams(tokenizer: Any, name: str) -> None:
    client = openai_client(streamed(shape(tokenizer), REPLIES[name]))
    with client.responses.stream(model="ann", input="hi") as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_response()
    assert kinds[-1] == "response.completed"
    body = whole(shape(tokenizer), REPLIES[name])
    texts = [part["text"] for item in body["output"] if item["type"] == "message" for part in item["content"]]
    assert final.output_text == "".join(texts)
    assert [item.type for item in final.output] == [item["type"] for item in body["output"]]


def test_the_official_client_parses(tokenizer: Any) -> None:
    tool = pydantic_function_tool(Look, name="look")["function"]
    tools: Any = [{"type": "function", **tool}]
    client = openai_client(streamed(shape(tokenizer), CALLS), whole(shape(tokenizer), CALLS))
    parsed = client.responses.parse(model="ann", input="hi", tools=tools)
    calls = [item for item in parsed.output if item.type == "function_call"]
    assert [item.parsed_arguments for item in calls] == [{"at": 3}, {"at": 4}]
    with client.responses.stream(model="ann", input="hi", tools=tools) as stream:
        assert [item.type for item in stream.get_final_response().output] == [item.type for item in parsed.output]
    answer = (delta('{"at": '), delta("7}"), delta(**STOP))
    client = openai_client(body=whole(shape(tokenizer), answer))
    assert client.responses.parse(model="ann", input="hi", text_format=Look).output_parsed == Look(at=7)


def test_a_reply_can_be_sent_back(tokenizer: Any) -> None:
    """As agents do: every output item, as the client has read it, is an input item."""
    response = openai_client(body=whole(shape(tokenizer), CALLS)).responses.create(model="ann", input="hi")
    items = [json.loads(item.model_dump_json(exclude_unset=True)) for item in response.output]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "found"}
        for item in items
        if item["type"] == "function_call"
    ]
    body = parse_body(ResponsesBody, {"model": "ann", "input": [{"role": "user", "content": "hi"}, *items, *results]})
    user, assistant, *tools = body.chat.messages
    assert (user.role, assistant.role, assistant.reasoning) == ("user", "assistant", "I think so")
    assert assistant.said.texts == ("Let me see.",)
    assert [one.name for one in assistant.tool_calls] == ["look", "look"]
    assert [tool.tool_call_id for tool in tools] == ["call_0", "call_1"]
