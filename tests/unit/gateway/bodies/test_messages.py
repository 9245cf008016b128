from __future__ import annotations

from typing import Any

import pytest
from openai.types.chat import ChatCompletionMessage
from pydantic import ValidationError

from preft.gateway.bodies.messages import Content, Message, Tool

FUNCTION = {"name": "look", "arguments": "{}"}


def message(**fields: Any) -> Message:
    return Message.model_validate(fields)


def refused(**fields: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        message(**fields)
    [first, *_] = caught.value.errors()
    return f"{'.'.join(map(str, first['loc']))}: {first.get('ctx', {}).get('error', first['msg'])}"


@pytest.mark.parametrize(
    "part",
    [
        {"type": "text", "text": "a"},
        {"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}},
        {"type": "text", "text": "a", "annotations": None, "logprobs": None},
        {"type": "text", "text": "a", "annotations": [{"type": "url_citation"}]},
        {"type": "output_text", "text": "a", "annotations": []},
        {"type": "input_text", "text": "a"},
        {"type": "refusal", "refusal": "a"},
        "a",
    ],
)
def test_parts_with_text(part):
    assert message(role="assistant", content=[part]).said == Content(("a",), is_list=True)


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ({"type": "image_url", "image_url": {"url": "data:"}}, "'image_url'"),
        ({"type": "input_audio", "input_audio": {"data": ""}}, "'input_audio'"),
        ({"type": "thinking", "thinking": "hm"}, "'thinking'"),
        ({"type": "text", "text": "a", "image": "x"}, "'image'"),
        ({"type": "text"}, "'text'"),
        ({"type": "text", "text": None}, "'text'"),
        ({"type": "refusal", "text": "a"}, "'refusal'"),
        ({"text": "a"}, "type"),
        ({"type": []}, "type"),
        (5, "type"),
    ],
)
def test_parts_that_are_refused_by_name(part, says):
    found = refused(role="user", content=[{"type": "text", "text": "a"}, part])
    assert found.startswith("content: ")
    assert says in found


def test_what_clients_copy_from_replies_is_accepted():
    copied = {
        "id": "msg_1", "annotations": [], "audio": None, "function_call": None, "refusal": None, "tool_calls": [],
        "reasoning": None, "reasoning_content": "hm", "parsed": {"a": 1}, "metadata": {}, "status": "completed",
        "provider_specific_fields": {"x": 1}, "cache_control": {"type": "ephemeral"}, "name": "bot",
    }  # fmt: skip
    found = message(role="assistant", content="hi", **copied)
    assert (found.said.texts, found.thoughts, found.name) == (("hi",), "hm", "bot")
    assert message(role="user", content="hi", id="1", tool_calls=None, tool_call_id=None).name is None


@pytest.mark.parametrize("content", ["hi", None])
def test_a_reply_of_the_openai_client_as_history(content):
    calls = [{"id": "1", "type": "function", "function": FUNCTION}]
    reply = ChatCompletionMessage.model_validate({"role": "assistant", "content": content, "tool_calls": calls})
    [call] = Message.model_validate(reply.model_dump()).tool_calls
    assert call.name == "look"


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}, {"content": ""}])
@pytest.mark.parametrize("role", ["assistant", "tool"])
def test_an_assistant_or_a_tool_may_say_nothing(role, content):
    assert not any(message(role=role, **content).said.texts)


@pytest.mark.parametrize("content", [{}, {"content": None}, {"content": []}])
@pytest.mark.parametrize("role", ["user", "system", "developer"])
def test_others_need_content(role, content):
    assert refused(role=role, **content).startswith("content: ")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"role": "function", "content": "x"}, "role"),
        ({"role": "assistant", "content": "x", "function_call": {"name": "f"}}, "function_call"),
        ({"role": "assistant", "content": "x", "audio": {"id": "1"}}, "audio"),
        ({"role": "assistant", "content": "x", "prefix": True}, "prefix"),
        ({"role": "user", "content": "x", "reasoning": "hm"}, "reasoning"),
        ({"role": "user", "content": "x", "tool_calls": [{"function": FUNCTION}]}, "tool_calls"),
        ({"role": "user", "content": "x", "tool_call_id": "1"}, "tool_call_id"),
        ({"role": "tool", "content": "x", "refusal": "no"}, "refusal"),
        ({"role": "user", "content": "x", "name": 5}, "name"),
        ({"role": "assistant", "tool_calls": {"function": FUNCTION}}, "tool_calls"),
        ({"role": "assistant", "tool_calls": ["look"]}, "tool_calls.0"),
        ({"role": "assistant", "tool_calls": [{"type": "custom", "custom": {}}]}, "tool_calls.0"),
        ({"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]}, "tool_calls.0"),
        ({"role": "assistant", "tool_calls": [{"function": {**FUNCTION, "result": 1}}]}, "'result'"),
        ({"role": "assistant", "tool_calls": [{"function": FUNCTION, "result": 1}]}, "'result'"),
        ({"role": "assistant", "tool_calls": [{"function": FUNCTION, "id": 1}]}, "id"),
        ({"role": "assistant", "tool_calls": [{"function": {**FUNCTION, "arguments": "[-1e999]"}}]}, "arguments[0]"),
    ],
)
def test_what_would_change_the_answer_is_refused_by_name(fields, says):
    assert says in refused(**fields)


def test_a_refusal_is_text():
    assert message(role="assistant", content=None, refusal="No.").said == Content(("No.",))
    assert message(role="assistant", content="Hm.", refusal="No.").said == Content(("Hm.", "No."), is_list=True)


@pytest.mark.parametrize(
    ("arguments", "parsed", "text"),
    [
        ('{"a":  1}', {"a": 1}, '{"a":  1}'),
        ({"a": "é"}, {"a": "é"}, '{"a": "é"}'),
        (None, {}, "{}"),
        (" ", {}, "{}"),
        ("{oops", "{oops", "{oops"),
        ('{"a": NaN}', '{"a": NaN}', '{"a": NaN}'),
        ('{"a": 1e308}', {"a": 1e308}, '{"a": 1e308}'),
        ('{"a": "\\ud800"}', '{"a": "\\ud800"}', '{"a": "\\ud800"}'),
        ("[" * 10_000, "[" * 10_000, "[" * 10_000),
        ("[1]", [1], "[1]"),
    ],
)
def test_arguments_of_calls(arguments, parsed, text):
    function = {"name": "look", "arguments": arguments}
    given = {"index": 0, "id": "1", "type": "function", "function": function, "provider_specific_fields": {}}
    [call] = message(role="assistant", tool_calls=[given]).tool_calls
    assert call.fields == {"id": "1", "type": "function", "function": {"name": "look", "arguments": parsed}}
    assert (call.name, call.arguments) == ("look", text)


def test_fields_of_calls_keep_the_clients_order():
    for function in ({"name": "f", "arguments": "{}"}, {"arguments": "{}", "name": "f"}):
        [call] = message(role="assistant", tool_calls=[{"function": function}]).tool_calls
        assert list(call.fields["function"]) == list(function)
    [call] = message(role="assistant", tool_calls=[{"function": {"name": "f"}}]).tool_calls
    assert call.fields == {"type": "function", "function": {"name": "f", "arguments": {}}}


def test_tools_look_as_in_vllm():
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    full = {"type": "function", "function": {"name": "f", "description": "d", "parameters": schema, "strict": True}}
    assert Tool.model_validate(full).fields() == full
    bare = Tool.model_validate({"function": {"name": "f"}})
    assert bare.fields() == {"type": "function", "function": {"name": "f", "description": None, "parameters": None}}
    for tool in ({"type": "web_search"}, {"type": "function", "function": {}}, {"function": {"name": "f", "x": 1}}):
        with pytest.raises(ValidationError):
            Tool.model_validate(tool)
