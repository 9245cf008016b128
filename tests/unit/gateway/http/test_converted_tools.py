"""Tools and reasoning in responses and Anthropic messages: streamed and whole, and an agent's loop with each client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, cast

import anthropic
import openai
import pydantic
import pytest

from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from preft.gateway.text.parsing import CallTag
from preft.gateway.text.tokenizer import Tokenizer
from support.fake_parsers import FakeParsers
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.served_app import served_in_thread
from support.small_tokenizers import byte_level

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.reasoning }}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.id }}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}{% endfor %}"
    "{{ tools }}{{ enable_thinking }}"
)
LOOK: Any = {"type": "function", "name": "look", "parameters": {"type": "object"}, "strict": None}
ADD: Any = {"type": "function", "name": "add", "parameters": {"type": "object"}, "strict": None}
CLAUDES: Any = [{"name": tool["name"], "input_schema": tool["parameters"]} for tool in (LOOK, ADD)]
USER: Any = [{"role": "user", "content": "hi"}]
CALLS = '(hm)so@look;{"a":1};@add;{};'
REQUIRED = '[{"name": "look", "parameters": {"a": 1}}, {"name": "add", "parameters": {}}]'


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("tools"), chat_template=TEMPLATE))


@contextmanager
def served(tokenizer: Tokenizer, parsers: FakeParsers | None) -> Iterator[SimpleNamespace]:
    """A server, and a client of each vendor. `texts` are the answers to the next requests; the last one stays."""
    state = SimpleNamespace(texts=[], tokenizer=tokenizer, parsers=parsers)

    def script(_: Any) -> Script:
        text = state.texts.pop(0) if len(state.texts) > 1 else state.texts[0]
        backend = tokenizer._backend
        return Script((*(backend.token_to_id(char) for char in text.replace(" ", "Ġ")), tokenizer.eos_token_ids[0]))

    state.generator = FakeGenerator(script)
    deps = GatewayDeps("base", tokenizer, 4096, state.generator, FakeCatalog.of(ann="/a"), parsers=parsers)
    with served_in_thread(create_app(deps)) as port:
        url = f"http://127.0.0.1:{port}"
        with (
            openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as state.openai,
            anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as state.anthropic,
        ):
            yield state


@pytest.fixture(scope="module")
def parsed(tokenizer: Tokenizer) -> Iterator[SimpleNamespace]:
    with served(tokenizer, FakeParsers()) as state:
        yield state


@pytest.fixture(scope="module")
def plain(tokenizer: Tokenizer) -> Iterator[SimpleNamespace]:
    with served(tokenizer, None) as state:
        yield state


@pytest.fixture(params=["parsed", "plain"])
def each(request: pytest.FixtureRequest) -> SimpleNamespace:
    return cast(SimpleNamespace, request.getfixturevalue(request.param))


def items_of(response: Any) -> list[tuple[Any, ...]]:
    return [
        (item.type, item.name, item.arguments)
        if item.type == "function_call"
        else (item.type, "".join(part.text for part in item.content))
        for item in response.output
    ]


def blocks_of(message: Any) -> list[tuple[Any, ...]]:
    shown = {"thinking": ("thinking",), "text": ("text",), "tool_use": ("name", "input")}
    return [(block.type, *(getattr(block, name) for name in shown[block.type])) for block in message.content]


def test_a_response_with_reasoning_and_calls(parsed: SimpleNamespace) -> None:
    parsed.texts = [CALLS]
    asked: Any = {"model": "ann", "input": "hi", "tools": [LOOK, ADD]}
    whole = parsed.openai.responses.create(**asked)
    assert items_of(whole) == [
        ("reasoning", "hm"), ("message", "so"), ("function_call", "look", '{"a":1}'), ("function_call", "add", "{}"),
    ]  # fmt: skip
    assert [item.call_id for item in whole.output[2:]] == ["id-1", "id-2"]
    assert whole.usage.output_tokens_details.reasoning_tokens == 2
    assert whole.status == "completed"
    with parsed.openai.responses.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_response()
    assert items_of(final) == items_of(whole)
    assert final.usage == whole.usage
    assert {"response.reasoning_text.delta", "response.function_call_arguments.delta"} < kinds
    single = parsed.openai.responses.create(**asked, parallel_tool_calls=False)
    assert [item[0] for item in items_of(single)] == ["reasoning", "message", "function_call"]


def test_a_message_with_thinking_and_tool_uses(parsed: SimpleNamespace) -> None:
    parsed.texts = [CALLS]
    asked: Any = {"model": "ann", "messages": USER, "tools": CLAUDES, "max_tokens": 100}
    whole = parsed.anthropic.messages.create(**asked)
    assert blocks_of(whole) == [
        ("thinking", "hm"), ("text", "so"), ("tool_use", "look", {"a": 1}), ("tool_use", "add", {}),
    ]  # fmt: skip
    assert (whole.stop_reason, [block.id for block in whole.content[2:]]) == ("tool_use", ["id-1", "id-2"])
    with parsed.anthropic.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert (blocks_of(final), final.stop_reason, final.usage) == (blocks_of(whole), "tool_use", whole.usage)
    alone: Any = {"type": "auto", "disable_parallel_tool_use": True}
    single = parsed.anthropic.messages.create(**asked, tool_choice=alone)
    assert [block[0] for block in blocks_of(single)] == ["thinking", "text", "tool_use"]


def test_forced_calls(each: SimpleNamespace) -> None:
    """They need no parser. A named call is the arguments alone."""
    thoughts = "" if each.parsers is None else "(hm)"
    each.texts = [thoughts + REQUIRED]
    expected = [("function_call", "look", '{"a": 1}'), ("function_call", "add", "{}")]
    asked: Any = {"model": "ann", "input": "hi", "tools": [LOOK, ADD]}
    reply = each.openai.responses.create(**asked, tool_choice="required")
    assert items_of(reply)[-2:] == expected
    with each.openai.responses.stream(**asked, tool_choice="required") as stream:
        assert items_of(stream.get_final_response())[-2:] == expected
    form = json.loads(each.generator.requests[-1].sampling.structured_outputs.json)
    assert (form["type"], len(form["items"]["anyOf"])) == ("array", 2)
    claude: Any = {"model": "ann", "messages": USER, "tools": CLAUDES, "max_tokens": 100}
    message = each.anthropic.messages.create(**claude, tool_choice={"type": "any"})
    assert blocks_of(message)[-2:] == [("tool_use", "look", {"a": 1}), ("tool_use", "add", {})]
    each.texts = [thoughts + '{"a": 2}']
    reply = each.openai.responses.create(**asked, tool_choice={"type": "function", "name": "look"})
    assert (items_of(reply)[-1], reply.tool_choice.name) == (("function_call", "look", '{"a": 2}'), "look")
    with each.anthropic.messages.stream(**claude, tool_choice={"type": "tool", "name": "look"}) as events:
        message = events.get_final_message()
    assert (blocks_of(message)[-1], message.stop_reason) == (("tool_use", "look", {"a": 2}), "tool_use")


class Answer(pydantic.BaseModel):
    b: str


def test_tools_and_a_form_with_each_client(tokenizer: Tokenizer) -> None:
    """The clients' `parse` with tools: a call leaves nothing to parse, and other answers have the form."""
    tag = CallTag("look", "<call>look=", {"type": "object"}, "</call>")
    call, content = '<call>look={"a":1}</call>', '{"b": "@look;"}'
    strict = {**LOOK, "strict": True, "parameters": Answer.model_json_schema() | {"additionalProperties": False}}
    function = {key: value for key, value in strict.items() if key != "type"}
    chat: Any = {"model": "ann", "messages": USER, "tools": [{"type": "function", "function": function}]}
    claude: Any = {"model": "ann", "messages": USER, "max_tokens": 100, "tools": CLAUDES[:1]}
    claude["output_config"] = {"format": {"type": "json_schema", "schema": Answer.model_json_schema()}}
    with served(tokenizer, FakeParsers(call_tags=(tag,))) as each:
        each.texts = [f"(hm){content}"]
        assert (
            each.openai.chat.completions.parse(**chat, response_format=Answer).choices[0].message.parsed.b == "@look;"
        )
        reply = each.openai.responses.parse(model="ann", input="hi", tools=[strict], text_format=Answer)
        assert reply.output_parsed == Answer(b="@look;")
        assert blocks_of(each.anthropic.messages.create(**claude)) == [("thinking", "hm"), ("text", content)]
        form = json.loads(each.generator.requests[-1].sampling.structured_outputs.structural_tag)
        assert json.loads(form["form"]["json"]) == Answer.model_json_schema()
        each.texts = [f"(hm){call}"]
        [choice] = each.openai.chat.completions.parse(**chat, response_format=Answer).choices
        assert (choice.message.parsed, choice.finish_reason) == (None, "tool_calls")
        assert choice.message.tool_calls[0].function.arguments == '{"a":1}'
        with each.openai.responses.stream(model="ann", input="hi", tools=[strict], text_format=Answer) as stream:
            assert items_of(stream.get_final_response())[1:] == [("function_call", "look", '{"a":1}')]
        with each.anthropic.messages.stream(**claude) as stream:
            message = stream.get_final_message()
        assert (blocks_of(message)[1:], message.stop_reason) == ([("tool_use", "look", {"a": 1})], "tool_use")


def test_refusals_name_the_clients_parameter(each: SimpleNamespace) -> None:
    asked: Any = {"model": "ann", "input": "hi"}
    refusals: list[tuple[dict[str, Any], str]] = [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [LOOK], "tool_choice": {"type": "function", "name": "add"}}, "tool_choice"),
    ]
    if each.parsers is None:
        refusals.append(({"tools": [LOOK]}, "tool_choice"))
    else:
        refusals.append(({"tools": [LOOK], "text": {"format": {"type": "json_object"}}}, "text.format"))
    for more, param in refusals:
        with pytest.raises(openai.BadRequestError) as bad:
            each.openai.responses.create(**asked, **more)
        assert bad.value.param == param
    claude: Any = {"model": "ann", "messages": USER, "max_tokens": 100}
    with pytest.raises(anthropic.BadRequestError, match="tool_choice"):
        each.anthropic.messages.create(**claude, tool_choice={"type": "any"})
    counted = each.anthropic.messages.count_tokens(model="ann", messages=USER, tools=CLAUDES)
    assert counted.input_tokens > each.anthropic.messages.count_tokens(model="ann", messages=USER).input_tokens


def prompt_of(each: SimpleNamespace) -> str:
    """The prompt of the last request."""
    return str(each.tokenizer.decode(each.generator.requests[-1].prompt_token_ids, skip_special_tokens=False))


def test_an_agent_with_openais_client(parsed: SimpleNamespace) -> None:
    """Two rounds of calls: each call, its result and the reasoning before it are in the next prompt."""
    parsed.texts = ['(first)@look;{"a":1};', '(then)@add;{"b":2};', "done"]
    items: Any = list(USER)
    for turn in range(3):
        reply = parsed.openai.responses.create(model="ann", input=items, tools=[LOOK, ADD])
        items += reply.output
        for call in reply.output:
            if call.type == "function_call":
                items.append({"type": "function_call_output", "call_id": call.call_id, "output": f"found {turn}"})
    assert reply.output_text == "done"
    prompt = prompt_of(parsed)
    expected = ("first", 'look{"a": 1}', "found 0", "then", 'add{"b": 2}', "found 1")
    assert sorted(expected, key=prompt.index) == list(expected)


def test_an_agent_with_anthropics_client(parsed: SimpleNamespace) -> None:
    parsed.texts = ['(first)@look;{"a":1};', '(then)@add;{"b":2};', "done"]
    messages: Any = list(USER)
    for turn in range(3):
        reply = parsed.anthropic.messages.create(model="ann", max_tokens=100, messages=messages, tools=CLAUDES)
        messages.append({"role": "assistant", "content": reply.content})
        results = [
            {"type": "tool_result", "tool_use_id": block.id, "content": f"found {turn}"}
            for block in reply.content
            if block.type == "tool_use"
        ]
        messages.append({"role": "user", "content": results})
    assert (reply.content[0].text, reply.stop_reason) == ("done", "end_turn")
    prompt = prompt_of(parsed)
    expected = ("first", 'look{"a": 1}', "found 0", "then", 'add{"b": 2}', "found 1")
    assert sorted(expected, key=prompt.index) == list(expected)
