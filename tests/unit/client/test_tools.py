"""Tools and reasoning in chats, over both transports and in both styles: the same typed results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from preft_client import BadReply, InvalidRequest, ToolCall
from support.sdk_clients import a_client
from support.sdk_gateway import ScriptedGateway

LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ADD = {"type": "function", "function": {"name": "add"}}
CHAT = [{"role": "user", "content": "hi"}]
CALLS = (ToolCall("id-1", "look", '{"at": [1, 2]}'), ToolCall("id-2", "add", ""))


@pytest.fixture
def gateway(parsing_gateway: ScriptedGateway) -> ScriptedGateway:
    parsing_gateway.reset()
    return parsing_gateway


@pytest.fixture
def client(way: tuple[str, str], gateway: ScriptedGateway) -> Iterator[Any]:
    with a_client(way[1], gateway.urls[way[0]], retries=0) as client:
        yield client


def test_calls_and_reasoning(client: Any, gateway: ScriptedGateway) -> None:
    gateway.say('(let me see)so @look;{"at": [1, 2]};@add;;')
    answer = client.chat(CHAT, model="base", tools=[LOOK, ADD], n=2)
    assert (answer.text, answer.reasoning, answer.finish_reason) == ("so ", "let me see", "tool_calls")
    assert [choice.tool_calls for choice in answer.choices] == [CALLS, CALLS]
    assert [call.read_arguments() for call in answer.tool_calls] == [{"at": [1, 2]}, {}]


def test_the_stream_has_the_parts_of_calls(client: Any, gateway: ScriptedGateway) -> None:
    gateway.say('(hm)@look;{"at": 1};')
    with client.stream_chat(CHAT, model="base", tools=[LOOK], tool_choice="auto") as stream:
        deltas = list(stream)
        whole = stream.generation
    parts = [part for delta in deltas for part in delta.tool_calls]
    assert (parts[0].name, {part.name for part in parts[1:]}) == ("look", {""})
    assert "".join(part.arguments for part in parts) == '{"at": 1}'
    assert "".join(delta.reasoning for delta in deltas) == whole.reasoning == "hm"
    assert whole.tool_calls == (ToolCall("id-1", "look", '{"at": 1}'),)
    assert sum(len(delta.token_ids) for delta in deltas) == len(gateway.scripts[0].tokens)


def test_a_call_that_must_come_and_the_next_turn(client: Any, gateway: ScriptedGateway) -> None:
    gateway.say('[{"name": "look", "parameters": {"at": 3}}]', "seen")
    named = {"tools": [LOOK, ADD], "tool_choice": "required", "parallel_tool_calls": False}
    answer = client.chat(CHAT, model="base", **named)
    [call] = answer.tool_calls
    assert (call.name, call.read_arguments(), answer.text) == ("look", {"at": 3}, "")
    seen = {"role": "tool", "tool_call_id": call.id, "content": "a cat"}
    after = client.chat([*CHAT, answer.message, seen], model="base", tools=[LOOK], tool_choice="none")
    assert (after.text, after.tool_calls, after.finish_reason) == ("seen", (), "stop")
    prompt = gateway.deps.tokenizer.decode(gateway.generator.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert f'{call.id}look{{"at": 3}}' in prompt
    assert f"{call.id}a cat" in prompt


def test_arguments_that_are_cut_off(client: Any, gateway: ScriptedGateway) -> None:
    gateway.say('@look;{"at": [1, 2]};')
    answer = client.chat(CHAT, model="base", tools=[LOOK], max_tokens=9)
    assert answer.finish_reason == "length"
    with pytest.raises(BadReply, match="'look'"):
        answer.tool_calls[0].read_arguments()


def test_tools_belong_to_chats(client: Any) -> None:
    with pytest.raises(InvalidRequest, match="tools"):
        client.generate("hi", model="base", tools=[LOOK])
    with pytest.raises(InvalidRequest, match="tool_choice"):
        client.chat(CHAT, model="base", tools=[LOOK], tool_choice="often")
