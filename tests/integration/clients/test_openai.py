"""The official client of OpenAI, unchanged, under an adapter: chats, streams, forms of output, errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Literal

import openai
import pytest
from openai.types.chat import ChatCompletionMessageParam
from pydantic import BaseModel

from integration.clients.conftest import Door

MESSAGES: list[ChatCompletionMessageParam] = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": [{"type": "text", "text": "where?"}]},
]


class Place(BaseModel):
    city: str
    size: Literal["small", "large"]
    districts: list[str]


LISBON = Place(city="Lisbon", size="large", districts=["Alfama", "Baixa"])


@pytest.fixture
def client(door: Door) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=door.url, api_key="any", max_retries=0) as client:
        yield client


def test_a_chat_and_its_stream(door: Door, client: openai.OpenAI) -> None:
    door.say("in Lisbon")
    whole = client.chat.completions.create(
        model="ann", messages=MESSAGES, logprobs=True, top_logprobs=2, extra_body={"top_k": 5, "min_tokens": 1}
    )
    chunks = list(
        client.chat.completions.create(
            model="ann", messages=MESSAGES, stream=True, stream_options={"include_usage": True}
        )
    )
    assert whole.choices[0].message.content == "in Lisbon"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.choices[0].logprobs is not None
    entries = whole.choices[0].logprobs.content or []
    assert "".join(entry.token for entry in entries) == "in Lisbon<|eos|>"
    assert [len(entry.top_logprobs) for entry in entries] == [2] * len(entries)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "in Lisbon"
    assert chunks[-1].usage == whole.usage
    assert {adapter.name for adapter in door.adapters() if adapter} == {"ann"} != door.adapters()
    assert door.gateway.generator.requests[0].sampling.top_k == 5


def test_the_streaming_helper(door: Door, client: openai.OpenAI) -> None:
    door.say(LISBON.model_dump_json())
    with client.chat.completions.stream(model="ann", messages=MESSAGES, response_format=Place) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == LISBON
    assert kinds[-1] == "content.done"
    assert "content.delta" in kinds


def test_an_answer_in_the_form_of_a_pydantic_model(door: Door, client: openai.OpenAI) -> None:
    door.say(LISBON.model_dump_json())
    answer = client.chat.completions.parse(model="ann", messages=MESSAGES, response_format=Place)
    assert answer.choices[0].message.parsed == LISBON
    [schema] = door.schemas()
    assert set(json.loads(schema or "")["properties"]) == {"city", "size", "districts"}
    door.say('{"city": "Lis')
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(model="ann", messages=MESSAGES, response_format=Place, max_tokens=3)


def test_completions_models_and_errors(door: Door, client: openai.OpenAI) -> None:
    door.say("hello world")
    whole = client.completions.create(model="ann", prompt=["hi", "ho"], max_tokens=30, logprobs=1)
    assert [choice.text for choice in whole.choices] == ["hello world"] * 2
    pieces = client.completions.create(model="base", prompt=[5, 6, 7], max_tokens=30, stream=True)
    assert "".join(piece.choices[0].text for piece in pieces) == "hello world"
    assert [model.id for model in client.models.list()] == ["base", "ann"]
    assert client.models.retrieve("ann").id == "ann"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="eve", prompt="hi")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model="ann", prompt="hi", suffix="x")
    assert refused.value.param == "suffix"


def test_many_at_once(door: Door) -> None:
    door.say("hello world")

    async def main() -> list[str]:
        async with openai.AsyncOpenAI(base_url=door.url, api_key="any", max_retries=0) as client:

            async def whole(model: str) -> str:
                reply = await client.chat.completions.create(model=model, messages=MESSAGES)
                return reply.choices[0].message.content or ""

            async def streamed(model: str) -> str:
                chunks = await client.chat.completions.create(model=model, messages=MESSAGES, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

            return await asyncio.gather(*(ask(model) for model in ("ann", "base") * 10 for ask in (whole, streamed)))

    assert asyncio.run(main()) == ["hello world"] * 40
    assert len(door.adapters()) == 2


def test_tools_in_whole_answers_and_streams(door: Door, client: openai.OpenAI) -> None:
    tools = [openai.pydantic_function_tool(Place, name="note")]
    door.say(f"(thinking)so @note;{LISBON.model_dump_json()};")
    whole = client.chat.completions.parse(model="ann", messages=MESSAGES, tools=tools)
    [call] = whole.choices[0].message.tool_calls or []
    assert (call.function.name, call.function.parsed_arguments) == ("note", LISBON)
    assert (whole.choices[0].finish_reason, whole.choices[0].message.content) == ("tool_calls", "so ")
    with client.chat.completions.stream(model="ann", messages=MESSAGES, tools=tools) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"tool_calls.function.arguments.delta", "tool_calls.function.arguments.done"} <= kinds
    [streamed] = final.choices[0].message.tool_calls or []
    assert (streamed.id, streamed.function.parsed_arguments) == (call.id, LISBON)
