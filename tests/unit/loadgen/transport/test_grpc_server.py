"""PreFT's gRPC, against a real gRPC server with reflection and scripted services."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor_pool import DescriptorPool
from grpc_reflection.v1alpha import reflection

from preft.rpc import adapters_pb2, adapters_pb2_grpc, common_pb2, inference_pb2, inference_pb2_grpc
from preft_loadgen.errors import RequestFailed
from preft_loadgen.traffic.request import Request
from preft_loadgen.transport.server import Models, Server, open_server


class Inference(inference_pb2_grpc.InferenceServicer):
    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.cancelled = asyncio.Event()

    async def Generate(self, request: Any, context: Any) -> AsyncIterator[Any]:
        self.asked.append((request, dict(context.invocation_metadata()).get("authorization")))
        match request.model:
            case "gone":
                await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
            case "silent":
                await asyncio.sleep(60)
            case "endless":
                try:
                    while True:
                        yield reply([5], text="x")
                        await asyncio.sleep(0.01)
                finally:
                    self.cancelled.set()
            case "short":
                yield reply([5], text="x")
            case _:
                yield reply([5, 6], text="ab", prompt_tokens=2)
                await asyncio.sleep(0.02)
                yield reply([7], common_pb2.FINISH_REASON_LENGTH, text="c")


def reply(ids: list[int], reason: int = 0, **more: Any) -> Any:
    return inference_pb2.GenerateReply(delta=common_pb2.TokenDelta(token_ids=ids, finish_reason=reason), **more)


class Adapters(adapters_pb2_grpc.AdaptersServicer):
    def __init__(self) -> None:
        self.names = ["a", "b", "c"]

    async def List(self, request: Any, context: Any) -> Any:
        found = [name for name in self.names if name > request.after][:2]  # pages of two
        more = bool(found) and found[-1] != self.names[-1]
        return adapters_pb2.ListAdaptersReply(
            adapters=[adapters_pb2.Adapter(name=name) for name in found], has_more=more
        )

    async def Add(self, request: Any, context: Any) -> Any:
        assert request.replace
        self.names.append(request.name)
        return adapters_pb2.Adapter(name=request.name, source=request.source)

    async def Remove(self, request: Any, context: Any) -> Any:
        self.names.remove(request.name)
        return adapters_pb2.Adapter(name=request.name)


@pytest.fixture
async def inference() -> AsyncIterator[tuple[Inference, str]]:
    server, service = grpc.aio.server(), Inference()
    inference_pb2_grpc.add_InferenceServicer_to_server(service, server)
    adapters_pb2_grpc.add_AdaptersServicer_to_server(Adapters(), server)
    reflection.enable_server_reflection(("preft.v1.Inference", "preft.v1.Adapters"), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield service, f"grpc://127.0.0.1:{port}"
    await server.stop(None)


async def test_a_request_and_its_answer(inference: tuple[Inference, str]) -> None:
    service, url = inference
    async with open_server(url, api_key="sk-1") as server:
        reply = await server.send(Request("m", (1, 2), 3))
        await server.send(Request("m", "text", 4, exact=False))
    assert (reply.text, reply.tokens, reply.token_ids, reply.sizes) == ("abc", 3, (5, 6, 7), (2, 1))
    assert (reply.finish_reason, reply.prompt_tokens) == ("length", 2)
    assert reply.arrivals[1] - reply.arrivals[0] > 0.01
    (first, key), (second, _) = service.asked
    assert (first.model, list(first.tokens.ids), key) == ("m", [1, 2], "Bearer sk-1")
    assert (first.sampling.max_tokens, first.sampling.temperature, first.sampling.ignore_eos) == (3, 0.0, True)
    assert first.sampling.HasField("temperature")
    assert (second.text, second.sampling.ignore_eos) == ("text", False)


@pytest.mark.parametrize(
    ("model", "kind"), [("gone", "grpc not found"), ("silent", "timeout"), ("short", "broken stream")]
)
async def test_what_is_not_a_whole_answer(inference: tuple[Inference, str], model: str, kind: str) -> None:
    async with open_server(inference[1], timeout=0.5 if model == "silent" else 30) as server:
        with pytest.raises(RequestFailed) as failed:
            await server.send(Request(model, (1,), 3))
    assert failed.value.kind == kind


async def test_a_planned_hang_up(inference: tuple[Inference, str]) -> None:
    service, url = inference
    async with open_server(url) as server:
        reply = await server.send(Request("endless", (1,), 100, cancel_after=3))
        assert (reply.finish_reason, reply.tokens) == ("cancelled", 3)
        await asyncio.wait_for(service.cancelled.wait(), 5)


async def test_adapters(inference: tuple[Inference, str]) -> None:
    async with open_server(inference[1]) as server:
        assert await server.models() == Models(None, ("a", "b", "c"))
        await server.load_adapter("d", "/d")
        assert (await server.models()).adapters[-1] == "d"
        await server.unload_adapter("d")
        assert (await server.models()).adapters == ("a", "b", "c")


async def refused(server: Server) -> str:
    with pytest.raises(RequestFailed) as failed:
        await server.send(Request("m", (1,), 1))
    return str(failed.value)


async def test_servers_that_are_no_preft() -> None:
    async with open_server("grpc://127.0.0.1:9", timeout=5) as server:
        assert "unavailable" in await refused(server)
    for services in ((), (reflection.SERVICE_NAME,)):
        other = grpc.aio.server()
        if services:
            reflection.enable_server_reflection(services, other, pool=DescriptorPool())  # knows no service
        port = other.add_insecure_port("127.0.0.1:0")
        await other.start()
        try:
            async with open_server(f"grpc://127.0.0.1:{port}", timeout=5) as server:
                assert ("is it PreFT Serve?" if services else "unimplemented") in await refused(server)
        finally:
            await other.stop(None)
