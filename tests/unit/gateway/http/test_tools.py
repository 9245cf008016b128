"""Tools and reasoning in chats, over HTTP and gRPC, with parsers of an invented form."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from preft.core.request import FinishReason
from preft.gateway.deps import GatewayDeps
from preft.gateway.grpc.server import serve_grpc
from preft.gateway.http.app import create_app
from preft.gateway.text.parsing import CallTag
from preft.gateway.text.tokenizer import Tokenizer
from preft.rpc import common_pb2, inference_pb2, inference_pb2_grpc
from support.fake_parsers import FakeParsers
from support.fakes import FakeCatalog, FakeGenerator, Script

LOOK = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
ADD = {"type": "function", "function": {"name": "add"}}
NAMED = {"type": "function", "function": {"name": "look"}}
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ c.id }}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}{{ m.tool_call_id }}{% endfor %}"
    "{{ tools }}{{ enable_thinking }}"
)


class Served:
    """The app over a fake generator that says `text`, one token per character."""

    def __init__(self, tokenizer: Tokenizer, parsers: FakeParsers | None, text: str = "", **script: Any) -> None:
        self.tokenizer, self.parsers = tokenizer, parsers
        self.say(text, **script)
        self.generator = FakeGenerator(lambda request: self.script)
        self.deps = GatewayDeps("base", tokenizer, 4096, self.generator, FakeCatalog.of(ann="/a"), parsers=parsers)
        transport = httpx.ASGITransport(create_app(self.deps), raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def say(self, text: str, **script: Any) -> None:
        """From now on. The last token is the end of the sequence, unless the script has another finish reason."""
        backend = self.tokenizer._backend
        tokens = [backend.token_to_id(char) for char in text.replace(" ", "Ġ").replace("\n", "Ċ")]
        ending = [] if script.get("finish") is FinishReason.LENGTH else [self.tokenizer.eos_token_ids[0]]
        self.script = Script((*tokens, *ending), **script)

    async def post(self, **body: Any) -> httpx.Response:
        body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "tools": [LOOK, ADD], **body}
        return await self.client.post("/v1/chat/completions", json=body)

    async def whole(self, **body: Any) -> dict[str, Any]:
        response = await self.post(**body)
        assert response.status_code == 200, response.text
        ChatCompletion.model_validate(response.json(), strict=False)
        return dict(response.json())

    async def stream(self, **body: Any) -> list[dict[str, Any]]:
        response = await self.post(stream=True, **body)
        assert response.status_code == 200, response.text
        parts = response.text.split("\n\n")
        assert parts[-2:] == ["data: [DONE]", ""]
        chunks = [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]
        for chunk in chunks:
            ChatCompletionChunk.model_validate(chunk, strict=False)
        return chunks

    async def refused(self, **body: Any) -> dict[str, Any]:
        response = await self.post(**body)
        assert response.status_code == 400, response.text
        return dict(response.json()["error"])


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    from support.small_tokenizers import byte_level

    return Tokenizer.load(byte_level(tmp_path_factory.mktemp("tools"), chat_template=TEMPLATE))


@pytest.fixture
async def plain(tokenizer: Tokenizer) -> AsyncIterator[Served]:
    served = Served(tokenizer, None)
    async with served.client:
        yield served


@pytest.fixture
async def parsed(tokenizer: Tokenizer) -> AsyncIterator[Served]:
    served = Served(tokenizer, FakeParsers(), '(hm)so@look;{"a":1};@add;{};')
    async with served.client:
        yield served


def joined(chunks: list[dict[str, Any]]) -> dict[str, Any]:
    """A stream's message, put together as clients do."""
    message: dict[str, Any] = {"content": "", "reasoning": "", "tool_calls": []}
    for delta in (choice["delta"] for chunk in chunks for choice in chunk["choices"]):
        assert delta.keys() <= {"role", "content", "reasoning", "tool_calls"}
        message["content"] += delta.get("content", "")
        message["reasoning"] += delta.get("reasoning", "")
        for call in delta.get("tool_calls", ()):
            if call["index"] == len(message["tool_calls"]):
                assert call["type"] == "function"
                function = {"name": call["function"]["name"], "arguments": ""}
                message["tool_calls"].append({"id": call["id"], "type": "function", "function": function})
            else:
                assert call.keys() == {"index", "function"}
                assert call["function"].keys() == {"arguments"}
            message["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return message


CALLS = [
    {"id": "id-1", "type": "function", "function": {"name": "look", "arguments": '{"a":1}'}},
    {"id": "id-2", "type": "function", "function": {"name": "add", "arguments": "{}"}},
]


async def test_a_whole_answer_with_reasoning_and_calls(parsed):
    body = await parsed.whole()
    [choice] = body["choices"]
    assert choice["message"] == {
        "role": "assistant", "content": "so", "refusal": None, "reasoning": "hm", "tool_calls": CALLS,
    }  # fmt: skip
    assert (choice["finish_reason"], choice["stop_reason"]) == ("tool_calls", None)
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert body["usage"]["completion_tokens"] == len(parsed.script.tokens)


async def test_a_stream_with_reasoning_and_calls(parsed):
    *chunks, usage = await parsed.stream(stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert joined(chunks) == {"content": "so", "reasoning": "hm", "tool_calls": CALLS}
    assert [c["choices"][0]["finish_reason"] for c in chunks] == [None] * (len(chunks) - 1) + ["tool_calls"]
    assert usage["usage"]["completion_tokens_details"] == {"reasoning_tokens": 2}
    assert usage["usage"]["completion_tokens"] == len(parsed.script.tokens)


async def test_only_calls_have_no_content(parsed):
    parsed.say("@add;{};")
    assert (await parsed.whole())["choices"][0]["message"]["content"] is None
    assert all(
        "content" not in chunk["choices"][0]["delta"] or chunk["choices"][0]["delta"]["content"] == ""
        for chunk in await parsed.stream()
    )


async def test_every_choice_has_its_own_parser(parsed):
    body = await parsed.whole(n=3)
    assert [choice["message"]["tool_calls"] for choice in body["choices"]] == [CALLS] * 3
    assert body["usage"]["completion_tokens_details"] == {"reasoning_tokens": 6}
    chunks = await parsed.stream(n=3)
    for index in range(3):
        own = [chunk for chunk in chunks if chunk["choices"][0]["index"] == index]
        assert joined(own)["tool_calls"] == CALLS


async def test_log_probabilities_and_token_ids_cover_all_tokens(parsed):
    count = len(parsed.script.tokens)
    fields = {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    [choice] = (await parsed.whole(**fields))["choices"]
    assert len(choice["logprobs"]["content"]) == len(choice["token_ids"]) == count
    chunks = [chunk["choices"][0] for chunk in await parsed.stream(**fields)][1:]
    assert sum(len(chunk["logprobs"]["content"]) for chunk in chunks) == count
    assert tuple(token for chunk in chunks for token in chunk["token_ids"]) == parsed.script.tokens


async def test_what_the_parsers_are_asked(parsed):
    history = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "tool_calls": CALLS},
        *({"role": "tool", "tool_call_id": call["id"], "content": "1"} for call in CALLS),
    ]
    await parsed.whole(messages=history, parallel_tool_calls=False, reasoning_effort="none")
    asked = parsed.parsers.asked[-1]
    assert [tool["function"]["name"] for tool in asked.tools] == ["look", "add"]
    assert (asked.may_call, asked.parallel) == (True, False)
    assert asked.variables == {"reasoning_effort": "none", "enable_thinking": False}
    assert [len(message["tool_calls"]) for message in asked.messages] == [2]
    await parsed.whole(tool_choice="none")
    assert not parsed.parsers.asked[-1].may_call


async def test_without_parallel_calls_there_is_one(parsed):
    assert (await parsed.whole(parallel_tool_calls=False))["choices"][0]["message"]["tool_calls"] == CALLS[:1]
    assert joined(await parsed.stream(parallel_tool_calls=False))["tool_calls"] == CALLS[:1]


async def test_special_tokens_stay_for_parsers_that_need_them(parsed):
    eot = parsed.tokenizer._backend.token_to_id("<|eot|>")
    parsed.script = Script((eot,), finish=FinishReason.LENGTH)
    assert (await parsed.whole())["choices"][0]["message"]["content"] == "<|eot|>"
    assert (await parsed.whole(tools=None))["choices"][0]["message"]["content"] == ""


async def test_a_parser_that_fails_in_a_stream_is_one_clear_error(parsed, monkeypatch):
    def fail(*args: Any, **more: Any) -> None:
        raise KeyError("/srv/secret")

    monkeypatch.setattr("support.fake_parsers.FakeParser.push", fail)
    response = await parsed.post(stream=True)
    assert response.status_code == 500
    assert "parser" in response.json()["error"]["message"]
    assert "secret" not in response.text
    [choice] = (await parsed.whole())["choices"]
    assert choice["message"]["content"] == '(hm)so@look;{"a":1};@add;{};'
    assert choice["finish_reason"] == "stop"


async def test_auto_needs_a_parser_and_names_the_setting(plain):
    error = await plain.refused()
    assert (error["param"], "tool_call_parser" in error["message"]) == ("tools", True)
    assert (await plain.refused(tool_choice="auto"))["param"] == "tool_choice"
    plain.say("(hm)")
    assert (await plain.whole(tool_choice="none"))["choices"][0]["message"]["content"] == "(hm)"


REQUIRED = '[{"name": "look", "parameters": {"a": 1}}, {"name": "add", "parameters": {}}]'


async def test_required_calls_need_no_parser(plain):
    plain.say(REQUIRED)
    [choice] = (await plain.whole(tool_choice="required"))["choices"]
    message = choice["message"]
    assert (message["content"], choice["finish_reason"]) == (None, "tool_calls")
    assert [call["function"] for call in message["tool_calls"]] == [
        {"name": "look", "arguments": '{"a": 1}'},
        {"name": "add", "arguments": "{}"},
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    chunks = await plain.stream(tool_choice="required")
    assert [c["function"] for c in joined(chunks)["tool_calls"]] == [c["function"] for c in message["tool_calls"]]
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    form = plain.generator.requests[-1].sampling.structured_outputs
    assert json.loads(form.json)["type"] == "array"
    assert form.begins_after is None


async def test_a_named_call_ends_with_stop(plain):
    plain.say('{"a": 1}')
    [choice] = (await plain.whole(tool_choice=NAMED))["choices"]
    [call] = choice["message"]["tool_calls"]
    assert (call["function"], choice["finish_reason"]) == ({"name": "look", "arguments": '{"a": 1}'}, "stop")
    chunks = await plain.stream(tool_choice=NAMED)
    assert [call["function"] for call in joined(chunks)["tool_calls"]] == [{"name": "look", "arguments": '{"a": 1}'}]
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


async def test_a_required_call_cut_off_keeps_what_there_is(plain):
    plain.say(REQUIRED[:36], finish=FinishReason.LENGTH)
    for message, finish in [
        ((body := await plain.whole(tool_choice="required"))["choices"][0]["message"], body["choices"][0]),
        (joined(chunks := await plain.stream(tool_choice="required")), chunks[-1]["choices"][0]),
    ]:
        assert [call["function"] for call in message["tool_calls"]] == [{"name": "look", "arguments": '{"a"'}]
        assert finish["finish_reason"] == "length"


async def test_forced_calls_begin_behind_the_reasoning(parsed):
    parsed.parsers.end = 77
    parsed.say("(hm)" + REQUIRED)
    [choice] = (await parsed.whole(tool_choice="required"))["choices"]
    assert choice["message"]["reasoning"] == "hm"
    ids = [call["id"] for call in choice["message"]["tool_calls"]]
    assert ids == ["functions.look:0", "functions.add:1"]
    assert parsed.generator.requests[-1].sampling.structured_outputs.begins_after == 77
    wanted = {"type": "json_object"}
    await parsed.whole(tools=None, response_format=wanted)
    assert parsed.generator.requests[-1].sampling.structured_outputs.begins_after == 77


OBJECT = {"type": "object"}
TAGS = (CallTag("look", "<call>look=", OBJECT, "</call>"), CallTag("add", "<call>add=", OBJECT, "</call>"))
TAGGED = '<call>look={"a":1}</call>\n<call>add={}</call>'
WANTED = {"type": "json_schema", "json_schema": {"name": "a", "strict": True, "schema": {"type": "object"}}}


@pytest.mark.parametrize("thoughts", ["", "(hm)"])
async def test_calls_or_a_text_of_the_form(parsed, thoughts):
    parsed.parsers.call_tags, parsed.parsers.end = TAGS, 77
    content = '{"b": "<call>look={}</call>@add;{};"}'  # only the beginning of the output can make it a call
    for text, shown, calls in [(TAGGED, "", CALLS), (content, content, [])]:
        parsed.say(thoughts + text)
        [choice] = (await parsed.whole(response_format=WANTED))["choices"]
        functions = [call["function"] for call in calls]
        assert choice["message"]["content"] == (shown or None)
        assert [call["function"] for call in choice["message"].get("tool_calls", ())] == functions
        assert choice["message"].get("reasoning", "") == thoughts.strip("()")
        assert choice["finish_reason"] == ("tool_calls" if calls else "stop")
        chunks = await parsed.stream(response_format=WANTED)
        message = joined(chunks)
        assert (message["content"], message["reasoning"]) == (shown, thoughts.strip("()"))
        assert [call["function"] for call in message["tool_calls"]] == functions
        assert chunks[-1]["choices"][0]["finish_reason"] == choice["finish_reason"]
    form = parsed.generator.requests[-1].sampling.structured_outputs
    assert json.loads(form.structural_tag) == {
        "calls": [{"begin": tag.begin, "schema": OBJECT, "end": tag.end} for tag in TAGS],
        "several": True,
        "form": {"json": '{"type": "object"}', "disable_additional_properties": True},
    }
    assert form.begins_after == 77
    await parsed.whole(response_format=WANTED, parallel_tool_calls=False)
    form = parsed.generator.requests[-1].sampling.structured_outputs
    assert json.loads(form.structural_tag)["several"] is False


async def test_calls_or_a_form_need_a_known_form_of_calls(parsed):
    error = await parsed.refused(response_format=WANTED)
    assert (error["param"], "tool_call_parser" in error["message"]) == ("response_format", True)
    assert (await parsed.refused(structured_outputs={"regex": "a"}))["param"] == "structured_outputs"
    parsed.parsers.call_tags = TAGS
    error = await parsed.refused(structured_outputs={"grammar": 'start: "a"'})
    assert (error["param"], "grammar" in error["message"]) == ("structured_outputs", True)


async def test_a_form_beside_forced_calls_has_no_effect(parsed):
    parsed.say(REQUIRED)
    await parsed.whole(response_format=WANTED, tool_choice="required")  # OpenAI: the format is the final answer's
    assert "array" in parsed.generator.requests[-1].sampling.structured_outputs.json


async def test_strict_functions_give_the_output_a_form(parsed):
    parsed.parsers.strict_tag = '{"structures": [], "triggers": []}'
    await parsed.whole()
    assert parsed.generator.requests[-1].sampling.structured_outputs.structural_tag == parsed.parsers.strict_tag


async def test_calls_and_their_results_reach_the_prompt(plain):
    plain.say("fine")
    call = {"id": "c-7", "type": "function", "function": {"name": "look", "arguments": '{"a": 1}'}}
    messages = [
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c-7", "content": "7"},
    ]
    await plain.whole(messages=messages, tools=None)
    prompt = plain.tokenizer.decode(plain.generator.requests[-1].prompt_token_ids, skip_special_tokens=False)
    assert 'c-7look{"a": 1}' in prompt
    assert prompt.count("c-7") == 2


async def test_grpc_chats_carry_reasoning_and_calls(parsed):
    server = await serve_grpc(parsed.deps, "127.0.0.1", 0)
    body = {"model": "base", "messages": [{"role": "user", "content": "hi"}], "tools": [LOOK, ADD]}
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        stub = inference_pb2_grpc.InferenceStub(channel)
        request = inference_pb2.ChatRequest(body=json.dumps(body).encode())
        replies = [reply async for reply in stub.Chat(request)]
    await server.stop()
    calls: dict[int, SimpleNamespace] = {}
    for part in (part for reply in replies for part in reply.tool_calls):
        call = calls.setdefault(part.position, SimpleNamespace(id=part.id, name=part.name, arguments=""))
        call.arguments += part.arguments
    assert [(call.id, call.name, call.arguments) for call in calls.values()] == [
        ("id-1", "look", '{"a":1}'),
        ("id-2", "add", "{}"),
    ]
    assert "".join(reply.text for reply in replies) == "so"
    assert "".join(reply.reasoning for reply in replies) == "hm"
    assert replies[-1].delta.finish_reason == common_pb2.FINISH_REASON_TOOL_CALLS
