"""/v1/responses and /v1/messages know every field of vLLM's and the vendors' requests, and make vLLM's messages.

A field that a later vLLM, openai or anthropic adds fails here until someone has decided what it means.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from anthropic.types import message_count_tokens_params as anthropic_count
from anthropic.types import message_create_params as anthropic_messages
from openai.types.responses import response_create_params as openai_responses
from vllm.entrypoints.anthropic.protocol import AnthropicCountTokensRequest, AnthropicMessagesRequest
from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.openai.responses.utils import construct_input_messages

from preft.gateway.bodies.anthropic import CountTokensBody, MessagesBody
from preft.gateway.bodies.parse import parse_body
from preft.gateway.bodies.responses import ResponsesBody
from preft.gateway.bodies.schemas import ApiBody, ChatBody

USER = {"role": "user", "content": "hi"}
SMALLEST: dict[type[ApiBody], dict[str, Any]] = {
    ResponsesBody: {"model": "base", "input": "hi"},
    MessagesBody: {"model": "base", "messages": [USER], "max_tokens": 5},
    CountTokensBody: {"model": "base", "messages": [USER]},
}
VLLM: dict[type[ApiBody], Any] = {
    ResponsesBody: ResponsesRequest,
    MessagesBody: AnthropicMessagesRequest,
    CountTokensBody: AnthropicCountTokensRequest,
}
VENDORS: dict[type[ApiBody], Any] = {
    ResponsesBody: openai_responses.ResponseCreateParamsBase,
    MessagesBody: anthropic_messages.MessageCreateParamsBase,
    CountTokensBody: anthropic_count.MessageCountTokensParams,
}
BODIES = list(SMALLEST)


def fates(body: type[ApiBody], name: str) -> list[str]:
    tables = {"served": body.model_fields, "accepted": body.others.accepted, "refused": body.others.unsupported}
    return [fate for fate, table in tables.items() if name in table]


@pytest.mark.parametrize("body", BODIES)
def test_every_field_of_vllm_has_one_fate(body: type[ApiBody]) -> None:
    found = {name: fates(body, name) for name in VLLM[body].model_fields}
    assert {name: fate for name, fate in found.items() if len(fate) != 1} == {}


@pytest.mark.parametrize("body", BODIES)
def test_every_field_of_the_vendor_is_known(body: type[ApiBody]) -> None:
    assert [name for name in VENDORS[body].__annotations__ if not fates(body, name)] == []


@pytest.mark.parametrize("body", BODIES)
def test_vllms_own_defaults_ask_for_nothing_that_is_refused(body: type[ApiBody]) -> None:
    """A client that spells out every default gets what one gets that leaves them out."""
    defaults = VLLM[body].model_validate(SMALLEST[body]).model_dump(mode="json", by_alias=True, warnings=False)
    given = {**defaults, **SMALLEST[body], "request_id": None} if body is ResponsesBody else defaults
    wanted: Any = parse_body(body, SMALLEST[body])
    said: Any = parse_body(body, given)
    assert dict(said.chat) == dict(wanted.chat)


@pytest.mark.parametrize("body", BODIES)
def test_null_is_absent_for_every_field(body: type[ApiBody]) -> None:
    every = {*body.model_fields, *body.others.accepted, *body.others.unsupported} - SMALLEST[body].keys()
    assert parse_body(body, {**dict.fromkeys(every), **SMALLEST[body]}) == parse_body(body, SMALLEST[body])


def same(messages: list[Any], chat: ChatBody) -> None:
    """Our chat is what vLLM's messages would be as a body of ours."""
    plain = [json.loads(json.dumps(message, default=dict)) for message in messages]
    assert chat.messages == parse_body(ChatBody, {"model": "base", "messages": plain}).messages


def thoughts(text: str) -> dict[str, Any]:
    return {"type": "reasoning", "id": "r", "summary": [], "content": [{"type": "reasoning_text", "text": text}]}


def call(number: int) -> dict[str, Any]:
    return {"type": "function_call", "call_id": f"c{number}", "name": "look", "arguments": f'{{"a": {number}}}'}


def result(number: int) -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": f"c{number}", "output": f"found {number}"}


SAID = {"role": "assistant", "content": "I look", "type": "message"}


@pytest.mark.parametrize(
    "items",
    [
        "hi",
        [USER],
        [{"role": "developer", "content": "be"}, USER, SAID, USER],
        [USER, SAID, SAID],
        [USER, thoughts("a"), SAID, call(1), result(1), SAID],
        [USER, call(1), call(2), result(1), result(2), thoughts("b"), SAID],
        [USER, thoughts("a"), call(1), result(1), thoughts("b"), call(2), result(2)],
        [USER, SAID, thoughts("a"), call(1), result(1)],
        [USER, thoughts("a"), thoughts("b"), SAID],
        [USER, call(1), SAID, result(1)],
    ],
)
@pytest.mark.parametrize("instructions", [None, "be brief"])
def test_items_become_vllms_messages(items: Any, instructions: str | None) -> None:
    given = {"model": "base", "input": items, "instructions": instructions}
    request = ResponsesRequest.model_validate(json.loads(json.dumps(given)))
    expected = construct_input_messages(request_instructions=request.instructions, request_input=request.input)
    same(expected, parse_body(ResponsesBody, given).chat)


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


THINKING = {"type": "thinking", "thinking": "hm", "signature": "s"}
USE = {"type": "tool_use", "id": "t1", "name": "look", "input": {"a": 1}}
RESULT = {"type": "tool_result", "tool_use_id": "t1", "content": "found"}
RESULTS = {"role": "user", "content": [RESULT]}
SYSTEM = [text("x-anthropic-billing-header: 1"), text("be "), text("brief")]


@pytest.mark.parametrize(
    "messages",
    [
        [USER],
        [{"role": "user", "content": [text("a")]}, {"role": "assistant", "content": "b"}, USER],
        [{"role": "user", "content": [text("a"), text("b")]}],
        [USER, {"role": "system", "content": [text("now "), text("brief")]}, USER],
        [
            USER,
            {"role": "assistant", "content": [THINKING, text("I look"), USE]},
            {"role": "user", "content": [RESULT]},
        ],
        [
            USER,
            {"role": "assistant", "content": [USE, {**USE, "id": "t2"}]},
            {"role": "user", "content": [RESULT, {**RESULT, "tool_use_id": "t2", "content": [text("x"), text("y")]}]},
        ],
        [USER, {"role": "assistant", "content": [USE]}, {"role": "user", "content": [RESULT, text("and?")]}],
    ],
)
@pytest.mark.parametrize(
    "system", [None, "be brief", [text("x-anthropic-billing-header: 1"), text("be "), text("brief")]]
)
def test_blocks_become_vllms_messages(messages: list[Any], system: Any) -> None:
    given = {"model": "base", "messages": messages, "system": system, "max_tokens": 5}
    request = AnthropicMessagesRequest.model_validate(json.loads(json.dumps(given)))
    expected = AnthropicServingMessages.to_chat_completion_request(request)
    same(expected.model_dump(mode="json", exclude_none=True)["messages"], parse_body(MessagesBody, given).chat)
