"""Every call, over both transports and in both styles, against the real gateway over fake workers."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest
from pydantic import BaseModel

from preft.core.cluster import Role
from preft.core.request import FinishReason, Sampling
from preft_client import (
    AdapterExists,
    BadReply,
    Generation,
    InvalidAdapter,
    InvalidRequest,
    ModelNotFound,
    NotSupported,
    SourceNotFound,
)
from support.fake_engine import tokens_of
from support.fakes import Script
from support.sdk_clients import a_client
from support.sdk_gateway import ScriptedGateway

from .conftest import Served

PROMPT = [5, 6, 7, 8, 9]
GREEDY = {"temperature": 0, "max_tokens": 12, "ignore_eos": True}
CHAT = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def _clean(served: Served) -> Any:
    """Each test finds the base model and alice alone."""
    yield
    for adapter in served.cluster.gateway.catalog.list():
        if adapter.name != "alice":
            served.cluster.call(served.cluster.gateway.catalog.remove(adapter.name))


def digest_of_alice(served: Served) -> str:
    entry = served.cluster.gateway.catalog.get("alice")
    assert entry is not None
    return entry.digest


def until(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "took too long"
        time.sleep(0.02)


@pytest.mark.parametrize("model", ["base", "alice"])
def test_generate(client: Any, served: Served, model: str) -> None:
    answer = client.generate(PROMPT, model=model, **GREEDY)
    digest = digest_of_alice(served) if model == "alice" else ""
    sampling = Sampling(max_tokens=12, temperature=0, ignore_eos=True)
    assert list(answer.token_ids) == tokens_of(digest, PROMPT, sampling)
    assert answer.text == served.cluster.call(decoded(served, answer.token_ids))
    assert answer.finish_reason == "length"
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (5, 12)
    assert answer.adapter_digest == digest[:16]


async def decoded(served: Served, ids: tuple[int, ...]) -> str:
    from preft.gateway.text.tokenizer import Tokenizer

    tokenizer = await asyncio.to_thread(Tokenizer.load, served.cluster.settings.model)
    return str(tokenizer._backend.decode(list(ids)))


def test_stream(client: Any) -> None:
    whole = client.generate("hello", model="alice", **GREEDY)
    with client.stream("hello", model="alice", **GREEDY) as stream:
        deltas = list(stream)
    assert "".join(delta.text for delta in deltas) == whole.text
    assert [token for delta in deltas for token in delta.token_ids] == list(whole.token_ids)
    assert [delta.finish_reason for delta in deltas] == [*(None for _ in deltas[1:]), "length"]
    assert same(stream.generation, whole)


def test_chat_and_its_stream(client: Any) -> None:
    whole = client.chat(CHAT, model="alice", **GREEDY)
    assert len(whole.token_ids) == 12
    with client.stream_chat(CHAT, model="alice", **GREEDY) as stream:
        assert same(stream.read(), whole)


def same(one: Generation, other: Generation) -> bool:
    """A prefix cache may have served one of them."""
    return (one.choices, one.adapter_digest) == (other.choices, other.adapter_digest)


PARAMETERS: list[dict[str, Any]] = [
    {"logprobs": 3},
    {"n": 3, "seed": 7, "temperature": 1.0},
    {"stop_token_ids": [tokens_of("", PROMPT, Sampling(max_tokens=12, temperature=0, ignore_eos=True))[5]]},
    {"logit_bias": {77: 100.0}},
    {"min_tokens": 3, "top_k": 5, "top_p": 0.9, "min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": 0.5},
    {"repetition_penalty": 1.1, "priority": -1, "user": "someone", "seed": 3},
    {"extra": {"skip_special_tokens": False, "add_special_tokens": False}},
]


@pytest.mark.parametrize("parameters", PARAMETERS, ids=lambda value: "-".join(value))
@pytest.mark.parametrize("kind", ["generate", "chat"])
def test_parameters_mean_the_same_everywhere(
    client: Any, served: Served, parameters: dict[str, Any], kind: str
) -> None:
    """The answer equals that of the blocking client over HTTP, in every field."""
    asked: Any = PROMPT if kind == "generate" else CHAT
    given = {**GREEDY, **parameters}
    with a_client("sync", served.urls["http"]) as reference:
        expected = getattr(reference, kind)(asked, model="base", **given)
    answer = getattr(client, kind)(asked, model="base", **given)
    assert same(answer, expected)
    assert [choice.index for choice in answer.choices] == list(range(parameters.get("n", 1)))
    if "logprobs" in parameters:
        assert len(answer.logprobs) == 12
        assert answer.logprobs[0].token_id == answer.token_ids[0]
        assert len(answer.logprobs[0].top) == 3
    if "stop_token_ids" in parameters and kind == "generate":
        assert answer.choices[0].stop_token_id == parameters["stop_token_ids"][0]
        assert answer.finish_reason == "stop"


def test_stop_strings(scripted: Any) -> None:
    whole = scripted.generate("hi", model="base").text
    assert len(whole) == 5
    cut = scripted.generate("hi", model="base", stop=whole[2:4])
    assert (cut.text, cut.finish_reason) == (whole[:2], "stop")
    assert scripted.generate("hi", model="base", stop=[whole[1]]).text == whole[:1]


@pytest.mark.parametrize(
    ("parameters", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 10_000}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"seed": -1}, "seed"),
        ({"logit_bias": {99_999: 1.0}}, "logit_bias"),
        ({"extra": {"best_of": 5}}, "best_of"),
        ({"extra": {"temprature": 1}}, "temprature"),
    ],
)
def test_wrong_values_name_their_parameter(client: Any, parameters: dict[str, Any], param: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        client.generate("hi", model="base", **parameters)
    assert refused.value.param == param


def test_wrong_names_never_leave_the_process(client: Any) -> None:
    with pytest.raises(TypeError, match="temprature"):
        client.generate("hi", model="base", temprature=1)
    with pytest.raises(TypeError, match="messages"):
        client.chat("hi", model="base")
    with pytest.raises(TypeError, match="prompt"):
        client.generate(["a", "b"], model="base")
    with pytest.raises(TypeError, match="'stream'"):
        client.generate("hi", model="base", extra={"stream": False})


def test_an_unknown_model(client: Any) -> None:
    for call, asked in ((client.generate, "hi"), (client.chat, CHAT)):
        with pytest.raises(ModelNotFound, match="nobody") as refused:
            call(asked, model="nobody")
        assert refused.value.code == "model_not_found"


class City(BaseModel):
    name: str
    people: int


def test_parse(scripted: Any, gateway: ScriptedGateway) -> None:
    """The gateway passes the form on, and the model happens to answer in it."""
    text = '{"name": "Lisbon", "people": 545923}'
    ids = gateway.deps.tokenizer._backend.encode(text, add_special_tokens=False).ids
    gateway.scripts[:] = [Script(ids, finish=FinishReason.LENGTH)]
    answer = scripted.parse(CHAT, City, model="base", max_tokens=100, temperature=0)
    assert answer.value == City(name="Lisbon", people=545923)
    assert answer.generation.text == text
    form = gateway.generator.requests[-1].sampling.structured_outputs
    assert form is not None
    assert form.json is not None
    assert json.loads(form.json)["properties"].keys() == {"name", "people"}
    with pytest.raises(BadReply, match="max_tokens"):
        scripted.parse(CHAT, City, model="base", max_tokens=5)


def test_leaving_a_stream_cancels_the_work(client: Any, served: Served) -> None:
    engine = served.engines[Role.DECODE]
    engine.one_by_one = asyncio.Semaphore(0)
    try:
        for leave in ("block", "cancel"):
            aborts = engine.aborts
            with client.stream(PROMPT, model="base", **GREEDY) as stream:
                first = next(stream)
                assert first.token_ids
                until(lambda: engine.stats.running == 1)
                if leave == "cancel":
                    stream.cancel()
                    until(lambda before=aborts: engine.aborts == before + 1)
                    assert list(stream) == []
            until(lambda before=aborts: engine.aborts == before + 1)
            assert stream.generation.token_ids == first.token_ids
            assert stream.generation.finish_reason is None
            assert served.cluster.idle()
    finally:
        served.cluster.loop.call_soon_threadsafe(setattr, engine, "one_by_one", None)


def test_adapters_by_source(client: Any, served: Served) -> None:
    told: list[tuple[int, int | None]] = []
    adapters, (first, second) = client.adapters, served.loras
    added = adapters.add("bob", str(first), progress=lambda done, total: told.append((done, total)))
    assert (added.name, added.version, added.kind, added.source) == ("bob", 1, "lora", str(first))
    assert told
    assert told[-1][0] <= added.size
    assert adapters.add("bob", str(first)) == added
    with pytest.raises(AdapterExists):
        adapters.add("bob", str(second))
    replaced = adapters.add("bob", str(second), replace=True)
    assert (replaced.version, replaced.digest != added.digest) == (2, True)
    assert adapters.get("bob") == replaced
    assert adapters.wait("bob", version=2) == replaced
    assert client.generate("hi", model="bob@2", max_tokens=2).adapter_digest == replaced.digest[:16]
    assert adapters.pin("bob").pinned
    assert not adapters.unpin("bob").pinned
    assert adapters.remove("bob").name == "bob"
    for call in (adapters.get, adapters.remove, adapters.pin):
        with pytest.raises(ModelNotFound):
            call("bob")


def test_adapters_that_cannot_be(client: Any, served: Served, tmp_path: Any) -> None:
    with pytest.raises(SourceNotFound):
        client.adapters.add("bob", str(served.loras[0].parent / "nothing"))
    with pytest.raises(InvalidRequest) as refused:
        client.adapters.add("a@b", str(served.loras[0]))
    assert refused.value.param == "name"
    with pytest.raises(InvalidRequest):
        client.adapters.page(limit=5000)


def test_pages_of_adapters(client: Any, served: Served) -> None:
    for name in ("dan", "team/bob", "team/carol"):
        client.adapters.add(name, str(served.loras[0]))
    page = client.adapters.page(limit=2)
    assert ([adapter.name for adapter in page.adapters], page.has_more, page.total) == (["alice", "dan"], True, 4)
    rest = client.adapters.page(limit=2, after="dan")
    assert ([adapter.name for adapter in rest.adapters], rest.has_more) == (["team/bob", "team/carol"], False)
    assert [adapter.name for adapter in client.adapters.list(search="TEAM")] == ["team/bob", "team/carol"]
    assert [adapter.name for adapter in client.adapters.list()] == ["alice", "dan", "team/bob", "team/carol"]


def test_upload(client: Any, way: tuple[str, str], served: Served, tmp_path: Any) -> None:
    told: list[tuple[int, int | None]] = []
    folder = served.loras[0]
    if way[0] == "grpc":
        with pytest.raises(NotSupported, match="http://"):
            client.adapters.upload("erin", folder)
        return
    added = client.adapters.upload("erin", folder, progress=lambda done, total: told.append((done, total)))
    assert [done for done, _ in told] == sorted(done for done, _ in told)
    assert told[-1][0] == told[-1][1]
    assert added == client.adapters.get("erin")
    assert client.generate("hi", model="erin", max_tokens=2).adapter_digest == added.digest[:16]
    assert [place.state for place in client.adapters.places("erin")]
    with pytest.raises(AdapterExists):
        client.adapters.upload("erin", served.loras[1])
    assert client.adapters.upload("erin", served.loras[1], replace=True).version == 2
    with pytest.raises(InvalidAdapter, match="missing"):
        client.adapters.upload("frank", tmp_path)


def test_status(client: Any, way: tuple[str, str], served: Served) -> None:
    client.wait_ready()
    assert client.ready()
    if way[0] == "grpc":
        for call in (client.workers, lambda: client.adapters.places("alice")):
            with pytest.raises(NotSupported, match="http://"):
                call()
        return
    workers = {worker.role: worker for worker in client.workers()}
    assert set(workers) == {"prefill", "decode"}
    assert workers["decode"].state == "ready"
    assert workers["decode"].kv_blocks == 4096
    assert workers["decode"].details["block_size"] == served.engines[Role.DECODE].info.block_size
