"""Bodies of Anthropic's API become chats: blocks, tools and forms, and errors with the client's own names."""

from __future__ import annotations

from typing import Any

import pytest

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.anthropic import MESSAGES_PARAMETERS, CountTokensBody, MessagesBody
from preft.gateway.bodies.parse import parse_body
from preft.gateway.bodies.schemas import ChatBody

USER = {"role": "user", "content": "hi"}
USE = {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": [1, "é"]}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": [{"type": "text", "text": "found"}]}
REDACTED = {"type": "redacted_thinking", "data": "x"}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def parsed(**body: Any) -> MessagesBody:
    return parse_body(MessagesBody, {"model": "base", "messages": [USER], "max_tokens": 5, **body})


def same(body: MessagesBody, **chat: Any) -> None:
    expected = parse_body(ChatBody, {"model": "base", "max_tokens": 5, **chat})
    assert dict(body.chat) == dict(expected)


def text(value: str, **more: Any) -> dict[str, Any]:
    return {"type": "text", "text": value, **more}


def test_messages_and_sampling() -> None:
    same(parsed(), messages=[USER])
    given = {"temperature": 0.5, "top_p": 0.9, "top_k": 4, "cache_salt": "s"}
    same(parsed(**given, stop_sequences=["a", "b"]), messages=[USER], **given, stop=["a", "b"])


def test_the_system_prompt_is_one_message_without_claude_codes_header() -> None:
    system = [text("x-anthropic-billing-header: cc_version=1"), text("be "), text("brief", cache_control={"type": "e"})]
    same(parsed(system=system), messages=[{"role": "system", "content": "be brief"}, USER])
    same(parsed(system="be brief"), messages=[{"role": "system", "content": "be brief"}, USER])


def test_blocks() -> None:
    thinking = {"type": "thinking", "thinking": "hm", "signature": "s"}
    messages = [
        {"role": "user", "content": [text("a"), text("b")]},
        {"role": "assistant", "content": [thinking, text("I look"), USE]},
        {"role": "user", "content": [RESULT, {**RESULT, "content": "again", "is_error": True}, text("and?")]},
    ]
    call = {"id": "t1", "type": "function", "function": {"name": "look", "arguments": '{"a": [1, "é"]}'}}
    same(
        parsed(messages=messages),
        messages=[
            {"role": "user", "content": [text("a"), text("b")]},
            {"role": "assistant", "content": "I look", "reasoning": "hm", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "t1", "content": "found"},
            {"role": "tool", "tool_call_id": "t1", "content": "again"},
            {"role": "user", "content": "and?"},
        ],
    )


def test_an_assistants_last_message_is_continued() -> None:
    messages = [USER, {"role": "assistant", "content": "The"}]
    same(parsed(messages=messages), messages=messages, continue_final_message=True, add_generation_prompt=False)


def test_forms_and_thinking() -> None:
    config = {"format": {"type": "json_schema", "schema": SCHEMA}, "effort": "low"}
    wanted = {"type": "json_schema", "json_schema": {"name": "json_schema", "schema": SCHEMA}}
    same(parsed(output_config=config), messages=[USER], response_format=wanted, reasoning_effort="low")
    same(parsed(thinking={"type": "disabled"}), messages=[USER], reasoning_effort="none")
    both = {"thinking": {"type": "disabled"}, "output_config": {"effort": "high"}}
    same(parsed(**both), messages=[USER], reasoning_effort="none")
    same(parsed(thinking={"type": "adaptive"}), messages=[USER])


def test_tools() -> None:
    tool = {"name": "look", "description": "looks", "input_schema": {"properties": {}}, "cache_control": {"type": "e"}}
    function = {"name": "look", "description": "looks", "parameters": {"type": "object", "properties": {}}}
    chosen = {"type": "none"}
    same(
        parsed(tools=[tool], tool_choice=chosen),
        messages=[USER],
        tools=[{"type": "function", "function": function}],
        tool_choice="none",
    )


def test_counting_takes_the_same_body_without_limits() -> None:
    body = parse_body(CountTokensBody, {"model": "base", "messages": [USER], "system": "be brief"})
    assert [message.role for message in body.chat.messages] == ["system", "user"]
    with pytest.raises(InvalidRequest) as caught:
        parse_body(CountTokensBody, {"model": "base", "messages": [USER], "max_tokens": 5})
    assert caught.value.param == "max_tokens"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [5]}, "messages[0]"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [USER, {"role": "user", "content": [text("a"), 5]}]}, "messages[1].content[1]"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [USE]}]}, "messages[0].content[0].type"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [text("a"), RESULT]}]}, "messages[0].content[1]"),
        (
            {"messages": [{"role": "user", "content": [{**RESULT, "content": [{"type": "image"}]}]}]},
            "messages[0].content[0].content[0].type",
        ),
        ({"messages": [{"role": "assistant", "content": [REDACTED]}]}, "messages[0].content[0].type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": None}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"stop_sequences": [""]}, "stop_sequences[0]"),
        ({"stop_sequences": ["a"] * 17}, "stop_sequences"),
        ({"system": 5}, "system"),
        ({"system": [{"type": "image"}]}, "system[0].type"),
        ({"tools": [{"type": "bash_20250124", "name": "bash"}]}, "tools[0].type"),
        ({"tools": [{"name": "f"}]}, "tools[0].input_schema"),
        ({"tool_choice": {"type": "tool"}}, "tool_choice.name"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type"),
        ({"thinking": {"type": "enabled", "budget_tokens": 2000}}, "thinking.type"),
        ({"output_config": {"effort": "some"}}, "output_config.effort"),
        ({"n": 2}, "n"),
        ({"metadate": {}}, "metadate"),
    ],
)  # fmt: skip
def test_errors_name_the_clients_parameter(body: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        parsed(**body)
    assert caught.value.param == param


@pytest.mark.parametrize("name", sorted(MESSAGES_PARAMETERS.unsupported))
def test_what_is_refused_is_named(name: str) -> None:
    for neutral in (None, *MESSAGES_PARAMETERS.unsupported[name]):
        assert parsed(**{name: neutral}) == parsed()
    for value in ({"a": 1}, "something", 3, [5], True):
        with pytest.raises(InvalidRequest, match=f"'{name}'") as caught:
            parsed(**{name: value})
        assert caught.value.param == name


@pytest.mark.parametrize("name", sorted(MESSAGES_PARAMETERS.accepted))
def test_what_is_accepted_has_no_effect(name: str) -> None:
    for value in (0, True, "x", {"a": [1]}):
        assert parsed(**{name: value}) == parsed()
