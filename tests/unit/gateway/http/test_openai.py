from __future__ import annotations

import asyncio
import json
import math
import threading
from collections.abc import Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from preft.core.cluster import Adapter
from preft.core.errors import EngineFailed, QueueFull, TransferFailed, Unavailable, WorkerLost
from preft.core.request import AdapterRef, FinishReason, TokenLogprob
from preft.gateway import api_call
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.app import create_app
from preft.gateway.text.tokenizer import Tokenizer
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.small_tokenizers import byte_level

MAX_LEN = 64
JSON = {"content-type": "application/json"}
USER = [{"role": "user", "content": "hi"}]


class Gateway:
    """The app over a fake generator, with a client that speaks ASGI to it."""

    def __init__(self, tokenizer: Tokenizer, **deps: Any) -> None:
        self.tokenizer = tokenizer
        self.script = Script(self.letters("hello world"), finish=FinishReason.LENGTH)
        self.generator = FakeGenerator(lambda request: self.script)
        self.catalog = FakeCatalog.of(ann="/adapters/ann")
        self.deps = GatewayDeps("base", tokenizer, MAX_LEN, self.generator, self.catalog, **deps)
        self.app = create_app(self.deps)
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.client = httpx.AsyncClient(transport=transport, base_url="http://localhost")

    def ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer._backend.encode(text, add_special_tokens=False).ids)

    def letters(self, text: str) -> tuple[int, ...]:
        """One token per character."""
        return tuple(self.tokenizer._backend.token_to_id(char) for char in text.replace(" ", "Ġ"))

    async def complete(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/completions", json={"model": "base", "prompt": "hi", **body})

    async def chat(self, **body: Any) -> httpx.Response:
        return await self.client.post("/v1/chat/completions", json={"model": "base", "messages": USER, **body})


@pytest.fixture
async def gateway(tokenizer: Tokenizer):
    gateway = Gateway(tokenizer)
    async with gateway.client:
        yield gateway


def events(response: httpx.Response) -> list[dict[str, Any]]:
    """The JSON events of a stream that ends as it must."""
    assert response.headers["content-type"].startswith("text/event-stream")
    parts = response.text.split("\n\n")
    assert parts[-2:] == ["data: [DONE]", ""]
    return [json.loads(part.removeprefix("data: ")) for part in parts[:-2]]


def error(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    assert response.json()["error"].keys() == {"message", "type", "param", "code"}
    return response.json()["error"]


async def test_a_completion(gateway):
    response = await gateway.complete(max_tokens=20)
    body = response.json()
    assert body["id"].startswith("cmpl-")
    assert response.headers["x-request-id"] == body["id"]
    assert body["object"] == "text_completion"
    assert body["model"] == "base"
    [choice] = body["choices"]
    count = len(gateway.script.tokens)
    assert choice == {
        "index": 0,
        "text": "hello world",
        "logprobs": None,
        "finish_reason": "length",
        "stop_reason": None,
        "prompt_logprobs": None,
    }
    assert body["usage"] == {
        "prompt_tokens": 3,
        "completion_tokens": count,
        "total_tokens": 3 + count,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    [request] = gateway.generator.requests
    assert request.prompt_token_ids == (0, *gateway.ids("hi"))
    assert request.request_id == body["id"]
    assert request.sampling.max_tokens == 20
    assert request.sampling.eos_token_ids == (1, 2)
    assert request.adapter is None
    assert gateway.generator.left == [request.request_id]
    assert gateway.generator.cancelled == []


async def test_a_streamed_completion(gateway):
    response = await gateway.complete(stream=True, stream_options={"include_usage": True})
    *chunks, usage = events(response)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello world"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert {chunk["id"] for chunk in chunks} == {response.headers["x-request-id"]}
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == len(gateway.script.tokens)
    assert {chunk["usage"] for chunk in chunks} == {None}
    assert all("usage" not in chunk for chunk in events(await gateway.complete(stream=True)))


async def test_a_chat(gateway):
    body = (await gateway.chat()).json()
    assert body["id"].startswith("chatcmpl-")
    assert body["object"] == "chat.completion"
    [choice] = body["choices"]
    assert choice["message"] == {"role": "assistant", "content": "hello world", "refusal": None}
    [request] = gateway.generator.requests
    assert gateway.tokenizer.decode(request.prompt_token_ids, skip_special_tokens=False) == (
        "<|bos|><|user|>hi<|eot|><|assistant|>"
    )
    assert request.sampling.max_tokens == MAX_LEN - len(request.prompt_token_ids)


async def test_a_streamed_chat(gateway):
    first, *chunks = events(await gateway.chat(stream=True, n=2, temperature=1))
    assert first["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for index in range(2):
        own = [chunk["choices"][0] for chunk in [first, *chunks] if chunk["choices"][0]["index"] == index]
        assert [choice["delta"].get("role") for choice in own] == ["assistant"] + [None] * (len(own) - 1)
        assert "".join(choice["delta"]["content"] for choice in own) == "hello world"
        assert [choice["finish_reason"] for choice in own] == [None] * (len(own) - 1) + ["length"]
    assert first["object"] == "chat.completion.chunk"


@pytest.mark.parametrize("stream", [False, True])
async def test_adapters_are_resolved_to_their_version(gateway, stream):
    adapter = gateway.catalog.get("ann")
    response = await gateway.complete(model="ann", stream=stream)
    assert '"model":"ann"' in response.text
    assert gateway.generator.requests[0].adapter == AdapterRef("ann", adapter.digest, adapter.source)


@pytest.mark.parametrize("api", ["complete", "chat"])
async def test_a_model_may_name_the_current_version_and_no_other(gateway, api):
    await gateway.catalog.add("ann", "/adapters/ann-2", replace=True)
    adapter = gateway.catalog.get("ann")
    assert adapter.version == 2
    for version in ("2", adapter.digest, adapter.digest[:12], adapter.digest[:16]):
        response = await getattr(gateway, api)(model=f"ann@{version}")
        assert response.json()["model"] == f"ann@{version}"
        assert gateway.generator.requests.pop().adapter == AdapterRef("ann", adapter.digest, adapter.source)
        assert (await gateway.client.get(f"/v1/models/ann@{version}")).json()["id"] == "ann"
    old = FakeCatalog.of(ann="/adapters/ann").get("ann").digest
    for version in (
        "1",
        "3",
        "02",
        "",
        "latest",
        old,
        old[:16],
        adapter.digest[:11],
        adapter.digest.upper(),
        "@2",
        "2@2",
    ):
        found = error(await getattr(gateway, api)(model=f"ann@{version}"), 404)
        assert found["code"] == "model_not_found"
        error(await gateway.client.get(f"/v1/models/ann@{version}"), 404)
    for model in ("bob@1", "base@1", "@1", "@"):
        error(await getattr(gateway, api)(model=model), 404)
    assert gateway.generator.requests == []


@pytest.mark.parametrize("api", ["complete", "chat"])
async def test_an_unknown_model_is_404(gateway, api):
    found = error(await getattr(gateway, api)(model="bob", stream=True), 404)
    assert found["code"] == "model_not_found"
    await gateway.catalog.remove("ann")
    error(await getattr(gateway, api)(model="ann"), 404)
    assert gateway.generator.requests == []


@pytest.mark.parametrize("api", ["complete", "chat"])
async def test_a_name_that_could_be_base_or_adapter_is_neither(gateway, api):
    """Another server that shares the catalog calls its base model otherwise."""
    other = FakeCatalog.of(base="/adapters/other")
    gateway.catalog.put(other.get("base"))
    assert "ambiguous" in error(await getattr(gateway, api)(), 404)["message"]
    assert gateway.generator.requests == []


async def test_several_prompts_and_choices(gateway):
    answers = {gateway.ids("one"): "first", gateway.ids("two"): "other"}
    gateway.generator.script = lambda request: Script(gateway.letters(answers[request.prompt_token_ids]), delay=0.001)
    prompts = [list(gateway.ids("one")), list(gateway.ids("two"))]
    body = (await gateway.complete(prompt=prompts, n=2)).json()
    assert [choice["index"] for choice in body["choices"]] == [0, 1, 2, 3]
    assert [choice["text"] for choice in body["choices"]] == ["firs", "firs", "othe", "othe"]  # the last ends them
    assert body["usage"]["prompt_tokens"] == sum(map(len, prompts))
    assert body["usage"]["completion_tokens"] == 20
    ids = [request.request_id for request in gateway.generator.requests]
    assert ids == [f"{body['id']}-0", f"{body['id']}-1"]
    texts = ["", "", "", ""]
    for chunk in events(await gateway.complete(prompt=["one", "two"], n=2, stream=True, add_special_tokens=False)):
        texts[chunk["choices"][0]["index"]] += chunk["choices"][0]["text"]
    assert texts == ["firs", "firs", "othe", "othe"]


async def test_sampling_parameters_reach_the_workers(gateway):
    await gateway.complete(
        max_tokens=9, min_tokens=2, temperature=0.5, top_p=0.8, top_k=-1, min_p=0.1, presence_penalty=1, seed=7,
        frequency_penalty=-1, repetition_penalty=1.2, ignore_eos=True, stop_token_ids=[9, 9], logit_bias={"5": -3}, n=3,
    )  # fmt: skip
    [request] = gateway.generator.requests
    sampling = request.sampling
    assert request.n == 3
    assert (sampling.max_tokens, sampling.min_tokens, sampling.temperature, sampling.top_p) == (9, 2, 0.5, 0.8)
    assert (sampling.top_k, sampling.min_p, sampling.presence_penalty, sampling.frequency_penalty) == (0, 0.1, 1, -1)
    assert (sampling.repetition_penalty, sampling.seed, sampling.ignore_eos) == (1.2, 7, True)
    assert (sampling.stop_token_ids, dict(sampling.logit_bias), sampling.logprobs) == ((9,), {5: -3.0}, None)


async def test_lengths_are_judged_before_any_work(gateway):
    long = list(range(4, 4 + MAX_LEN))
    found = error(await gateway.complete(prompt=long), 400)
    assert found["param"] == "prompt"
    assert "64" in found["message"]
    found = error(await gateway.complete(prompt=long[:60], max_tokens=65), 400)
    assert found["param"] == "max_tokens"
    assert all(number in found["message"] for number in ("65", "64"))
    assert error(await gateway.complete(prompt=long[:60], max_tokens=64, min_tokens=5), 400)["param"] == "min_tokens"
    found = error(await gateway.complete(max_tokens=3, min_tokens=4), 400)
    assert found["param"] == "min_tokens"
    assert error(await gateway.chat(messages=[{"role": "user", "content": "x" * 500}]), 400)["param"] == "messages"
    assert gateway.generator.requests == []
    await gateway.complete(prompt=long[:60])
    await gateway.complete()
    await gateway.complete(prompt=long[:60], max_tokens=64)  # vLLM gives what fits, too
    assert [request.sampling.max_tokens for request in gateway.generator.requests] == [4, 16, 4]


async def test_a_text_that_cant_be_short_enough_is_refused_before_it_is_tokenized(gateway, monkeypatch):
    most = MAX_LEN * gateway.tokenizer.chars_per_token
    assert "tokens" in error(await gateway.complete(prompt="x" * most), 400)["message"].split("characters")[0]

    async def encode(*_: Any, **__: Any) -> None:
        raise AssertionError("it was tokenized")

    monkeypatch.setattr(gateway.tokenizer, "encode", encode)
    for prompt in ("x" * (most + 1), ["hi", "x" * (most + 1)]):
        found = error(await gateway.complete(prompt=prompt), 400)
        assert (found["param"], f"{most + 1} characters" in found["message"]) == ("prompt", True)
    found = error(await gateway.chat(messages=[{"role": "user", "content": "x" * most}]), 400)
    assert (found["param"], "characters" in found["message"]) == ("messages", True)


@pytest.mark.parametrize(
    ("body", "in_thread"),
    [
        ({}, False),
        ({"chat_template_kwargs": {"thinking": False}}, False),
        ({"messages": USER * 2000}, True),
        ({"messages": [{"role": "user", "content": "x" * 10_000}]}, True),
        ({"chat_template_kwargs": {"custom_tools": [{}]}}, True),
        ({"tools": [{"function": {"name": "f"}}], "tool_choice": "none"}, True),
    ],
)
async def test_large_chats_are_rendered_in_a_thread(gateway, monkeypatch, body, in_thread):
    render, threads = gateway.tokenizer.chat_prompt.render, []

    def watched(*arguments: Any, **options: Any) -> str:
        threads.append(threading.current_thread())
        return render(*arguments, **options)

    monkeypatch.setattr(gateway.tokenizer.chat_prompt, "render", watched)
    await gateway.chat(**body)
    assert [thread is not threading.main_thread() for thread in threads] == [in_thread]


async def test_many_token_ids_are_checked_in_a_thread(gateway, monkeypatch):
    check, threads = api_call.check_ids, []

    def watched(*arguments: Any) -> None:
        threads.append(threading.current_thread())
        check(*arguments)

    monkeypatch.setattr(api_call, "check_ids", watched)
    monkeypatch.setattr(api_call, "INLINE_IDS", 100)
    for count, in_thread in (2, False), (3, True):
        threads.clear()
        assert (await gateway.complete(prompt=[[5] * 50] * count)).status_code == 200
        assert {thread is not threading.main_thread() for thread in threads} == {in_thread}


@pytest.mark.parametrize("n", [1, 2, 5])
async def test_no_choice_of_a_seeded_request_goes_without_a_seed(gateway, n):
    """Choice i has `seed + i`, and -1 is none for vLLM, which takes 64 bits."""
    ends = (-(2**63), 2**63 - 1)
    for seed in (*range(-7, -1), *range(3), *ends, ends[0] + 1, ends[1] - 3):
        gateway.generator.requests.clear()
        await gateway.complete(seed=seed, n=n)
        [request] = gateway.generator.requests
        seeds = [request.sampling.seed + index for index in range(n)]
        assert -1 not in seeds
        assert all(ends[0] <= number <= ends[1] for number in seeds)
        assert seeds[0] == seed or not -1 < seed + n - 1 <= ends[1] or seed < 0


@pytest.mark.parametrize("seed", [-1, -1.0])
async def test_minus_one_is_no_seed(gateway, seed):
    found = error(await gateway.complete(seed=seed), 400)
    assert (found["param"], "leave it out" in found["message"]) == ("seed", True)


@pytest.mark.parametrize("api", ["complete", "chat"])
async def test_a_callers_id_is_a_part_of_the_replys(gateway, api):
    """Twice the same id is fine: workers see another each time."""
    prefix = {"complete": "cmpl", "chat": "chatcmpl"}[api]
    for stream in (False, True):
        response = await getattr(gateway, api)(request_id="my-1", stream=stream)
        assert response.headers["x-request-id"] == f"{prefix}-my-1"
        ids = [event["id"] for event in events(response)] if stream else [response.json()["id"]]
        assert set(ids) == {f"{prefix}-my-1"}
    first, second = (request.request_id for request in gateway.generator.requests)
    assert first != second
    assert first.startswith(f"{prefix}-my-1-")
    for bad in ("", "a b", "a\r\nx: y", "é", "x" * 129, "a\n", 5):
        assert error(await getattr(gateway, api)(request_id=bad), 400)["param"] == "request_id"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("api", ["complete", "chat"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("place", ["sampled", "top"])
async def test_numbers_that_are_no_probabilities_end_the_request(gateway, api, stream, value, place):
    entry = TokenLogprob(70, value, 1) if place == "sampled" else TokenLogprob(70, -1.0, 1, ((70, -1.0), (71, value)))
    gateway.script = Script((70, 70, 70), logprobs=(entry, entry, entry))
    wanted = {"logprobs": 2} if api == "complete" else {"logprobs": True, "top_logprobs": 2}
    response = await getattr(gateway, api)(stream=stream, **wanted)
    assert error(response, 500)["code"] == "numbers_not_finite"


@pytest.mark.parametrize("api", ["complete", "chat"])
async def test_what_can_not_be_sampled_has_a_number_in_json(gateway, api):
    entry = TokenLogprob(70, -math.inf, 1, ((70, -1.0), (71, -math.inf)))
    gateway.script = Script((70,), logprobs=(entry,))
    wanted = {"logprobs": 2} if api == "complete" else {"logprobs": True, "top_logprobs": 2}
    for stream in (False, True):
        text = (await getattr(gateway, api)(stream=stream, **wanted)).text
        assert text.count("-9999.0") >= 2
        assert "Infinity" not in text


async def test_streams_of_chats_say_usage_last(gateway):
    body = {"stream": True, "stream_options": {"include_usage": True}}
    for more in ({}, {"logprobs": True}, {"return_token_ids": True}, {"n": 2, "temperature": 1}):
        *chunks, last = events(await gateway.chat(**body, **more))
        assert {chunk["usage"] for chunk in chunks} == {None}
        assert (last["choices"], last["usage"]["completion_tokens"]) == ([], 11 * more.get("n", 1))


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": [5, 100_000]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"stop_token_ids": [100_000]}, "stop_token_ids"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"prompt": ["a"] * 100, "n": 100}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"temperture": 1}, "temperture"),
    ],
)
async def test_bad_requests_name_the_parameter(gateway, body, param):
    assert error(await gateway.complete(**body), 400)["param"] == param


async def test_stop_strings_cancel_the_choice(gateway):
    response = await gateway.complete(stop=["o w"], max_tokens=30)
    [choice] = response.json()["choices"]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("hell", "stop", "o w")
    assert gateway.generator.generations[0].stopped == {0}
    chunks = events(await gateway.complete(stop="o w", stream=True, include_stop_str_in_output=True))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "hello w"
    assert chunks[-1]["choices"][0]["stop_reason"] == "o w"


async def test_logprobs_of_completions(gateway):
    body = (await gateway.complete(logprobs=2)).json()
    logprobs = body["choices"][0]["logprobs"]
    assert "".join(logprobs["tokens"]) == "hello world"
    assert logprobs["text_offset"] == [sum(map(len, logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))]
    assert set(logprobs["token_logprobs"]) == {-0.5}
    assert all(top[token] == -0.5 for token, top in zip(logprobs["tokens"], logprobs["top_logprobs"], strict=True))
    assert gateway.generator.requests[0].sampling.logprobs == 2
    chunks = events(await gateway.complete(logprobs=2, stream=True))
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    for name, whole in logprobs.items():
        assert [value for part in streamed for value in part[name]] == whole
    as_ids = (await gateway.complete(logprobs=0, return_tokens_as_token_ids=True)).json()["choices"][0]["logprobs"]
    assert as_ids["tokens"] == [f"token_id:{id}" for id in gateway.script.tokens]
    assert [len(top) for top in as_ids["top_logprobs"]] == [1] * len(gateway.script.tokens)


async def test_logprobs_of_chats(gateway):
    body = (await gateway.chat(logprobs=True, top_logprobs=2)).json()
    content = body["choices"][0]["logprobs"]["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]).decode() == "hello world"
    assert [len(entry["top_logprobs"]) for entry in content] == [2] * len(content)
    assert content[0]["top_logprobs"][0]["logprob"] == -0.5
    chunks = events(await gateway.chat(logprobs=True, stream=True))
    streamed = [entry for chunk in chunks for entry in (chunk["choices"][0]["logprobs"] or {"content": []})["content"]]
    assert [entry["token"] for entry in streamed] == [entry["token"] for entry in content]
    assert all(entry["top_logprobs"] == [] for entry in streamed)


async def test_token_ids_on_demand(gateway):
    tokens, prompt = list(gateway.script.tokens), [0, *gateway.ids("hi")]
    [choice] = (await gateway.complete(return_token_ids=True)).json()["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == (tokens, prompt)
    chunks = [chunk["choices"][0] for chunk in events(await gateway.complete(return_token_ids=True, stream=True))]
    assert [id for chunk in chunks for id in chunk["token_ids"]] == tokens
    assert [chunk.get("prompt_token_ids") for chunk in chunks] == [prompt] + [None] * (len(chunks) - 1)
    body = (await gateway.chat(return_token_ids=True)).json()
    assert body["choices"][0]["token_ids"] == tokens
    assert body["prompt_token_ids"] == list(gateway.generator.requests[-1].prompt_token_ids)
    first, *rest = events(await gateway.chat(return_token_ids=True, stream=True))
    assert first["prompt_token_ids"] == body["prompt_token_ids"]
    assert [id for chunk in rest for id in chunk["choices"][0]["token_ids"]] == tokens


async def test_continuous_usage(gateway):
    options = {"include_usage": True, "continuous_usage_stats": True}
    chunks = events(await gateway.complete(stream=True, stream_options=options))
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks[:-1]]
    assert counts == list(range(1, 12))
    gateway.script = Script(gateway.letters("hello world"), chunk=4)
    chunks = events(await gateway.complete(stream=True, stream_options=options))
    assert [chunk["usage"]["completion_tokens"] for chunk in chunks] == [4, 8, 11, 11]


async def test_cached_tokens_are_reported(gateway):
    gateway.script = Script(gateway.ids("a b"), cached=2)
    body = (await gateway.complete(prompt=["hi there", "ho there"])).json()
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 4}


async def test_the_end_token_first(gateway):
    gateway.script = Script((1,), finish=FinishReason.STOP)
    body = (await gateway.complete()).json()
    assert (body["choices"][0]["text"], body["choices"][0]["finish_reason"]) == ("", "stop")
    assert body["usage"]["completion_tokens"] == 1
    [chunk] = events(await gateway.complete(stream=True))
    assert chunk["choices"][0]["finish_reason"] == "stop"


FAILURES = [
    (QueueFull("the queue is full", 2.5), 429, "queue_full"),
    (Unavailable("no worker"), 503, "unavailable"),
    (WorkerLost("gone"), 503, "worker_lost"),
    (TransferFailed("checksum"), 502, "kv_transfer_failed"),
    (EngineFailed("boom"), 500, "engine_failed"),
    (ValueError("a bug"), 500, "internal_error"),
]


@pytest.mark.parametrize("api", ["complete", "chat"])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [None, 0])
@pytest.mark.parametrize(("failure", "status", "code"), FAILURES)
async def test_what_fails_before_the_first_token_is_a_plain_error(gateway, api, stream, after, failure, status, code):
    gateway.script = Script(gateway.letters("hello"), fail=failure, fail_after=after)
    response = await getattr(gateway, api)(stream=stream)
    found = error(response, status)
    assert found["code"] == code
    assert "bug" not in found["message"]
    assert response.headers.get("retry-after") == ("3" if status == 429 else None)


@pytest.mark.parametrize("api", ["complete", "chat"])
@pytest.mark.parametrize(("failure", "status", "code"), FAILURES)
async def test_what_fails_later_ends_the_stream_with_an_error_event(gateway, api, failure, status, code):
    gateway.script = Script(gateway.letters("hello"), fail=failure, fail_after=2)
    *chunks, last = events(await getattr(gateway, api)(stream=True))
    assert last["error"]["code"] == code
    assert chunks
    assert all(choice["finish_reason"] is None for chunk in chunks for choice in chunk["choices"])
    error(await getattr(gateway, api)(), status)


async def test_a_failing_prompt_cancels_the_others(gateway):
    slow, bad = gateway.ids("slow"), gateway.ids("bad")
    gateway.generator.script = lambda request: (
        Script(slow, delay=10)
        if request.prompt_token_ids == slow
        else Script(bad, fail=EngineFailed("x"), fail_after=0)
    )
    error(await gateway.complete(prompt=[list(slow), list(bad)]), 500)
    assert [id.endswith("-0") for id in gateway.generator.cancelled] == [True]
    assert len(gateway.generator.left) == 2


async def test_a_generation_that_ends_early_is_an_error(gateway):
    gateway.script = Script(gateway.ids("hello"), never_finish=True)
    error(await gateway.complete(), 500)
    *_, last = events(await gateway.complete(stream=True))
    assert last["error"]["code"] == "engine_failed"


async def test_a_finish_in_a_delta_of_its_own(gateway):
    gateway.script = Script(gateway.ids("hello"), finish=FinishReason.LENGTH, finish_apart=True)
    assert (await gateway.complete()).json()["choices"][0]["finish_reason"] == "length"
    assert events(await gateway.chat(stream=True))[-1]["choices"][0]["finish_reason"] == "length"


async def test_an_error_after_the_answer_does_not_spoil_it(gateway, caplog):
    inner = gateway.generator.generate

    @asynccontextmanager
    async def leaves_badly(request):
        async with inner(request) as generation:
            yield generation
        raise WorkerLost("while releasing the handle")

    gateway.generator.generate = leaves_badly
    assert (await gateway.complete()).json()["choices"][0]["text"] == "hello world"
    assert events(await gateway.complete(stream=True))[-1]["choices"][0]["finish_reason"] == "length"
    assert caplog.text.count("releasing the handle") >= 2


PARTS_ONLY = (
    "{% for m in messages %}<{{ m['role'] }}>"
    "{% for c in m['content'] %}{% if c['type'] == 'text' %}{{ c['text'] }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("content", ["hello world", [{"type": "text", "text": "hello world", "annotations": None}]])
async def test_a_template_that_walks_content_parts(tmp_path, content):
    parts = Gateway(Tokenizer.load(byte_level(tmp_path, chat_template=PARTS_ONLY)))
    async with parts.client:
        await parts.chat(messages=[{"role": "system", "content": "be"}, {"role": "user", "content": content}])
    [request] = parts.generator.requests
    assert request.prompt_token_ids == parts.ids("<system>be<user>hello world")


async def test_a_text_that_the_template_leaves_out(tmp_path):
    template = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    deaf = Gateway(Tokenizer.load(byte_level(tmp_path, chat_template=template)))
    async with deaf.client:
        assert (await deaf.chat()).status_code == 200
        found = error(await deaf.chat(messages=[*USER, {"role": "assistant", "content": "no"}]), 400)
    assert found["param"] == "messages[1].content"
    assert "out of the prompt" in found["message"]


async def test_tools_are_shown_if_none_may_be_called(tmp_path):
    template = "{% for t in tools or [] %}{{ t.function.name }}{% endfor %}{{ messages[0].content }}"
    shows = Gateway(Tokenizer.load(byte_level(tmp_path, chat_template=template)))
    tools = [{"type": "function", "function": {"name": "look"}}]
    async with shows.client:
        assert (await shows.chat(tools=tools, tool_choice="none")).status_code == 200
        assert error(await shows.chat(tools=tools), 400)["param"] == "tools"
        assert error(await shows.chat(tools=tools, tool_choice={"type": "function"}), 400)["param"] == "tool_choice"
        assert (await shows.chat(tools=[], tool_choice="auto")).status_code == 200
    assert shows.generator.requests[0].prompt_token_ids == shows.ids("lookhi")


async def test_no_chat_template(tmp_path):
    bare = Gateway(Tokenizer.load(byte_level(tmp_path, chat_template=None)))
    async with bare.client:
        found = error(await bare.chat(), 400)
        assert "chat template" in found["message"]
        assert (await bare.complete()).status_code == 200


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [("GET", "/nowhere", 404, "not_found"), ("GET", "/v1/completions", 405, "method_not_allowed")],
)
async def test_wrong_paths_and_methods(gateway, method, path, status, code):
    response = await gateway.client.request(method, path)
    assert error(response, status)["code"] == code
    assert (response.headers.get("allow") == "OPTIONS, POST") == (status == 405)


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b'{"model": "base", "prompt": "hi"'])
async def test_malformed_json(gateway, data):
    response = await gateway.client.post("/v1/completions", content=data, headers=JSON)
    assert error(response, 400)["code"] == "invalid_request"


@pytest.mark.parametrize(
    "body",
    [{"model": "x" * 100_000}, {"x" * 100_000: 1}, {"logit_bias": {"9" * 100_000: 1}}, {"prompt": [10**4000]}],
)
async def test_an_error_is_short_whatever_was_sent(gateway, body):
    response = await gateway.complete(**body)
    assert response.status_code in (400, 404)
    assert len(response.content) < 3000


async def test_bodies_over_the_limit(tokenizer):
    small = Gateway(tokenizer, max_body_bytes=1000)
    async with small.client:
        error(await small.complete(prompt="x" * 1000), 413)

        async def chunks():
            for _ in range(3):
                yield b"x" * 400

        error(await small.client.post("/v1/completions", content=chunks(), headers=JSON), 413)


async def test_large_bodies_are_parsed_in_a_thread(gateway):
    found = error(await gateway.complete(prompt=[5] * 200_000), 400)
    assert "200000" in found["message"]


async def test_models(gateway):
    base, ann = (await gateway.client.get("/v1/models")).json()["data"]
    assert (base["id"], base["parent"], base["max_model_len"]) == ("base", None, MAX_LEN)
    assert (ann["id"], ann["parent"], ann["root"], ann["object"]) == ("ann", "base", "/adapters/ann", "model")
    assert (await gateway.client.get("/v1/models/ann")).json() == ann
    assert (await gateway.client.get("/v1/models/base")).json() == base
    assert error(await gateway.client.get("/v1/models/bob"), 404)["code"] == "model_not_found"


async def test_models_lists_every_adapter_of_a_large_catalog(gateway):
    gateway.catalog.put(*(Adapter(f"user-{i:05}", "d", "/a", rank=8) for i in range(2500)))
    names = [card["id"] for card in (await gateway.client.get("/v1/models")).json()["data"]]
    assert names == ["base", "ann", *(f"user-{i:05}" for i in range(2500))]


async def test_vllms_way_to_load_and_unload(gateway):
    async def load(**body: object) -> httpx.Response:
        return await gateway.client.post("/v1/load_lora_adapter", json=body)

    response = await load(lora_name="bob", lora_path="/adapters/bob")
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'bob' added successfully.")
    assert error(await load(lora_name="bob", lora_path="/adapters/bob2"), 400)["param"] == "lora_name"
    assert (await load(lora_name="bob", lora_path="/adapters/bob2", load_inplace=True)).status_code == 200
    assert gateway.catalog.get("bob").source == "/adapters/bob2"
    assert error(await load(lora_name="eve", lora_path="/broken"), 400)["code"] == "invalid_adapter"
    assert error(await load(lora_name="eve", lora_path="/missing"), 404)["code"] == "adapter_source_not_found"
    assert (await load(lora_name="eve", lora_path="s3://bucket/eve")).status_code == 200
    assert error(await load(lora_name="mia"), 400)["param"] == "lora_path"
    assert error(await load(lora_name="base", lora_path="/x"), 400)["param"] == "lora_name"
    response = await gateway.client.post("/v1/unload_lora_adapter", json={"lora_name": "bob"})
    assert (response.status_code, response.text) == (200, "Success: LoRA adapter 'bob' removed successfully.")
    error(await gateway.client.post("/v1/unload_lora_adapter", json={"lora_name": "bob"}), 404)


async def test_health_and_readiness(gateway):
    assert (await gateway.client.get("/health")).status_code == 200
    assert (await gateway.client.get("/ready")).status_code == 200
    gateway.generator.is_ready = False
    assert (await gateway.client.get("/health")).status_code == 200
    assert (await gateway.client.get("/ready")).status_code == 503


async def test_a_catalog_that_is_not_up_to_date_serves_the_base_model_alone(gateway):
    gateway.catalog.stale = True
    for response in (
        await gateway.complete(model="ann"),
        await gateway.chat(model="ann"),
        await gateway.complete(model="unknown"),
        await gateway.client.get("/v1/models"),
        await gateway.client.get("/v1/adapters"),
    ):
        assert response.status_code == 503
        assert "could not be read for 61 seconds" in response.json()["error"]["message"]
    assert (await gateway.complete()).status_code == 200
    ready = await gateway.client.get("/ready")
    assert (ready.status_code, ready.json()["reason"]) == (503, "the adapter catalog could not be read for 61 seconds")
    gateway.catalog.stale = False
    assert (await gateway.complete(model="ann")).status_code == 200
    assert (await gateway.client.get("/ready")).status_code == 200


async def test_something_cancelled_below_a_request_is_its_error(gateway):
    """Not a client that waits for ever."""
    gateway.script = Script(gateway.letters("hi"), fail=asyncio.CancelledError(), fail_after=1)
    response = await asyncio.wait_for(gateway.complete(), 10)
    assert response.status_code == 500
    assert response.json()["error"]["code"] == "engine_failed"


async def test_metrics(gateway):
    value: Callable[..., float | None] = gateway.deps.registry.get_sample_value
    await gateway.complete(model="ann", stream=True, n=2)
    gateway.script = Script(fail=QueueFull("full"))
    await gateway.complete()
    await gateway.client.get("/nowhere")
    tokens = len("hello world")
    text = (await gateway.client.get("/metrics")).text
    assert 'preft_requests_total{kind="adapter",status="ok"} 1.0' in text
    assert value("preft_requests_total", {"kind": "base", "status": "queue_full"}) == 1
    assert value("preft_generated_tokens_total", {"kind": "adapter"}) == 2 * tokens
    assert value("preft_prompt_tokens_total", {"kind": "adapter"}) == 3
    assert value("preft_time_to_first_token_seconds_count", {"kind": "adapter"}) == 1
    assert value("preft_inter_token_latency_seconds_count", {"kind": "adapter"}) == 2 * (tokens - 1)
    assert value("preft_requests_running", {"kind": "adapter"}) == 0
    assert value("preft_http_responses_total", {"route": "/v1/completions", "status": "429"}) == 1
    assert value("preft_http_responses_total", {"route": "unmatched", "status": "404"}) == 1
