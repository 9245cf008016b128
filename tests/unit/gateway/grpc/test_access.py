"""API keys over gRPC: every method of the public services, what a key shows and allows, limits."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import suppress
from types import SimpleNamespace
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from preft.core.request import FinishReason
from preft.gateway.access.accounts import Accounts
from preft.gateway.access.usage import Usage
from preft.gateway.deps import GatewayDeps
from preft.gateway.grpc.server import serve_grpc
from preft.rpc import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from preft.state.memory_limits import MemoryLimits
from support.api_keys import access_of, bearer
from support.fakes import FakeCatalog, FakeGenerator, Script

KEYS: dict[str, dict[str, Any]] = {
    "ada": {"tenant": "acme", "requests_per_minute": 2},
    "admin": {"tenant": "acme", "admin": True},
    "bob": {"tenant": "other"},
    "small": {"tenant": "small", "admin": True, "adapter_bytes": 10},
}
Generate = inference_pb2.GenerateRequest
CALLS: dict[str, Any] = {
    "/preft.v1.Inference/Generate": Generate(model="base", text="hi"),
    "/preft.v1.Inference/Chat": inference_pb2.ChatRequest(
        body=b'{"model": "base", "messages": [{"role": "user", "content": "hi"}]}'
    ),
    "/preft.v1.Adapters/Add": adapters_pb2.AddAdapterRequest(name="new", source="/new"),
    "/preft.v1.Adapters/List": adapters_pb2.ListAdaptersRequest(),
    "/preft.v1.Adapters/Get": adapters_pb2.GetAdapterRequest(name="own"),
    "/preft.v1.Adapters/Pin": adapters_pb2.PinAdapterRequest(name="own", pinned=True),
    "/preft.v1.Adapters/Remove": adapters_pb2.RemoveAdapterRequest(name="own"),
}
ADMINS = {"/preft.v1.Adapters/Add", "/preft.v1.Adapters/Pin", "/preft.v1.Adapters/Remove"}
OPEN = {"/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch", "/grpc.health.v1.Health/List"}


class Recorded(list[Usage]):
    def record(self, usage: Usage) -> None:
        self.append(usage)


@pytest.fixture
async def served(tokenizer) -> AsyncIterator[SimpleNamespace]:
    state = SimpleNamespace(recorded=Recorded(), catalog=FakeCatalog())
    for name in ("shared", "@acme/own", "@other/own", "@other/secret"):
        await state.catalog.add(name, f"/source of {name}")
    state.generator = FakeGenerator(lambda request: Script((70, 71), finish=FinishReason.LENGTH))
    state.accounts = Accounts(MemoryLimits(), [state.recorded])
    state.deps = GatewayDeps(
        "base", tokenizer, 64, state.generator, state.catalog,
        access=access_of(state.catalog, **KEYS), accounts=state.accounts,
    )  # fmt: skip
    server = await serve_grpc(state.deps, "127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as state.channel:
        state.inference = inference_pb2_grpc.InferenceStub(state.channel)
        state.adapters = adapters_pb2_grpc.AdaptersStub(state.channel)
        yield state
    await server.stop()
    await state.accounts.close()


def shown(key: str) -> tuple[tuple[str, str], ...]:
    return tuple(bearer(key).items())


async def all_methods(channel: grpc.aio.Channel) -> set[str]:
    """Every method that the server's own description names."""
    from google.protobuf.descriptor_pb2 import FileDescriptorProto

    async def ask(**request: str) -> Any:
        call = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(metadata=shown("ada"))
        await call.write(reflection_pb2.ServerReflectionRequest(**request))
        await call.done_writing()
        return await call.read()

    methods = set()
    for service in (await ask(list_services="")).list_services_response.service:
        reply = await ask(file_containing_symbol=service.name)
        for content in reply.file_descriptor_response.file_descriptor_proto:
            file = FileDescriptorProto.FromString(content)
            for one in file.service:
                methods |= {f"/{file.package}.{one.name}/{method.name}" for method in one.method}
    return methods


async def code_of(served: SimpleNamespace, method: str, *metadata: tuple[str, str]) -> grpc.StatusCode:
    """The status of one call with an empty stream of requests, or one request, by its method's kind."""
    request = CALLS.get(method)
    kind = served.channel.stream_stream if request is None else served.channel.unary_stream
    serializer = None if request is None else type(request).SerializeToString
    call = kind(method, request_serializer=serializer)(*([] if request is None else [request]), metadata=metadata)
    if request is None:
        await call.done_writing()
    with suppress(grpc.aio.AioRpcError):
        async for _ in call:
            pass
    return await call.code()


async def test_each_method_needs_a_key_or_is_named_here(served):
    """A new method fails this test until somebody has decided who may call it."""
    reflection = {"/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo"}
    assert await all_methods(served.channel) - OPEN == {*CALLS, *reflection}
    for method in {*CALLS, *reflection, "/preft.v1.Nothing/Nowhere"}:
        for metadata in (), (("authorization", "Bearer wrong"),), shown("ada") * 2:
            assert await code_of(served, method, *metadata) is grpc.StatusCode.UNAUTHENTICATED, method
    assert served.generator.requests == []
    for method in CALLS:
        code = await code_of(served, method, *shown("ada"))
        assert (code is grpc.StatusCode.PERMISSION_DENIED) == (method in ADMINS), method
        assert await code_of(served, method, *shown("admin")) is grpc.StatusCode.OK, method
    assert served.catalog.get("@acme/own") is None
    assert served.catalog.get("@other/own") is not None


async def test_health_needs_no_key(served):
    stub = health_pb2_grpc.HealthStub(served.channel)
    assert (await stub.Check(health_pb2.HealthCheckRequest())).status == health_pb2.HealthCheckResponse.SERVING
    watch = stub.Watch(health_pb2.HealthCheckRequest())
    assert (await watch.read()).status == health_pb2.HealthCheckResponse.SERVING
    watch.cancel()


async def test_names_dont_leak(served):
    for hidden, missing in ("secret", "absent"), ("@other/secret", "@other/absent"), ("@other/own", "@other/nil"):
        answers = []
        for name in hidden, missing:
            calls = [
                served.adapters.Get(adapters_pb2.GetAdapterRequest(name=name), metadata=shown("admin")),
                served.adapters.Pin(adapters_pb2.PinAdapterRequest(name=name), metadata=shown("admin")),
                served.adapters.Remove(adapters_pb2.RemoveAdapterRequest(name=name), metadata=shown("admin")),
                served.inference.Generate(Generate(model=name, text="hi"), metadata=shown("admin")),
            ]
            answers.append([(await call.code(), (await call.details()).replace(name, "NAME")) for call in calls])
            assert {code for code, _ in answers[-1]} == {grpc.StatusCode.NOT_FOUND}
        assert answers[0] == answers[1]
    for key, names in ("ada", ["own", "shared"]), ("bob", ["own", "secret", "shared"]):
        listed = await served.adapters.List(adapters_pb2.ListAdaptersRequest(), metadata=shown(key))
        assert [adapter.name for adapter in listed.adapters] == names


async def test_equal_names_are_different_adapters(served):
    for key, full in ("ada", "@acme/own"), ("bob", "@other/own"):
        call = served.inference.Generate(Generate(model="own", text="hi"), metadata=shown(key))
        replies = [reply async for reply in call]
        assert {reply.adapter_digest for reply in replies} == {served.catalog.get(full).digest}
    assert [(one.tenant, one.adapter, one.status) for one in served.recorded] == [
        ("acme", "own", 200),
        ("other", "own", 200),
    ]


async def test_limits(served):
    left = []
    for _ in range(2):
        call = served.inference.Generate(Generate(model="base", text="hi"), metadata=shown("ada"))
        assert sum([len(reply.delta.token_ids) async for reply in call]) == 2
        left.append(dict(await call.trailing_metadata())["x-ratelimit-remaining-requests"])
    assert left == ["1", "0"]
    call = served.inference.Generate(Generate(model="base", text="hi"), metadata=shown("ada"))
    assert await call.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    trailing = dict(await call.trailing_metadata())
    assert trailing["preft-code"] == "rate_limit_exceeded"
    assert 1 <= int(trailing["retry-after"]) <= 30
    adding = served.adapters.Add(
        adapters_pb2.AddAdapterRequest(name="large", source="/more than ten bytes"), metadata=shown("small")
    )
    assert await adding.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
