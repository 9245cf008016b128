"""/openapi.json and /docs: true to what is checked, and to what is answered."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_spec_validator import validate
from pydantic import TypeAdapter

from preft.core.cluster import AdapterPlace, AdapterState
from preft.core.request import FinishReason
from preft.gateway.bodies.anthropic import CountTokensBody, MessagesBody
from preft.gateway.bodies.parameters import ACCEPTED, UNSUPPORTED
from preft.gateway.bodies.responses import ResponsesBody
from preft.gateway.bodies.schemas import ChatBody, CompletionBody
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.anthropic_types import AnthropicErrorReply
from preft.gateway.http.app import create_app
from preft.gateway.http.reply_types import ErrorReply
from preft.gateway.text.tokenizer import Tokenizer
from support.fakes import FakeCatalog, FakeGenerator, Script

JSON = {"content-type": "application/json"}
USER = [{"role": "user", "content": "hi"}]
VALID: dict[tuple[str, str], dict[str, Any]] = {
    ("POST", "/v1/completions"): {"model": "ann", "prompt": "hi"},
    ("POST", "/v1/chat/completions"): {"model": "base", "messages": USER},
    ("POST", "/v1/responses"): {"model": "ann", "input": "hi"},
    ("POST", "/v1/messages"): {"model": "ann", "messages": USER, "max_tokens": 5},
    ("POST", "/v1/messages/count_tokens"): {"model": "base", "messages": USER},
    ("POST", "/tokenize"): {"prompt": "hi"},
    ("POST", "/detokenize"): {"tokens": [5]},
    ("POST", "/v1/adapters"): {"name": "bob", "source": "/bob"},
    ("PATCH", "/v1/adapters/{name}"): {"pinned": True},
    ("POST", "/v1/load_lora_adapter"): {"lora_name": "bob", "lora_path": "/bob", "load_inplace": True},
    ("POST", "/v1/unload_lora_adapter"): {"lora_name": "ann"},
}
BODIES = sorted(VALID)


def new_app(tokenizer: Tokenizer) -> Any:
    generator = FakeGenerator(lambda request: Script((70, 71), finish=FinishReason.LENGTH))
    catalog = FakeCatalog.of(ann="/ann")
    here = [AdapterPlace("prefill-0", AdapterState.HOST, 2)]
    return create_app(GatewayDeps("base", tokenizer, 64, generator, catalog, places=lambda digest: here))


@pytest.fixture
async def served(tokenizer) -> AsyncIterator[SimpleNamespace]:
    app = new_app(tokenizer)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        yield SimpleNamespace(client=client, described=(await client.get("/openapi.json")).json())


def schema_of(described: dict[str, Any], method: str, path: str) -> dict[str, Any]:
    """The schema of a JSON body, with what it refers to."""
    body = described["paths"][path][method.lower()]["requestBody"]["content"]["application/json"]["schema"]
    return {**body, "components": described["components"]}


def conforms(described: dict[str, Any], method: str, path: str, response: httpx.Response) -> None:
    """A reply is as its route describes it."""
    answers = described["paths"][path][method.lower()]["responses"]
    content = answers.get(str(response.status_code), answers["default"])["content"]
    kind = response.headers["content-type"].partition(";")[0]
    assert kind in content
    if kind == "application/json":
        jsonschema.validate(response.json(), {**content[kind]["schema"], "components": described["components"]})


async def test_the_document_is_valid(served):
    validate(served.described)
    described = {(method.upper(), path) for path, item in served.described["paths"].items() for method in item}
    assert set(VALID) < described
    assert {("PUT", "/v1/adapters/{name}"), ("GET", "/v1/models"), ("GET", "/ready")} < described


@pytest.mark.parametrize("kind", [CompletionBody, ChatBody])
async def test_every_parameter_that_is_known_is_described(served, kind):
    body = served.described["components"]["schemas"][kind.__name__]
    assert body["properties"].keys() == {*kind.model_fields, *ACCEPTED, *UNSUPPORTED}
    assert body["additionalProperties"] is False
    least = 0 if kind is CompletionBody else 1  # 0 scores a prompt
    assert body["properties"]["max_tokens"]["anyOf"] == [{"minimum": least, "type": "integer"}, {"type": "null"}]
    assert None in body["properties"]["detokenize"]["enum"]
    assert body["properties"]["response_format"]["anyOf"][0]["$ref"].endswith("/ResponseFormat")


@pytest.mark.parametrize("kind", [ResponsesBody, MessagesBody, CountTokensBody])
async def test_every_parameter_of_converted_bodies_is_described(served, kind):
    body = served.described["components"]["schemas"][kind.__name__]
    assert body["properties"].keys() == {*kind.model_fields, *kind.others.accepted, *kind.others.unsupported}
    assert body["additionalProperties"] is False


@pytest.mark.parametrize(("method", "path"), BODIES)
async def test_bodies_with_every_default_said_aloud_are_taken(served, method, path):
    schema = schema_of(served.described, method, path)
    name = schema["$ref"].rpartition("/")[2]
    fields = schema["components"]["schemas"][name]["properties"]
    body = {**{name: field.get("default") for name, field in fields.items()}, **VALID[method, path]}
    jsonschema.validate(body, schema)
    for content in (body, VALID[method, path], {**dict.fromkeys(fields), **VALID[method, path]}):
        response = await served.client.request(method, path.format(name="ann"), json=content)
        assert response.status_code == 200 or "unload" in path, response.text
        conforms(served.described, method, path, response)


REPLIES = (
    ("/v1/completions", {"model": "ann", "prompt": ["hi", "ho"], "n": 2, "logprobs": 2, "return_token_ids": True}),
    ("/v1/completions", {"model": "base", "prompt": "hi", "stream": True}),
    ("/v1/completions", {"model": "base", "prompt": "hi", "stop": "f"}),
    ("/v1/chat/completions", {"model": "base", "messages": USER, "logprobs": True, "top_logprobs": 2}),
    ("/v1/chat/completions", {"model": "base", "messages": USER, "return_token_ids": True}),
    ("/v1/responses", {"model": "ann", "input": [{"role": "user", "content": "hi"}], "metadata": {"a": "b"}}),
    ("/v1/responses", {"model": "base", "input": "hi", "include": ["message.output_text.logprobs"]}),
    ("/v1/responses", {"model": "base", "input": "hi", "stream": True}),
    ("/v1/messages", {"model": "ann", "messages": USER, "max_tokens": 1, "system": "be brief"}),
    ("/v1/messages", {"model": "base", "messages": USER, "max_tokens": 3, "stream": True}),
    ("/v1/completions", {"model": "ann", "prompt": "hi", "logprobs": 1, "echo": True, "prompt_logprobs": 2}),
    ("/v1/chat/completions", {"model": "base", "messages": USER, "prompt_logprobs": 1, "return_prompt_text": True}),
    ("/tokenize", {"prompt": "hi", "return_token_strs": True}),
    ("/tokenize", {"messages": USER}),
    ("/detokenize", {"tokens": [5]}),
)


@pytest.mark.parametrize(("path", "body"), REPLIES)
async def test_replies_are_as_described(served, path, body):
    response = await served.client.post(path, json=body)
    assert response.status_code == 200
    conforms(served.described, "POST", path, response)


async def test_replies_without_a_body_are_as_described(served):
    for path in ("/health", "/ready", "/version", "/v1/models", "/v1/adapters"):
        conforms(served.described, "GET", path, await served.client.get(path))
    for method, path in ("GET", "/v1/models/{name}"), ("GET", "/v1/adapters/{name}"), ("DELETE", "/v1/adapters/{name}"):
        for _ in range(2):
            conforms(served.described, method, path, await served.client.request(method, path.format(name="ann")))
    uploaded = await served.client.put("/v1/adapters/bob", content=b"weights")
    conforms(served.described, "PUT", "/v1/adapters/{name}", uploaded)
    assert (await served.client.put("/v1/adapters/bob")).status_code == 400


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8")),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(st.characters(codec="utf-8")), inner, max_size=3)
    ),
    max_leaves=6,
)


@pytest.mark.parametrize(("method", "path"), BODIES)
def test_no_value_of_any_field_is_taken_against_the_schema_or_fails(tokenizer, method, path):
    app = new_app(tokenizer)
    schema = schema_of(app.openapi(), method, path)
    fields = sorted(schema["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["properties"])

    async def send(body: object) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
            return await client.request(method, path.format(name="ann"), content=json.dumps(body), headers=JSON)

    @settings(max_examples=60, deadline=None)
    @given(st.dictionaries(st.sampled_from(fields) | st.text(max_size=5), json_values, max_size=3))
    def check(changed: dict[str, Any]) -> None:
        body = {**VALID[method, path], **changed}
        response = asyncio.run(send(body))
        assert response.status_code < 500, response.text
        if response.status_code == 200:
            jsonschema.validate({name: value for name, value in body.items() if name in fields}, schema)
        else:
            kind = AnthropicErrorReply if path.startswith("/v1/messages") else ErrorReply
            TypeAdapter(kind).validate_python(response.json())

    check()


async def test_the_docs_page_needs_no_other_site(served):
    response = await served.client.get("/docs")
    assert response.headers["content-security-policy"] == "frame-ancestors 'none'"
    page = response.text
    links = re.findall(r"""(?:href|src|url)\s*[=:]\s*["']([^"']+)""", page)
    assert "/openapi.json" in links
    assert len(links) == 4
    for link in links:
        assert (await served.client.get(link)).status_code == 200
    assert not re.search(r"//\w", page.replace("// `Swagger", ""))
    assert (await served.client.get("/docs/core.py")).status_code == 404
