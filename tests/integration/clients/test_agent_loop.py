"""An agent under an adapter: two tools over five turns, streamed, with the official client."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import openai
import pytest

from integration.clients.conftest import Door

FLATS = {"Lisbon": ["Alfama 3", "Baixa 8"], "Porto": ["Ribeira 1"]}
RENTS = {"Alfama 3": 900, "Baixa 8": 1400, "Ribeira 1": 700}
TOOLS: dict[str, Callable[..., Any]] = {"list_flats": lambda city: FLATS[city], "rent": lambda flat: RENTS[flat]}
DESCRIBED: list[Any] = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {parameter: {"type": "string"}},
                "required": [parameter],
                "additionalProperties": False,
            },
        },
    }
    for name, parameter in (("list_flats", "city"), ("rent", "flat"))
]


def calls_of(*calls: tuple[str, dict[str, str]]) -> str:
    """What a model says that must call."""
    return json.dumps([{"name": name, "parameters": parameters} for name, parameters in calls])


AUTO = (
    '@list_flats;{"city": "Lisbon"};@list_flats;{"city": "Porto"};',
    '(three flats)I compare. @rent;{"flat": "Alfama 3"};@rent;{"flat": "Ribeira 1"};',
    '@rent;{"flat": "nowhere"};',
    '(a mistake)@rent;{"flat": "Baixa 8"};',
    "Ribeira 1 costs least.",
)
REQUIRED = (
    calls_of(("list_flats", {"city": "Lisbon"}), ("list_flats", {"city": "Porto"})),
    calls_of(("rent", {"flat": "Alfama 3"}), ("rent", {"flat": "Ribeira 1"})),
    calls_of(("rent", {"flat": "nowhere"})),
    calls_of(("rent", {"flat": "Baixa 8"})),
    "Ribeira 1 costs least.",
)


def turn(client: openai.OpenAI, messages: list[Any], choice: Any) -> dict[str, Any]:
    """The assistant's next message, put together from a stream."""
    text, calls = "", {}
    chunks = client.chat.completions.create(
        model="ann", messages=messages, tools=DESCRIBED, tool_choice=choice, stream=True
    )
    for chunk in chunks:
        delta = chunk.choices[0].delta
        text += delta.content or ""
        for part in delta.tool_calls or ():
            call = calls.setdefault(part.index, {"id": part.id, "type": "function", "function": {"arguments": ""}})
            assert part.function is not None
            if part.function.name:
                call["function"]["name"] = part.function.name
            call["function"]["arguments"] += part.function.arguments or ""
    message: dict[str, Any] = {"role": "assistant", "content": text or None}
    return {**message, "tool_calls": [*calls.values()]} if calls else message


def run(client: openai.OpenAI, choices: list[Any]) -> list[Any]:
    """The whole conversation. A call that fails is answered with its error."""
    messages: list[Any] = [{"role": "user", "content": "Which flat costs least, in Lisbon or Porto?"}]
    for choice in choices:
        messages.append(turn(client, messages, choice))
        for call in messages[-1].get("tool_calls", ()):
            try:
                said = json.dumps(TOOLS[call["function"]["name"]](**json.loads(call["function"]["arguments"])))
            except KeyError as error:
                said = f"error: there is no {error}"
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": said})
    return messages


@pytest.mark.parametrize(
    ("said", "choices"), [(AUTO, ["auto"] * 5), (REQUIRED, ["required"] * 4 + ["none"])], ids=["auto", "required"]
)
def test_two_tools_over_five_turns(door: Door, said: tuple[str, ...], choices: list[str]) -> None:
    door.say(*said)
    with openai.OpenAI(base_url=door.url, api_key="any", max_retries=0) as client:
        messages = run(client, choices)
    turns = [message for message in messages if message["role"] == "assistant"]
    assert [len(message.get("tool_calls", ())) for message in turns] == [2, 2, 1, 1, 0]
    assert [message["content"] for message in messages if message["role"] == "tool"] == [
        '["Alfama 3", "Baixa 8"]', '["Ribeira 1"]', "900", "700", "error: there is no 'nowhere'", "1400",
    ]  # fmt: skip
    assert messages[-1]["content"] == "Ribeira 1 costs least."
    ids = [call["id"] for message in turns for call in message.get("tool_calls", ())]
    prompts = door.prompts()
    assert len(prompts) == 5
    assert all(later.startswith(earlier.removesuffix("<|assistant|>")) for earlier, later in pairwise(prompts))
    assert all(f"<|tool|>{name}" in prompts[-1] for name in ids)
    assert {adapter.name for adapter in door.adapters() if adapter} == {"ann"}
    assert None not in door.adapters()
