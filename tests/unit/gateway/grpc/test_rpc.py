from __future__ import annotations

import asyncio
import json
import random
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from preft.core.cluster import Adapter
from preft.core.errors import ConfigError, QueueFull, TransferFailed
from preft.core.request import FinishReason
from preft.core.structured import StructuredOutputs
from preft.gateway.deps import GatewayDeps
from preft.gateway.grpc import inference
from preft.gateway.grpc.server import serve_grpc
from preft.gateway.text.choice import ChoiceDelta
from preft.rpc import adapters_pb2, adapters_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from preft.rpc.prompt_logprobs import PromptParts
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.prompt_logprobs import made_up

Request = inference_pb2.GenerateRequest
ChatRequest = inference_pb2.ChatRequest


@pytest.fixture
async def served(tokenizer) -> AsyncIterator[SimpleNamespace]:
    hello = tuple(tokenizer._backend.token_to_id(char) for char in "helloĠworld")
    state = SimpleNamespace(script=Script(hello, finish=FinishReason.LENGTH), hello=hello)
    state.generator = FakeGenerator(lambda request: state.script)
    state.deps = GatewayDeps("base", tokenizer, 64, state.generator, FakeCatalog.of(ann="/adapters/ann"))
    server = await serve_grpc(state.deps, "127.0.0.1", 0)
    state.port = server.port
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as state.channel:
        state.inference = inference_pb2_grpc.InferenceStub(state.channel)
        state.adapters = adapters_pb2_grpc.AdaptersStub(state.channel)
        yield state
    await server.stop()


async def test_the_prompts_log_probabilities_come_first(served):
    call = served.inference.Generate(Request(model="ann", text="hi", n=2, sampling={"prompt_logprobs": 2}))
    first, *replies = [reply async for reply in call]
    [request] = served.generator.requests
    parts = PromptParts(2, len(request.prompt_token_ids))
    parts.add(first.delta.prompt_logprobs)
    assert parts.whole() == made_up(request.prompt_token_ids, 2, request.adapter.digest)
    assert not any(reply.delta.HasField("prompt_logprobs") for reply in replies)
    assert {reply.adapter_digest for reply in (first, *replies)} == {request.adapter.digest}
    for index in range(2):
        assert "".join(reply.text for reply in replies if reply.delta.index == index) == "hello world"


async def test_generate(served):
    call = served.inference.Generate(Request(model="ann", text="hi", n=2, sampling={"logprobs": 1}, stop=["zz"]))
    replies = [reply async for reply in call]
    for index in range(2):
        own = [reply for reply in replies if reply.delta.index == index]
        assert "".join(reply.text for reply in own) == "hello world"
        assert tuple(id for reply in own for id in reply.delta.token_ids) == served.hello
        assert own[-1].delta.finish_reason == common_pb2.FINISH_REASON_LENGTH
        assert own[0].delta.logprobs[0].top[0].token_id == served.hello[0]
        assert not own[-1].delta.HasField("stop_token_id")
    assert {reply.prompt_tokens for reply in replies} == {3}
    assert {reply.adapter_digest for reply in replies} == {served.deps.catalog.get("ann").digest}
    [request] = served.generator.requests
    assert request.adapter.name == "ann"
    assert request.deadline is None
    assert (request.sampling.max_tokens, request.sampling.temperature, request.sampling.seed) == (16, 1.0, None)


async def test_a_reply_says_what_was_in_a_prefix_cache(served):
    served.script = Script(served.hello, finish=FinishReason.LENGTH, cached=2)
    replies = [reply async for reply in served.inference.Generate(Request(model="base", text="hi"))]
    assert {(reply.cached_tokens, reply.adapter_digest) for reply in replies} == {(2, "")}


@pytest.mark.parametrize("fail_after", [None, 1])
async def test_an_unexpected_error_keeps_its_text(served, fail_after):
    served.script = Script(served.hello, fail=RuntimeError("/srv/secret"), fail_after=fail_after)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        [reply async for reply in served.inference.Generate(Request(model="ann", text="hi"))]
    served.deps.catalog.fail = RuntimeError("/srv/secret")
    with pytest.raises(grpc.aio.AioRpcError) as adding:
        await served.adapters.Add(adapters_pb2.AddAdapterRequest(name="new", source="/adapters/new"))
    for error in (raised.value, adding.value):
        assert error.code() is grpc.StatusCode.INTERNAL
        assert error.details() == "The server met an unexpected error."


HOSTILE = ["", "..", "/etc/passwd", "base", "a\0b", "\n", "a" * 5000, "http://127.0.0.1:1/", "ann", "\U0010ffff"]
JSON = [
    b"",
    b"{",
    b"[1]",
    b"{}",
    b'{"n": 1e999}',
    b'{"x": 1}',
    b'{"model": "ann", "messages": [{"role": "user"}]}',
    b"\xff",
]
NUMBERS = [0, 1, 2**31, 2**32 - 1]
FLOATS = [0.0, -1.0, 1e308, float("inf"), float("nan")]


FINE = {
    *(grpc.StatusCode.OK, grpc.StatusCode.INVALID_ARGUMENT, grpc.StatusCode.NOT_FOUND),
    *(grpc.StatusCode.ALREADY_EXISTS, grpc.StatusCode.DEADLINE_EXCEEDED),
}


async def status_of(call):
    with suppress(grpc.aio.AioRpcError):
        if hasattr(call, "read"):
            async for _ in call:
                pass
        else:
            await call
    return await call.code()


async def test_no_value_in_a_public_call_is_our_fault(served):
    """Each field in turn, and each value: a status says what is wrong with it, or it is served."""
    draw = random.Random(0)
    for kind, call in (
        (Request, lambda message: served.inference.Generate(message, timeout=5)),
        (ChatRequest, lambda message: served.inference.Chat(message, timeout=5)),
        (adapters_pb2.AddAdapterRequest, served.adapters.Add),
        (adapters_pb2.ListAdaptersRequest, served.adapters.List),
        (adapters_pb2.GetAdapterRequest, served.adapters.Get),
        (adapters_pb2.PinAdapterRequest, served.adapters.Pin),
        (adapters_pb2.RemoveAdapterRequest, served.adapters.Remove),
    ):
        sampling = common_pb2.Sampling.DESCRIPTOR.fields if kind is Request else ()
        for field in (*(field for field in kind.DESCRIPTOR.fields if field.name != "sampling"), *sampling):
            for _ in range(8):
                message = kind(model="ann", text="hi", sampling={"max_tokens": 2}) if kind is Request else kind()
                owner = message.sampling if field in sampling else message
                match field.cpp_type, field.is_repeated:
                    case FieldDescriptor.CPPTYPE_MESSAGE, True:
                        owner.logit_bias[draw.choice(NUMBERS)] = draw.choice(FLOATS)
                    case FieldDescriptor.CPPTYPE_MESSAGE, False:
                        message.tokens.ids.extend(draw.choices(NUMBERS, k=draw.randrange(80)))
                    case FieldDescriptor.CPPTYPE_STRING, True:
                        message.stop.extend(draw.choices(HOSTILE, k=draw.randrange(20)))
                    case FieldDescriptor.CPPTYPE_STRING, False if field.type == FieldDescriptor.TYPE_BYTES:
                        setattr(owner, field.name, draw.choice(JSON))
                    case FieldDescriptor.CPPTYPE_STRING, False:
                        setattr(owner, field.name, draw.choice(HOSTILE))
                    case FieldDescriptor.CPPTYPE_DOUBLE, _:
                        setattr(owner, field.name, draw.choice(FLOATS))
                    case FieldDescriptor.CPPTYPE_BOOL, _:
                        setattr(owner, field.name, True)
                    case FieldDescriptor.CPPTYPE_UINT32, True:
                        getattr(owner, field.name).extend(draw.choices(NUMBERS, k=draw.randrange(2000)))
                    case FieldDescriptor.CPPTYPE_INT32, _:
                        setattr(owner, field.name, draw.choice([0, 101, -(2**31), 2**31 - 1]))
                    case _:
                        setattr(owner, field.name, draw.choice(NUMBERS))
                assert await status_of(call(message)) in FINE, (field.name, message)
    assert [reply async for reply in served.inference.Generate(Request(model="base", text="hi"))]


async def test_large_messages_are_checked_in_a_thread(served, monkeypatch):
    check, threads = inference._completion_body, []

    def watched(request):
        threads.append(threading.current_thread())
        return check(request)

    monkeypatch.setattr(inference, "_completion_body", watched)
    for count in (5, 5_000):
        with pytest.raises(grpc.aio.AioRpcError, match="context"):
            [_ async for _ in served.inference.Generate(Request(model="base", tokens={"ids": [5] * 64 * count}))]
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
@pytest.mark.parametrize("host", ["::1", "::"])
async def test_ipv6_addresses(served, host):
    server = await serve_grpc(served.deps, host, 0)
    async with grpc.aio.insecure_channel(f"[::1]:{server.port}") as channel:
        call = inference_pb2_grpc.InferenceStub(channel).Generate(Request(model="base", text="hi"))
        assert "".join([reply.text async for reply in call]) == "hello world"
    await server.stop()


async def test_forms_of_output(served):
    form = {"choice": ["a", "b"], "whitespace_pattern": ""}
    [
        _
        async for _ in served.inference.Generate(
            Request(model="base", text="hi", sampling={"structured_outputs": form})
        )
    ]
    [seen] = served.generator.requests
    assert seen.sampling.structured_outputs == StructuredOutputs(choice=("a", "b"), whitespace_pattern="")


async def test_explicit_zeros_are_not_defaults(served):
    request = Request(
        model="base",
        tokens=inference_pb2.TokenIds(ids=[5, 6]),
        sampling=common_pb2.Sampling(
            temperature=0, seed=0, top_k=3, logit_bias={7: -1}, stop_token_ids=[9], max_tokens=3
        ),
        timeout_seconds=30,
    )
    [_ async for _ in served.inference.Generate(request)]
    [seen] = served.generator.requests
    assert seen.prompt_token_ids == (5, 6)
    assert (seen.sampling.temperature, seen.sampling.seed, seen.sampling.top_k) == (0, 0, 3)
    assert (dict(seen.sampling.logit_bias), seen.sampling.stop_token_ids) == ({7: -1}, (9,))
    assert seen.deadline is not None


async def test_stops(served):
    replies = [reply async for reply in served.inference.Generate(Request(model="base", text="hi", stop=["o w"]))]
    assert "".join(reply.text for reply in replies) == "hell"
    assert replies[-1].delta.finish_reason == common_pb2.FINISH_REASON_STOP
    served.script = Script((70, 71), finish=FinishReason.STOP, stop_token_id=71)
    replies = [reply async for reply in served.inference.Generate(Request(model="base", text="hi"))]
    assert replies[-1].delta.stop_token_id == 71


@pytest.mark.parametrize(
    ("request_", "code", "param"),
    [
        (Request(model="bob", text="hi"), grpc.StatusCode.NOT_FOUND, None),
        (Request(model="ann@2", text="hi"), grpc.StatusCode.NOT_FOUND, None),
        (Request(model="base"), grpc.StatusCode.INVALID_ARGUMENT, "prompt"),
        (Request(model="base", text="hi", more=b'{"echo": true}'), grpc.StatusCode.INVALID_ARGUMENT, "echo"),
        (Request(model="base", text="hi", sampling={"seed": -1}), grpc.StatusCode.INVALID_ARGUMENT, "seed"),
        (Request(model="base", text="hi", sampling={"max_tokens": 0}), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (Request(model="base", text="hi", sampling={"max_tokens": 99}), grpc.StatusCode.INVALID_ARGUMENT, "max_tokens"),
        (
            Request(model="base", text="hi", sampling={"temperature": float("nan")}),
            grpc.StatusCode.INVALID_ARGUMENT,
            "temperature",
        ),
        (
            Request(model="base", text="hi", sampling={"eos_token_ids": [1]}),
            grpc.StatusCode.INVALID_ARGUMENT,
            "eos_token_ids",
        ),
        (
            Request(model="base", text="hi", sampling={"structured_outputs": {"regex": "a", "json": "{}"}}),
            grpc.StatusCode.INVALID_ARGUMENT,
            "structured_outputs",
        ),
        (Request(model="base", text="hi", timeout_seconds=-1), grpc.StatusCode.INVALID_ARGUMENT, "timeout_seconds"),
    ],
)
async def test_refused_requests(served, request_, code, param):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in served.inference.Generate(request_)]
    assert caught.value.code() == code
    assert dict(caught.value.trailing_metadata()).get("preft-param") == param
    assert served.generator.requests == []


@pytest.mark.parametrize("rpc", ["Inference/Generate", "Adapters/Get", "Adapters/Add"])
async def test_a_message_that_cant_be_read_is_the_callers_fault(served, rpc, caplog):
    stream = served.channel.unary_stream(f"/preft.v1.{rpc}")(b"\x0a\xff\xff")
    assert await stream.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert await stream.details() == "the message can't be read: it isn't of the type that this call takes"
    assert not caplog.records


async def test_failures_have_their_code(served):
    served.script = Script(served.hello, fail=TransferFailed("checksum"), fail_after=2)
    with pytest.raises(grpc.aio.AioRpcError, match="checksum") as caught:
        [_ async for _ in served.inference.Generate(Request(model="base", text="hi"))]
    assert caught.value.code() == grpc.StatusCode.DATA_LOSS
    served.script = Script(fail=QueueFull("full", 2))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in served.inference.Generate(Request(model="base", text="hi"))]
    assert caught.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    assert dict(caught.value.trailing_metadata())["retry-after"] == "2"


async def test_cancelling_the_call_cancels_the_work(served):
    served.script = Script(served.hello, delay=0.2)
    call = served.inference.Generate(Request(model="base", text="hi"))
    await call.read()
    call.cancel()
    for _ in range(100):
        await asyncio.sleep(0.02)
        if served.generator.cancelled:
            break
    assert served.generator.cancelled == served.generator.entered


async def test_chat(served):
    body = {
        "model": "ann",
        "messages": [{"role": "user", "content": "hi"}],
        "n": 2,
        "logprobs": True,
        "top_logprobs": 1,
    }
    replies = [reply async for reply in served.inference.Chat(ChatRequest(body=json.dumps(body).encode()))]
    for index in range(2):
        own = [reply for reply in replies if reply.delta.index == index]
        assert "".join(reply.text for reply in own) == "hello world"
        assert own[0].delta.logprobs[0].top[0].token_id == served.hello[0]
    [request] = served.generator.requests
    assert (request.adapter.name, request.deadline) == ("ann", None)
    [_ async for _ in served.inference.Chat(ChatRequest(body=json.dumps(body).encode(), timeout_seconds=30))]
    assert served.generator.requests[1].deadline is not None


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (ChatRequest(), None),
        (ChatRequest(body=b"[]"), None),
        (ChatRequest(body=b'{"model": "base"}'), "messages"),
        (ChatRequest(body=b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "x": 1}'), "x"),
        (ChatRequest(body=b"{}", timeout_seconds=-1), "model"),
        (Request(model="base", text="hi", more=b'{"suffix": "x"}'), "suffix"),
        (Request(model="base", text="hi", more=b'{"response_format": {"type": "what"}}'), "response_format"),
        (Request(model="base", text="hi", more=b'{"max_tokens": 3}'), "max_tokens"),
        (Request(model="base", text="hi", more=b'{"prompt": "other"}'), "prompt"),
        (Request(model="base", text="hi", more=b"{"), None),
    ],
)
async def test_refused_chats_and_further_parameters(served, request_, param):
    call = served.inference.Chat if isinstance(request_, ChatRequest) else served.inference.Generate
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        [_ async for _ in call(request_)]
    assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    assert (dict(caught.value.trailing_metadata()).get("preft-param") or "").split(".")[0] == (param or "")
    assert served.generator.requests == []


def test_deltas_that_wait_are_joined_by_choice():
    deltas = [ChoiceDelta(0, "a", (1,)), ChoiceDelta(1, "x", (2,)), ChoiceDelta(0, "", (3, 4), (), "stop", 4)]
    joined = [ChoiceDelta(0, "a", (1, 3, 4), (), "stop", 4), ChoiceDelta(1, "x", (2,))]
    assert list(inference._joined(deltas)) == joined
    assert list(inference._joined(deltas[:1])) == deltas[:1]


async def test_further_parameters(served):
    replies = [
        reply
        async for reply in served.inference.Generate(
            Request(model="base", text="hi", stop=["o w"], more=b'{"include_stop_str_in_output": true}')
        )
    ]
    assert "".join(reply.text for reply in replies) == "hello w"


async def test_adapters(served):
    rpc = served.adapters
    added = await rpc.Add(adapters_pb2.AddAdapterRequest(name="bob", source="s3://adapters/bob"))
    entry = served.deps.catalog.get("bob")
    assert (added.name, added.digest, added.source) == ("bob", entry.digest, "s3://adapters/bob")
    assert (added.size, added.version, added.pinned) == (entry.size, 1, False)
    assert tuple(added.warnings) == entry.warnings == ("it is fake",)
    assert await rpc.Get(adapters_pb2.GetAdapterRequest(name="bob")) == added
    replaced = await rpc.Add(adapters_pb2.AddAdapterRequest(name="bob", source="/other", replace=True))
    assert (replaced.version, replaced.source) == (2, "/other")
    assert (await rpc.Pin(adapters_pb2.PinAdapterRequest(name="bob", pinned=True))).pinned is True
    assert (await rpc.Pin(adapters_pb2.PinAdapterRequest(name="bob"))).pinned is False
    assert (await rpc.Remove(adapters_pb2.RemoveAdapterRequest(name="bob"))).name == "bob"


async def test_an_error_is_short_whatever_was_sent(served):
    """gRPC sends it in headers, of which a client takes 8 KiB."""
    with pytest.raises(grpc.aio.AioRpcError, match="xxx") as refused:
        [_ async for _ in served.inference.Generate(Request(model="x" * 100_000, text="hi"))]
    assert refused.value.code() == grpc.StatusCode.NOT_FOUND


async def test_versions_and_names_are_as_over_http(served):
    replies = [reply async for reply in served.inference.Generate(Request(model="ann@1", text="hi"))]
    assert "".join(reply.text for reply in replies) == "hello world"
    assert served.generator.requests[0].adapter.name == "ann"
    for name in ("ann@2", "..", "a//b", "-x"):
        with pytest.raises(grpc.aio.AioRpcError, match="can't name an adapter") as refused:
            await served.adapters.Add(adapters_pb2.AddAdapterRequest(name=name, source="/a"))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT


async def test_adapters_are_listed_in_pages(served):
    served.deps.catalog.put(*(Adapter(f"user-{i:03}", "d", "/a", rank=8) for i in range(250)))
    seen: list[str] = []
    while True:
        asked = adapters_pb2.ListAdaptersRequest(after=seen[-1] if seen else "", search="user")
        reply = await served.adapters.List(asked)
        seen += [adapter.name for adapter in reply.adapters]
        assert (len(reply.adapters), reply.total) == (min(100, 250 - len(seen) + len(reply.adapters)), 250)
        if not reply.has_more:
            break
    assert seen == [f"user-{i:03}" for i in range(250)]
    assert len((await served.adapters.List(adapters_pb2.ListAdaptersRequest(limit=1000))).adapters) == 251


@pytest.mark.parametrize(
    ("method", "request_", "code", "param"),
    [
        ("Add", adapters_pb2.AddAdapterRequest(name="ann", source="/other"), "ALREADY_EXISTS", None),
        ("Add", adapters_pb2.AddAdapterRequest(name="bob", source="/missing"), "NOT_FOUND", None),
        ("Add", adapters_pb2.AddAdapterRequest(name="bob"), "INVALID_ARGUMENT", "source"),
        ("Add", adapters_pb2.AddAdapterRequest(source="/x"), "INVALID_ARGUMENT", "name"),
        ("List", adapters_pb2.ListAdaptersRequest(limit=1001), "INVALID_ARGUMENT", "limit"),
        ("Get", adapters_pb2.GetAdapterRequest(name="bob"), "NOT_FOUND", None),
        ("Pin", adapters_pb2.PinAdapterRequest(name="bob", pinned=True), "NOT_FOUND", None),
        ("Remove", adapters_pb2.RemoveAdapterRequest(name="bob"), "NOT_FOUND", None),
    ],
)
async def test_refused_adapter_calls(served, method, request_, code, param):
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await getattr(served.adapters, method)(request_)
    assert caught.value.code().name == code
    assert dict(caught.value.trailing_metadata()).get("preft-param") == param


async def test_health_follows_readiness(served):
    health = health_pb2_grpc.HealthStub(served.channel)
    asked = health_pb2.HealthCheckRequest(service="preft.v1.Inference")
    assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.SERVING
    watch = health.Watch(asked)
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    served.generator.is_ready = False
    assert (await health.Check(asked)).status == health_pb2.HealthCheckResponse.NOT_SERVING
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.NOT_SERVING
    watch.cancel()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await health.Check(health_pb2.HealthCheckRequest(service="nobody"))
    assert caught.value.code() == grpc.StatusCode.NOT_FOUND


async def test_reflection_lists_the_services(served):
    stub = reflection_pb2_grpc.ServerReflectionStub(served.channel)
    call = stub.ServerReflectionInfo(iter([reflection_pb2.ServerReflectionRequest(list_services="")]))
    [reply] = [reply async for reply in call]
    names = {service.name for service in reply.list_services_response.service}
    assert {"preft.v1.Inference", "preft.v1.Adapters", "grpc.health.v1.Health"} <= names


async def test_a_taken_port_is_a_set_up_error(served):
    with pytest.raises(ConfigError, match="grpc_port"):
        await serve_grpc(served.deps, "127.0.0.1", served.port)
