"""Every field of vLLM's and OpenAI's requests: served, accepted without effect, or refused by name. None is unknown.

A field that a later vLLM or openai adds fails here until someone has decided what it means, and docs/api-fields.md says
so.
"""

from __future__ import annotations

from typing import Any

import pytest
from openai.types import completion_create_params as openai_completion
from openai.types.chat import completion_create_params as openai_chat
from openai.types.responses import response_create_params as openai_responses
from pydantic import BaseModel
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest
from vllm.entrypoints.openai.responses.protocol import ResponsesRequest
from vllm.entrypoints.serve.lora.protocol import LoadLoRAAdapterRequest, UnloadLoRAAdapterRequest

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.adapter_schemas import LoadAdapterBody, UnloadAdapterBody
from preft.gateway.bodies.parameters import ACCEPTED, UNSUPPORTED
from preft.gateway.bodies.parse import parse_body
from preft.gateway.bodies.schemas import ChatBody, CompletionBody
from support.api_fields import rows

PROMPT: dict[type[BaseModel], dict[str, Any]] = {
    CompletionBody: {"model": "base", "prompt": "hi"},
    ChatBody: {"model": "base", "messages": [{"role": "user", "content": "hi"}]},
}
PAIRS = [(CompletionBody, CompletionRequest), (ChatBody, ChatCompletionRequest)]
BODIES = [CompletionBody, ChatBody]


def fates(body: type[BaseModel], name: str) -> list[str]:
    tables = {"served": body.model_fields, "accepted": ACCEPTED, "refused": UNSUPPORTED}
    return [fate for fate, table in tables.items() if name in table]


@pytest.mark.parametrize(("body", "theirs"), PAIRS)
def test_every_field_of_vllm_has_one_fate(body: type[BaseModel], theirs: type[BaseModel]) -> None:
    found = {name: fates(body, name) for name in theirs.model_fields}
    assert {name: fate for name, fate in found.items() if len(fate) != 1} == {}


@pytest.mark.parametrize(
    ("body", "names"),
    [
        (CompletionBody, openai_completion.CompletionCreateParamsBase.__annotations__),
        (ChatBody, openai_chat.CompletionCreateParamsBase.__annotations__),
    ],
)
def test_every_field_of_openai_is_known(body: type[BaseModel], names: dict[str, Any]) -> None:
    assert [name for name in names if not fates(body, name)] == []


FIELDS = {
    "/v1/completions": [CompletionRequest.model_fields, openai_completion.CompletionCreateParamsBase.__annotations__],
    "/v1/chat/completions": [
        ChatCompletionRequest.model_fields,
        openai_chat.CompletionCreateParamsBase.__annotations__,
    ],
    "/v1/responses": [ResponsesRequest.model_fields, openai_responses.ResponseCreateParamsBase.__annotations__],
}


@pytest.mark.parametrize("path", FIELDS)
def test_every_field_is_in_the_docs(path: str) -> None:
    said = {row.field for row in rows() if row.path == path}
    assert [name for names in FIELDS[path] for name in names if name not in said] == []


@pytest.mark.parametrize(("body", "theirs"), PAIRS)
def test_vllms_own_defaults_ask_for_nothing_that_is_refused(body: type[BaseModel], theirs: type[BaseModel]) -> None:
    """A client that spells out every default gets what one gets that leaves them out."""
    defaults = theirs.model_validate(PROMPT[body]).model_dump(mode="json", warnings=False)
    given = {**defaults, **PROMPT[body], "request_id": None}
    wanted = parse_body(body, PROMPT[body])
    differing = {
        name: (value, getattr(wanted, name))
        for name, value in parse_body(body, given)
        if value != getattr(wanted, name)
    }
    assert differing.keys() <= {"max_tokens", "top_logprobs", "tool_choice"}  # vLLM's own defaults, said aloud


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", sorted(ACCEPTED))
@pytest.mark.parametrize("value", [0, 1.5, True, "x", [], {"a": [1]}])
def test_what_is_accepted_has_no_effect(body: type[BaseModel], name: str, value: object) -> None:
    assert parse_body(body, {**PROMPT[body], name: value}) == parse_body(body, PROMPT[body])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_is_refused_is_named_unless_it_asks_for_what_happens_anyway(body: type[BaseModel], name: str) -> None:
    for neutral in (None, *UNSUPPORTED[name]):
        assert parse_body(body, {**PROMPT[body], name: neutral}) == parse_body(body, PROMPT[body])
    for value in ({"a": 1}, "something", 3, [5]):
        with pytest.raises(InvalidRequest, match=f"'{name}'") as caught:
            parse_body(body, {**PROMPT[body], name: value})
        assert caught.value.param == name


@pytest.mark.parametrize("body", BODIES)
def test_null_is_absent_for_every_field(body: type[BaseModel]) -> None:
    every = {*body.model_fields, *ACCEPTED, *UNSUPPORTED} - PROMPT[body].keys()
    assert parse_body(body, {**dict.fromkeys(every), **PROMPT[body]}) == parse_body(body, PROMPT[body])


@pytest.mark.parametrize(
    ("body", "theirs"), [(LoadAdapterBody, LoadLoRAAdapterRequest), (UnloadAdapterBody, UnloadLoRAAdapterRequest)]
)
def test_vllms_requests_for_adapters(body: type[BaseModel], theirs: type[BaseModel]) -> None:
    assert theirs.model_fields.keys() <= body.model_fields.keys()
