"""/v1/responses and /v1/messages take the same way as chat completions: models, errors, deadlines, disconnects, ends.

`*_shape` tests check the replies, and `bodies` tests the bodies.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import anthropic
import httpx
import openai
import pytest

from preft.core.errors import EngineFailed, InvalidRequest, QueueFull, TransferFailed, WorkerLost
from preft.core.request import AdapterRef, FinishReason
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from preft.gateway.text.tokenizer import Tokenizer
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.sdk_gateway import ScriptedGateway, gateway_in_thread
from support.served_app import served_app
from support.small_tokenizers import byte_level

USER = [{"role": "user", "content": "hi"}]
JSON = {"content-type": "application/json"}


@dataclass(frozen=True)
class Api:
    """One API: its path, its smallest body, and what names the prompt and the last event of a failing stream."""

    path: str
    body: dict[str, Any]
    prompt: str
    last: str

    def error_of(self, event: dict[str, Any]) -> str:
        """The message of the last event of a failing stream."""
        return str(event.get("response", event)["error"]["message"])


RESPONSES = Api("/v1/responses", {"input": "hi"}, "input", "response.failed")
MESSAGES = Api("/v1/messages", {"messages": USER, "max_tokens": 40}, "messages", "error")
APIS = [pytest.param(RESPONSES, id="responses"), pytest.param(MESSAGES, id="messages")]


@pytest.fixture
async def served(tokenizer: Tokenizer) -> AsyncIterator[SimpleNamespace]:
    """The app over a fake generator. `ask` sends a request to one of the APIs."""
    state = SimpleNamespace(tokenizer=tokenizer, script=Script(letters(tokenizer, "hello"), finish=FinishReason.STOP))
    state.generator = FakeGenerator(lambda request: state.script)
    state.catalog = FakeCatalog.of(ann="/adapters/ann")
    state.deps = GatewayDeps("base", tokenizer, 64, state.generator, state.catalog)
    state.app = create_app(state.deps)
    transport = httpx.ASGITransport(state.app, raise_app_exceptions=False)
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as state.client:

        async def ask(api: Api, headers: dict[str, str] | None = None, **body: Any) -> httpx.Response:
            given = {"model": "base", **api.body, **body}
            return await state.client.post(api.path, json=given, headers=headers)

        state.ask = ask
        yield state


def letters(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """One token per character, and an end token."""
    return (*(tokenizer._backend.token_to_id(char) for char in text.replace(" ", "Ġ")), 1)


def last_event(stream: str) -> dict[str, Any]:
    return dict(json.loads(stream.removesuffix("\n\n").rpartition("data: ")[2]))


def refused(api: Api, reply: httpx.Response, status: int) -> str:
    """The message of an error in the form of the API."""
    assert reply.status_code == status, reply.text
    body = reply.json()
    if api is MESSAGES:
        assert (body.keys(), body["type"], body["error"].keys()) == ({"type", "error"}, "error", {"type", "message"})
    else:
        assert (body.keys(), body["error"].keys()) == ({"error"}, {"message", "type", "param", "code"})
    return str(body["error"]["message"])


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("stream", [False, True])
async def test_adapters_are_resolved_to_their_version(served, api, stream):
    adapter = served.catalog.get("ann")
    for model in "ann", "ann@1", f"ann@{adapter.digest}":
        reply = await served.ask(api, model=model, stream=stream)
        assert f'"model":"{model}"' in reply.text
        assert served.generator.requests.pop().adapter == AdapterRef("ann", adapter.digest, adapter.source)
    for model in "bob", "ann@2", "base@1":
        refused(api, await served.ask(api, model=model, stream=stream), 404)
    await served.catalog.remove("ann")
    refused(api, await served.ask(api, model="ann", stream=stream), 404)
    assert served.generator.requests == []


@pytest.mark.parametrize("api", APIS)
async def test_the_prompt_is_that_of_the_chat(served, api):
    assert (await served.ask(api, temperature=0.5, top_p=0.9, top_k=3)).status_code == 200
    chat = {"model": "base", "messages": USER, "temperature": 0.5, "top_p": 0.9, "top_k": 3}
    await served.client.post("/v1/chat/completions", json={**chat, "max_tokens": api.body.get("max_tokens")})
    first, second = served.generator.requests
    assert (first.prompt_token_ids, first.sampling) == (second.prompt_token_ids, second.sampling)


@pytest.mark.parametrize("api", APIS)
async def test_errors_have_the_apis_form(served, api):
    limit = "max_output_tokens" if api is RESPONSES else "max_tokens"
    assert f"{limit} is 100" in refused(api, await served.ask(api, **{limit: 100}), 400)
    assert "temprature" in refused(api, await served.ask(api, temprature=1), 400)
    for data, headers, status in (b"{", JSON, 400), (b"{}", {"content-type": "text/plain"}, 415), (b"{}", JSON, 400):
        refused(api, await served.client.post(api.path, content=data, headers=headers), status)
    refused(api, await served.client.get(api.path), 405)
    origin = {"origin": "http://evil.example"}
    refused(api, await served.ask(api, headers=origin), 403)
    refused(api, await served.ask(api, headers={"preft-timeout": "soon"}), 400)
    assert served.generator.requests == []


async def test_errors_name_the_parameter(served):
    for body, param in (
        ({"input": [*USER, {"role": "user", "content": "refuse me"}]}, None),
        ({"input": "x" * 500}, "input"),
        ({"max_output_tokens": 100}, "max_output_tokens"),
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
    ):
        reply = await served.ask(RESPONSES, **body)
        assert reply.status_code == 400
        if param is not None:
            assert reply.json()["error"]["param"] == param


async def test_a_text_that_the_template_leaves_out(tmp_path: Path) -> None:
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    tokenizer = Tokenizer.load(byte_level(tmp_path, chat_template=template))
    app = create_app(GatewayDeps("base", tokenizer, 64, FakeGenerator(lambda request: Script()), FakeCatalog()))
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as client:
        body = {"model": "base", "input": [*USER, {"role": "assistant", "content": "no"}]}
        found = (await client.post("/v1/responses", json=body)).json()["error"]
        assert found["param"] == "input[1].content"
        assert "the content of input[1] (role 'assistant') out of the prompt" in found["message"]
        body = {"model": "base", "input": "hi", "instructions": "be"}
        assert (await client.post("/v1/responses", json=body)).json()["error"]["param"] == "instructions"
        body = {"model": "base", "messages": USER, "system": "be", "max_tokens": 3}
        found = (await client.post("/v1/messages", json=body)).json()["error"]
        assert "the content of system" in found["message"]


async def test_a_form_that_a_worker_refuses(served):
    served.script = Script(fail=InvalidRequest("no such keyword", "structured_outputs"))
    form = {"type": "json_schema", "name": "it", "schema": {"type": "object"}}
    reply = await served.ask(RESPONSES, text={"format": form})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "text.format")
    assert served.generator.requests[0].sampling.structured_outputs.json == '{"type": "object"}'


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [None, 0])
@pytest.mark.parametrize(
    ("failure", "status"),
    [(QueueFull("full", 2.5), 429), (TransferFailed("lost"), 502), (EngineFailed("boom"), 500), (ValueError("a"), 500)],
)
async def test_what_fails_before_the_first_token_is_a_plain_error(served, api, stream, after, failure, status):
    served.script = Script((70,), fail=failure, fail_after=after)
    reply = await served.ask(api, stream=stream)
    refused(api, reply, status)
    assert reply.headers.get("retry-after") == ("3" if status == 429 else None)


@pytest.mark.parametrize("api", APIS)
async def test_what_fails_later_ends_the_stream_with_an_error_event(served, api):
    served.script = Script(letters(served.tokenizer, "hello"), fail=WorkerLost("it died"), fail_after=2)
    reply = await served.ask(api, stream=True)
    assert reply.status_code == 200
    last = last_event(reply.text)
    assert (last["type"], api.error_of(last)) == (api.last, "it died")
    assert '"completed"' not in reply.text
    assert "message_stop" not in reply.text
    refused(api, await served.ask(api), 503)


@pytest.mark.parametrize("api", APIS)
async def test_a_deadline_travels_with_the_request(served, api):
    await served.ask(api, headers={"preft-timeout": "30"})
    assert 20 < served.generator.requests[0].deadline - time.time() <= 30


@pytest.mark.parametrize("api", APIS)
async def test_a_streams_last_event_if_the_server_stops(served, api):
    served.script = Script(letters(served.tokenizer, "hello") * 50, delay=0.02)
    async with served_app(served.app) as port, httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        body = {"model": "base", **api.body, "stream": True}
        async with client.stream("POST", api.path, json=body) as reply:
            text = ""
            async for part in reply.aiter_text():
                text += part
                if "delta" in text:
                    served.deps.drain.interrupt()
        last = last_event(text)
        assert (last["type"], "shut down" in api.error_of(last)) == (api.last, True)
        refused(api, await client.post(api.path, json=body), 503)


@pytest.mark.parametrize("api", APIS)
@pytest.mark.parametrize("stream", [False, True])
async def test_a_client_that_leaves_cancels_its_request(served, api, stream):
    served.script = Script((70,) * 40, delay=0.05)
    payload = json.dumps({"model": "ann", **api.body, "stream": stream}).encode()
    head = f"POST {api.path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
    async with served_app(served.app) as port:
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(f"{head}content-length: {len(payload)}\r\n\r\n".encode() + payload)
        async with asyncio.timeout(20):
            while not served.generator.entered:
                await asyncio.sleep(0.01)
            writer.close()
            while not served.generator.left:
                await asyncio.sleep(0.01)
    assert served.generator.cancelled == served.generator.entered


async def test_tokens_are_counted_without_work(served):
    body = {"model": "ann", "messages": USER, "system": "be brief"}
    counted = (await served.client.post("/v1/messages/count_tokens", json=body)).json()
    used = (await served.ask(MESSAGES, model="ann", system="be brief", max_tokens=9)).json()["usage"]
    assert counted == {"input_tokens": used["input_tokens"]}
    assert len(served.generator.requests) == 1
    refused(MESSAGES, await served.client.post("/v1/messages/count_tokens", json={**body, "model": "bob"}), 404)


async def test_cached_tokens(served):
    served.script = Script(letters(served.tokenizer, "hello"), cached=4)
    usage = (await served.ask(RESPONSES)).json()["usage"]
    assert usage["input_tokens_details"]["cached_tokens"] == 4
    other = (await served.ask(MESSAGES)).json()["usage"]
    assert (other["input_tokens"] + 4, other["cache_read_input_tokens"]) == (usage["input_tokens"], 4)
    assert '"cache_read_input_tokens":4' in (await served.ask(MESSAGES, stream=True)).text.partition("ping")[0]


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with gateway_in_thread(byte_level(tmp_path_factory.mktemp("model"))) as gateway:
        yield gateway


def answer(gateway: ScriptedGateway, *texts: str, **more: Any) -> None:
    """Answers the next requests with these texts."""
    gateway.reset()
    gateway.scripts[:] = [Script(letters(gateway.deps.tokenizer, text), **more) for text in texts]
    gateway.call(gateway.catalog.add("ann", "/adapters/ann"))


def test_openais_client(gateway: ScriptedGateway) -> None:
    answer(gateway, "hello world")
    url = f"{gateway.urls['http']}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        reply = client.responses.create(
            model="ann", input="hi", instructions="be brief", temperature=0, store=True, max_output_tokens=40,
            include=["message.output_text.logprobs"], top_logprobs=1, extra_body={"top_k": 5},
        )  # fmt: skip
        assert (reply.output_text, reply.status, reply.error) == ("hello world", "completed", None)
        assert reply.output[0].content[0].logprobs[0].token == "h"
        assert (reply.usage.output_tokens, reply.usage.total_tokens) == (12, reply.usage.input_tokens + 12)
        cut = client.responses.create(model="ann", input="hi", max_output_tokens=3)
        assert (cut.output_text, cut.status, cut.incomplete_details.reason) == (
            "hel",
            "incomplete",
            "max_output_tokens",
        )
        with client.responses.stream(model="ann", input="hi") as stream:
            deltas = [event.delta for event in stream if event.type == "response.output_text.delta"]
            assert stream.get_final_response().output_text == "".join(deltas) == "hello world"
        history = [*USER, *reply.output, {"role": "user", "content": "more"}]
        raw = client.responses.create(model="ann", input=history, stream=True)
        assert [event.type for event in raw][-1] == "response.completed"
        with pytest.raises(openai.NotFoundError):
            client.responses.create(model="bob", input="hi")
        with pytest.raises(openai.BadRequestError, match="aren't stored") as bad:
            client.responses.create(model="ann", input="hi", previous_response_id="resp_1")
        assert bad.value.param == "previous_response_id"
    assert {request.adapter.name for request in gateway.generator.requests} == {"ann"}
    assert gateway.generator.requests[0].sampling.top_k == 5


async def test_openais_async_client(gateway: ScriptedGateway) -> None:
    answer(gateway, "hello world")
    url = f"{gateway.urls['http']}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as client:
        assert (await client.responses.create(model="ann", input="hi")).output_text == "hello world"
        async with client.responses.stream(model="ann", input="hi") as stream:
            kinds = [event.type async for event in stream]
            assert (await stream.get_final_response()).output_text == "hello world"
    assert kinds[-1] == "response.completed"


def test_anthropics_client(gateway: ScriptedGateway) -> None:
    answer(gateway, "hello world")
    with anthropic.Anthropic(base_url=gateway.urls["http"], api_key="none", max_retries=0) as client:
        user: Any = USER
        reply = client.messages.create(model="ann", max_tokens=40, messages=user, system="be brief")
        assert (reply.content[0].text, reply.stop_reason) == ("hello world", "end_turn")
        assert reply.usage.output_tokens == 12
        stopped = client.messages.create(model="ann", max_tokens=40, messages=user, stop_sequences=["o w"])
        assert (stopped.content[0].text, stopped.stop_reason, stopped.stop_sequence) == ("hell", "stop_sequence", "o w")
        with client.messages.stream(model="ann", max_tokens=3, messages=user) as stream:
            assert "".join(stream.text_stream) == "hel"
            final = stream.get_final_message()
        assert (final.stop_reason, final.usage.output_tokens) == ("max_tokens", 3)
        assert final.usage.input_tokens == client.messages.count_tokens(model="ann", messages=user).input_tokens
        with pytest.raises(anthropic.NotFoundError, match="bob"):
            client.messages.create(model="bob", max_tokens=3, messages=user)
        with pytest.raises(anthropic.BadRequestError, match="max_tokens"):
            client.messages.create(model="ann", max_tokens=-1, messages=user)
        answer(gateway, "hello world", fail=WorkerLost("it died"), fail_after=3)
        with (
            client.messages.stream(model="ann", max_tokens=9, messages=user) as stream,
            pytest.raises(anthropic.APIStatusError, match="it died"),
        ):
            stream.until_done()


async def test_anthropics_async_client(gateway: ScriptedGateway) -> None:
    answer(gateway, "hello world")
    user: Any = USER
    async with anthropic.AsyncAnthropic(base_url=gateway.urls["http"], api_key="none", max_retries=0) as client:
        reply = await client.messages.create(model="ann", max_tokens=40, messages=user)
        assert reply.content[0].text == "hello world"
        async with client.messages.stream(model="ann", max_tokens=40, messages=user) as stream:
            assert "".join([text async for text in stream.text_stream]) == "hello world"
