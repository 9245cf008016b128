"""Bodies of /v1/responses become chats: items, tools and forms, and errors with the client's own names."""

from __future__ import annotations

from typing import Any

import pytest

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.parse import parse_body
from preft.gateway.bodies.responses import RESPONSES_PARAMETERS, ResponsesBody
from preft.gateway.bodies.schemas import ChatBody

USER = {"role": "user", "content": "hi"}
CALL = {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"a": 1}'}
RESULT = {"type": "function_call_output", "call_id": "c1", "output": "found"}
THOUGHTS = {
    "type": "reasoning", "id": "rs_1", "summary": [], "encrypted_content": None,
    "content": [{"type": "reasoning_text", "text": "hm"}],
}  # fmt: skip
SUMMARY = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "s"}]}


def parsed(**body: Any) -> ResponsesBody:
    return parse_body(ResponsesBody, {"model": "base", "input": "hi", **body})


def chat_of(**body: Any) -> ChatBody:
    """The same chat, as a client of chat completions would send it."""
    return parse_body(ChatBody, {"model": "base", **body})


def same(body: ResponsesBody, chat: ChatBody) -> None:
    assert dict(body.chat) == dict(chat)


def said(text: str, **more: Any) -> dict[str, Any]:
    return {
        "type": "message", "role": "assistant", "id": "msg_1", "status": "completed",
        "content": [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}], **more,
    }  # fmt: skip


def test_a_text_is_a_users_message_after_the_instructions() -> None:
    same(parsed(), chat_of(messages=[USER]))
    messages = [{"role": "system", "content": "be brief"}, USER]
    same(parsed(instructions="be brief"), chat_of(messages=messages))


def test_the_items_of_one_turn_are_one_message() -> None:
    calls = [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}]
    body = parsed(input=[USER, THOUGHTS, said("I look"), CALL, RESULT, said("It is there")])
    messages = [
        USER,
        {"role": "assistant", "reasoning": "hm", "tool_calls": calls, "content": [{"type": "text", "text": "I look"}]},
        {"role": "tool", "tool_call_id": "c1", "content": "found"},
        {"role": "assistant", "content": [{"type": "text", "text": "It is there"}]},
    ]
    same(body, chat_of(messages=messages))


@pytest.mark.parametrize(
    ("items", "expected"),
    [
        ([USER, said("a"), said("b")], [("user", ""), ("assistant", ""), ("assistant", "")]),
        ([USER, THOUGHTS, THOUGHTS], [("user", ""), ("assistant", "hm"), ("assistant", "hm")]),
        ([USER, {"type": "reasoning", "summary": []}], [("user", "")]),
        ([USER, SUMMARY], [("user", ""), ("assistant", "s")]),
    ],
)
def test_what_begins_a_new_message(items: list[Any], expected: list[tuple[str, str]]) -> None:
    assert [(message.role, message.reasoning or "") for message in parsed(input=items).chat.messages] == expected


def test_sampling_parameters_are_those_of_chats() -> None:
    given = {
        "temperature": 0.5, "top_p": 0.8, "top_k": 3, "min_p": 0.1, "presence_penalty": 1, "frequency_penalty": -1,
        "repetition_penalty": 1.2, "seed": 7, "ignore_eos": True, "stop": ["a"], "stop_token_ids": [9],
        "logit_bias": {"5": -3}, "include_stop_str_in_output": True, "skip_special_tokens": False, "priority": 3,
        "user": "ann", "request_id": "x", "structured_outputs": {"json": {"type": "object"}},
        "chat_template_kwargs": {"a": [1]}, "cache_salt": "s",
    }  # fmt: skip
    same(parsed(**given, max_output_tokens=9), chat_of(messages=[USER], **given, max_tokens=9))


def test_forms_effort_and_logprobs() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "it", "schema": schema, "strict": True}
    wanted = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema, "strict": True}}
    same(parsed(text={"format": form, "verbosity": "medium"}), chat_of(messages=[USER], response_format=wanted))
    form = {"type": "json_object"}
    same(parsed(text={"format": form}), chat_of(messages=[USER], response_format=form))
    same(parsed(text={"format": {"type": "text"}}), chat_of(messages=[USER], response_format={"type": "text"}))
    same(parsed(reasoning={"effort": "low", "summary": "auto"}), chat_of(messages=[USER], reasoning_effort="low"))
    asked = {"include": ["message.output_text.logprobs", "reasoning.encrypted_content"], "top_logprobs": 2}
    same(parsed(**asked), chat_of(messages=[USER], logprobs=True, top_logprobs=2))


def test_tools_are_those_of_chats() -> None:
    function = {"name": "look", "description": "looks", "parameters": {"type": "object"}, "strict": False}
    tools = [{"type": "function", "function": function}]
    same(
        parsed(tools=[{"type": "function", **function}], tool_choice="none", parallel_tool_calls=False),
        chat_of(messages=[USER], tools=tools, tool_choice="none", parallel_tool_calls=False),
    )
    same(parsed(tools=[], tool_choice="auto"), chat_of(messages=[USER]))


@pytest.mark.parametrize("status", ["in_progress", "incomplete"])
def test_an_unfinished_last_message_is_continued(status: str) -> None:
    body = parsed(input=[USER, said("The", status=status)])
    assert (body.chat.continue_final_message, body.chat.add_generation_prompt) == (True, False)
    assert not parsed(input=[said("The", status=status), USER]).chat.continue_final_message
    assert not parsed(input=[USER, said("The")]).chat.continue_final_message
    with pytest.raises(InvalidRequest, match="can't be continued"):
        parsed(input=[USER, {**THOUGHTS, "status": status}])


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"input": []}, "input"),
        ({"input": 5}, "input"),
        ({"input": [5]}, "input[0]"),
        ({"input": [USER, {"role": "robot", "content": "x"}]}, "input[1].role"),
        ({"input": [USER, {"role": "user"}]}, "input[1].content"),
        ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input[0].content"),
        ({"input": [{**USER, "extra": 1}]}, "input[0].extra"),
        ({"input": [USER, {"type": "web_search_call"}]}, "input[1].type"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type"),
        ({"input": [{**THOUGHTS, "encrypted_content": "x"}]}, "input[0].encrypted_content"),
        ({"input": [USER, {**CALL, "call_id": ""}]}, "input[1].call_id"),
        ({"input": [USER, {**CALL, "namespace": "n"}]}, "input[1].namespace"),
        ({"input": [USER, said("x"), CALL | {"arguments": '{"a": 1e999}'}]}, "input[2]"),
        ({"input": [USER, CALL, RESULT | {"output": [{"type": "input_file"}]}]}, "input[2].output"),
        ({"instructions": "x", "input": [{"role": "user", "content": [5]}]}, "input[0].content"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"messages": [USER]}, "messages"),
        ({"n": 2}, "n"),
        ({"temperature": 3}, "temperature"),
        ({"metadata": {"a": 1}}, "metadata.a"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_object", "name": "x"}}}, "text.format.name"),
        ({"text": {"format": {"type": "json_schema", "name": "a b", "schema": {}}}}, "text.format.name"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"reasoning": {"effort": "some"}}, "reasoning.effort"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
        ({"tools": [{"type": "function", "name": "f", "defer_loading": True}]}, "tools[0].defer_loading"),
        ({"tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": []}}, "tool_choice"),
        ({"tool_choice": {"type": "function"}}, "tool_choice.name"),
        ({"include": ["everything"]}, "include[0]"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_obfuscation": False}}, "stream_options"),
        ({"truncation": "some"}, "truncation"),
    ],
)
def test_errors_name_the_clients_parameter(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed(**body)
    assert caught.value.param == param
    assert not {"response_format", "reasoning_effort"} & set(str(caught.value).split())


@pytest.mark.parametrize("name", sorted(RESPONSES_PARAMETERS.unsupported))
def test_what_is_refused_is_named(name: str) -> None:
    for neutral in (None, *RESPONSES_PARAMETERS.unsupported[name]):
        assert parsed(**{name: neutral}) == parsed()
    for value in ({"a": 1}, "something", 3, [5], True):
        with pytest.raises(InvalidRequest, match=f"'{name}'") as caught:
            parsed(**{name: value})
        assert caught.value.param == name


def test_refusals_say_what_to_do() -> None:
    for name in ("previous_response_id", "conversation", "background"):
        with pytest.raises(InvalidRequest, match="aren't stored"):
            parsed(**{name: "x"})


@pytest.mark.parametrize("name", sorted(RESPONSES_PARAMETERS.accepted))
def test_what_is_accepted_has_no_effect(name: str) -> None:
    for value in (0, True, "x", {"a": [1]}):
        assert parsed(**{name: value}) == parsed()
