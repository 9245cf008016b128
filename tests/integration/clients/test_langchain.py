"""LangChain's ChatOpenAI, unchanged, under an adapter."""

from __future__ import annotations

import json
from typing import Literal

import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_core.prompts import ChatPromptTemplate
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI
from pydantic import BaseModel, SecretStr

from integration.clients.conftest import Door

MESSAGES = [SystemMessage("be brief"), HumanMessage("where?")]


class Place(BaseModel):
    """A place in the world."""

    city: str
    size: Literal["small", "large"]


LISBON = Place(city="Lisbon", size="large")


@pytest.fixture
def model(door: Door) -> ChatOpenAI:
    return ChatOpenAI(base_url=door.url, api_key=SecretStr("any"), model="ann", temperature=0, max_retries=0)


def test_a_chat_and_its_stream_with_usage(door: Door, model: ChatOpenAI) -> None:
    door.say("in Lisbon")
    whole = model.invoke(MESSAGES)
    assert isinstance(whole, AIMessage)
    assert whole.content == "in Lisbon"
    assert whole.response_metadata["finish_reason"] == "stop"
    first, *rest = model.stream(MESSAGES, stream_usage=True)
    joined = sum(rest, first)
    assert joined.content == "in Lisbon"
    assert whole.usage_metadata is not None
    assert joined.usage_metadata == whole.usage_metadata
    assert whole.usage_metadata["output_tokens"] > 3
    assert {adapter.name for adapter in door.adapters() if adapter} == {"ann"}


async def test_asynchronous_calls_and_batches(door: Door, model: ChatOpenAI) -> None:
    door.say("in Lisbon")
    chain = ChatPromptTemplate.from_messages([("user", "where is {name}?")]) | model
    answers = await chain.abatch([{"name": "Ann"}, {"name": "Bob"}])
    assert [answer.content for answer in answers] == ["in Lisbon"] * 2
    assert "".join([str(part.content) async for part in model.astream(MESSAGES)]) == "in Lisbon"
    assert sum("where is Ann?" in prompt for prompt in door.prompts()) == 1


@pytest.mark.parametrize("method", ["json_schema", "json_mode"])
def test_structured_output(door: Door, model: ChatOpenAI, method: Literal["json_schema", "json_mode"]) -> None:
    door.say(LISBON.model_dump_json())
    assert model.with_structured_output(Place, method=method).invoke(MESSAGES) == LISBON
    [schema] = door.schemas()
    if method == "json_schema":
        assert set(json.loads(schema or "")["properties"]) == {"city", "size"}
    else:
        form = door.gateway.generator.requests[0].sampling.structured_outputs
        assert form is not None
        assert form.json_object


@tool
def add(a: int, b: int) -> int:
    """Adds two numbers."""
    return a + b


def test_tools(door: Door, model: ChatOpenAI) -> None:
    door.say('so @add;{"a": 2, "b": 3};')
    whole = model.bind_tools([add]).invoke(MESSAGES)
    assert [(call["name"], call["args"]) for call in whole.tool_calls] == [("add", {"a": 2, "b": 3})]
    first, *rest = model.bind_tools([add]).stream(MESSAGES)
    assert sum(rest, first).tool_calls == whole.tool_calls
    door.say('[{"name": "add", "parameters": {"a": 4, "b": 5}}]', "nine")
    asked = [*MESSAGES, model.bind_tools([add], tool_choice="required").invoke(MESSAGES)]
    [call] = asked[-1].tool_calls
    answer = model.bind_tools([add], tool_choice="none").invoke([*asked, add.invoke(call)])
    assert answer.content == "nine"
    assert f"<|tool|>{call['id']}9" in door.prompts()[-1]


def test_structured_output_by_a_named_function(door: Door, model: ChatOpenAI) -> None:
    door.say(LISBON.model_dump_json())
    assert model.with_structured_output(Place, method="function_calling").invoke(MESSAGES) == LISBON
    [schema] = door.schemas()
    assert set(json.loads(schema or "")["properties"]) == {"city", "size"}
