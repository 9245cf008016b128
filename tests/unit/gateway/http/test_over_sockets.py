"""The app behind a real uvicorn, with the official client and with clients that go away."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace

import openai
import pytest

from preft.core.errors import QueueFull, WorkerLost
from preft.core.request import FinishReason
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.served_app import served_app


@pytest.fixture
async def served(tokenizer) -> AsyncIterator[SimpleNamespace]:
    hello = tuple(tokenizer._backend.token_to_id(char) for char in "helloĠworld")
    state = SimpleNamespace(script=Script(hello, delay=0.002, finish=FinishReason.LENGTH))
    state.generator = FakeGenerator(lambda request: state.script)
    state.deps = GatewayDeps("base", tokenizer, 512, state.generator, FakeCatalog.of(ann="/adapters/ann"))
    async with served_app(create_app(state.deps)) as state.port:
        base_url = f"http://127.0.0.1:{state.port}/v1"
        async with openai.AsyncOpenAI(base_url=base_url, api_key="none", max_retries=0) as state.client:
            yield state


async def test_completions(served):
    whole = await served.client.completions.create(model="ann", prompt="hi", max_tokens=50, logprobs=2)
    assert whole.choices[0].text == "hello world"
    assert whole.choices[0].finish_reason == "length"
    assert whole.usage.completion_tokens == 11
    assert "".join(whole.choices[0].logprobs.tokens) == "hello world"
    stream = await served.client.completions.create(
        model="ann", prompt="hi", stream=True, stream_options={"include_usage": True}, extra_body={"top_k": 5}
    )
    chunks = [chunk async for chunk in stream]
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == "hello world"
    assert chunks[-1].usage.completion_tokens == 11
    assert served.generator.requests[-1].sampling.top_k == 5


async def test_chat_completions(served):
    messages = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
    whole = await served.client.chat.completions.create(model="base", messages=messages, logprobs=True, top_logprobs=1)
    assert whole.choices[0].message.content == "hello world"
    assert whole.choices[0].logprobs.content[0].top_logprobs[0].token == "h"
    again = [*messages, whole.choices[0].message.model_dump(), {"role": "user", "content": "more"}]
    stream = await served.client.chat.completions.create(model="base", messages=again, stream=True, n=2)
    texts = ["", ""]
    async for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content
    assert texts == ["hello world"] * 2


async def test_models_and_errors(served):
    assert [model.id async for model in served.client.models.list()] == ["base", "ann"]
    with pytest.raises(openai.NotFoundError, match="bob"):
        await served.client.completions.create(model="bob", prompt="hi")
    with pytest.raises(openai.BadRequestError) as bad:
        await served.client.completions.create(model="base", prompt="hi", extra_body={"temprature": 1})
    assert bad.value.param == "temprature"
    served.script = Script(fail=QueueFull("full"))
    with pytest.raises(openai.RateLimitError):
        await served.client.completions.create(model="base", prompt="hi", stream=True)
    served.script = Script((70, 71, 72), fail=WorkerLost("the decode worker died"), fail_after=2)
    stream = await served.client.completions.create(model="base", prompt="hi", stream=True)
    with pytest.raises(openai.APIError, match="decode worker died"):
        [chunk async for chunk in stream]


@asynccontextmanager
async def request(port: int, **body: object) -> AsyncIterator[asyncio.StreamReader]:
    """A request on a socket of its own, which is closed without reading on when the context is left."""
    data = json.dumps({"model": "base", "prompt": "hi", "max_tokens": 400, **body}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    writer.write(head + b"Content-Length: %d\r\n\r\n" % len(data) + data)
    await writer.drain()
    try:
        yield reader
    finally:
        writer.transport.abort()


async def until(condition) -> None:
    limit = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < limit, "took too long"
        await asyncio.sleep(0.01)


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_goes_away_cancels_its_work(served, stream):
    served.script = Script(tuple([70] * 400), delay=0.01)
    async with request(served.port, stream=stream) as reader:
        if stream:
            await reader.readuntil(b'"text":')
        await until(lambda: served.generator.entered)
    await until(lambda: served.generator.cancelled)
    assert served.generator.left == served.generator.entered
    value = served.deps.registry.get_sample_value
    assert value("preft_requests_total", {"kind": "base", "status": "cancelled"}) == 1
    assert value("preft_requests_running", {"kind": "base"}) == 0


async def test_a_client_that_goes_away_before_the_first_token(served):
    served.script = Script((70,), delay=60)
    async with request(served.port, stream=True, prompt=["a", "b"], n=2):
        await until(lambda: len(served.generator.entered) == 2)
    await until(lambda: len(served.generator.cancelled) == 2)


async def test_a_client_that_does_not_read_holds_nobody_up(served):
    served.script = Script(tuple([70] * 400))
    async with request(served.port, stream=True, n=100):
        await until(lambda: served.generator.entered)
        stream = await served.client.completions.create(model="base", prompt="hi", stream=True, max_tokens=5)
        assert len([chunk async for chunk in stream]) == 5
    await until(lambda: len(served.generator.left) == 2)


async def test_queued_deltas_share_a_write_and_keep_their_events(served):
    served.script = Script(tuple([70] * 100))
    stream = await served.client.completions.create(model="base", prompt="hi", stream=True, max_tokens=100)
    assert len([chunk async for chunk in stream]) == 100


@pytest.mark.parametrize("stream", [True, False])
async def test_a_time_limit_of_the_caller(served, stream):
    limited = {"extra_headers": {"preft-timeout": "30.5"}, "stream": stream}
    before = time.time()
    await served.client.completions.create(model="base", prompt="hi", **limited)
    await served.client.chat.completions.create(model="base", messages=[{"role": "user", "content": "hi"}], **limited)
    assert [30 <= request.deadline - before < 120 for request in served.generator.requests] == [True, True]
    for wrong in ("0", "-1", "soon", "nan", "inf", ""):
        with pytest.raises(openai.BadRequestError) as bad:
            await served.client.completions.create(
                model="base", prompt="hi", extra_headers={"preft-timeout": wrong}, stream=stream
            )
        assert bad.value.param == "preft-timeout"
