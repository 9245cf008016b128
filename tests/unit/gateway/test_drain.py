"""A gateway that stops: what runs ends whole or with an error, what comes is refused, and watchers see it all."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import grpc
import httpx
import pytest

from preft.core.cluster import Role, Worker, WorkerSeen, WorkerState, WorkerStatus
from preft.core.errors import ShuttingDown
from preft.core.request import FinishReason
from preft.gateway.deps import GatewayDeps
from preft.gateway.drain import Drain
from preft.gateway.grpc.server import serve_grpc
from preft.gateway.http.app import create_app
from preft.rpc import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from support.fakes import FakeCatalog, FakeGenerator, Script
from support.served_app import served_app
from support.worker_services import until

BODY = {"model": "base", "prompt": "hi", "max_tokens": 400}


@pytest.fixture
async def served(tokenizer) -> AsyncIterator[SimpleNamespace]:
    hello = tuple(tokenizer._backend.token_to_id(char) for char in "helloĠworld")
    state = SimpleNamespace(script=Script(hello, delay=0.02, finish=FinishReason.LENGTH))
    state.generator = FakeGenerator(lambda request: state.script)
    state.catalog = FakeCatalog.of(ann="/adapters/ann")
    state.deps = GatewayDeps("base", tokenizer, 512, state.generator, state.catalog)
    state.drain = state.deps.drain
    async with (
        served_app(create_app(state.deps)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False, timeout=10) as state.client,
    ):
        yield state


async def stream(served: SimpleNamespace) -> tuple[int, list[str]]:
    """The status, and the data of each event."""
    reply = await served.client.post("/v1/completions", json={**BODY, "stream": True})
    return reply.status_code, [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]


async def test_running_requests_end_whole_and_new_ones_are_refused(served: SimpleNamespace) -> None:
    running = [
        asyncio.create_task(stream(served)),
        asyncio.create_task(served.client.post("/v1/completions", json=BODY)),
    ]
    await until(lambda: len(served.generator.entered) == 2)
    served.drain.begin()
    ready, health = await served.client.get("/ready"), await served.client.get("/health")
    assert (ready.status_code, ready.json()["reason"]) == (503, "the server is shutting down")
    assert health.status_code == 200
    for method, path, body in (
        ("POST", "/v1/completions", BODY),
        ("POST", "/v1/chat/completions", {"model": "base", "messages": [{"role": "user", "content": "hi"}]}),
        ("POST", "/v1/adapters", {"name": "new", "source": "/adapters/new"}),
        ("DELETE", "/v1/adapters/ann", None),
    ):
        refused = await served.client.request(method, path, json=body)
        error = refused.json()["error"]
        assert (refused.status_code, error["type"], error["code"]) == (
            503,
            "service_unavailable_error",
            "shutting_down",
        )
        assert int(refused.headers["retry-after"]) > 0
        assert refused.headers["connection"] == "close"
    assert served.catalog.get("ann") is not None
    (status, events), whole = await asyncio.gather(*running)
    assert status == whole.status_code == 200
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length"
    assert whole.json()["choices"][0]["finish_reason"] == "length"
    await asyncio.wait_for(served.drain.wait_idle(), 5)


async def test_what_runs_too_long_ends_with_an_error(served: SimpleNamespace) -> None:
    served.script = Script(tuple([70] * 300), delay=0.05)
    running = [
        asyncio.create_task(stream(served)),
        asyncio.create_task(served.client.post("/v1/completions", json=BODY)),
    ]
    await until(lambda: len(served.generator.entered) == 2)
    await asyncio.sleep(0.2)  # some tokens
    served.drain.begin()
    served.drain.interrupt()
    (status, events), whole = await asyncio.wait_for(asyncio.gather(*running), 5)
    assert status == 200
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["error"]["code"] == "shutting_down"
    assert all(json.loads(event)["choices"][0]["finish_reason"] is None for event in events[:-2])
    assert len(events) > 2
    assert (whole.status_code, whole.json()["error"]["code"]) == (503, "shutting_down")
    assert "retry-after" in whole.headers
    await asyncio.wait_for(served.drain.wait_idle(), 5)
    assert len(served.generator.left) == 2


async def test_an_adapter_that_is_being_added_ends_with_an_error(served: SimpleNamespace) -> None:
    served.catalog.gate = asyncio.Event()
    bodies = [{"name": "new", "source": "/adapters/new", "stream": watched} for watched in (True, False)]
    adding = [asyncio.create_task(served.client.post("/v1/adapters", json=body)) for body in bodies]
    await until(lambda: served.catalog.adding == 2)
    served.drain.interrupt()
    watched, whole = await asyncio.wait_for(asyncio.gather(*adding), 5)
    events = [line[6:] for line in watched.text.splitlines() if line.startswith("data: ")]
    assert json.loads(events[-2])["error"]["code"] == "shutting_down"
    assert events[-1] == "[DONE]"
    assert whole.status_code == 503


async def test_grpc(served: SimpleNamespace) -> None:
    served.script = Script(tuple([70] * 300), delay=0.02)
    server = await serve_grpc(served.deps, "127.0.0.1", 0)
    async with grpc.aio.insecure_channel(f"127.0.0.1:{server.port}") as channel:
        generate = inference_pb2_grpc.InferenceStub(channel).Generate
        call = generate(inference_pb2.GenerateRequest(model="base", text="hi", sampling={"max_tokens": 300}))
        assert (await call.read()).delta.token_ids == [70]
        served.drain.begin()
        for late in (
            generate(inference_pb2.GenerateRequest(model="base", text="hi")).read(),
            adapters_pb2_grpc.AdaptersStub(channel).Add(adapters_pb2.AddAdapterRequest(name="b", source="/b")),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as refused:
                await late
            assert refused.value.code() is grpc.StatusCode.UNAVAILABLE
            assert dict(refused.value.trailing_metadata())["preft-code"] == "shutting_down"
        assert (await call.read()).delta.token_ids == [70]  # it goes on
        served.drain.interrupt()
        with pytest.raises(grpc.aio.AioRpcError) as ended:
            await asyncio.wait_for(rest(call), 5)
        assert ended.value.code() is grpc.StatusCode.UNAVAILABLE
    await server.stop()


async def rest(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_time_out_of_the_request_itself_stays_one() -> None:
    drain = Drain()
    with pytest.raises(TimeoutError):
        async with drain.running():
            raise TimeoutError
    await asyncio.wait_for(drain.wait_idle(), 1)


async def test_a_request_that_is_cancelled_by_its_client_stays_cancelled() -> None:
    drain = Drain()

    async def request() -> None:
        async with drain.running():
            await asyncio.Event().wait()

    task = asyncio.create_task(request())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(drain.wait_idle(), 1)
    drain.interrupt()
    with pytest.raises(ShuttingDown):
        await request()


def worker(name: str, role: Role, state: WorkerState) -> WorkerSeen:
    return WorkerSeen(Worker(name, role, "127.0.0.1:1", "f", 7, engine_pids=(8,)), state, WorkerStatus(), 3.0)


async def test_ready_says_what_it_waits_for(tokenizer) -> None:
    workers: list[WorkerSeen] = []
    generator = FakeGenerator(lambda request: Script(), is_ready=False)
    deps = GatewayDeps("base", tokenizer, 64, generator, FakeCatalog.of(), workers=lambda: workers)
    transport = httpx.ASGITransport(create_app(deps))
    async with httpx.AsyncClient(base_url="http://127.0.0.1", transport=transport) as client:

        async def said() -> str:
            reply = await client.get("/ready")
            assert reply.status_code == 503
            assert [entry["id"] for entry in reply.json()["workers"]] == [one.worker.id for one in workers]
            return str(reply.json()["reason"])

        assert await said() == (
            "no prefill worker is ready: none has registered yet; no decode worker is ready: none has registered yet"
        )
        workers.append(worker("p0", Role.PREFILL, WorkerState.READY))
        workers.append(worker("d0", Role.DECODE, WorkerState.STARTING))
        workers.append(worker("d1", Role.DECODE, WorkerState.DEAD))
        assert (await said()).startswith("no decode worker is ready: d0 has been loading its engine for 3 s")
        assert (await said()).endswith(" s, d1 is dead")
        workers[1] = worker("d0", Role.DECODE, WorkerState.READY)
        assert await said() == "the workers that are ready don't fit together"
        listed = (await client.get("/v1/workers")).json()["workers"]
        assert [(one["id"], one["role"], one["state"], one["pid"], one["engine_pids"]) for one in listed] == [
            ("p0", "prefill", "ready", 7, [8]),
            ("d0", "decode", "ready", 7, [8]),
            ("d1", "decode", "dead", 7, [8]),
        ]
