"""The status stream of the fake workers, on which the router's tests rely."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import grpc.aio
import pytest

from preft.core.cluster import AdapterState, AdapterStatus, WorkerState
from preft.core.errors import WorkerFull
from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto
from preft.rpc.status import error_from_rpc
from support.fake_workers import FakeCluster, FakePrefill, a_ref, digest_of
from support.status_watcher import watching

ADA, BOB = digest_of("ada"), digest_of("bob")


@pytest.fixture
async def worker() -> AsyncIterator[FakePrefill]:
    cluster = FakeCluster()
    worker = await cluster.add_prefill("p0", adapters=(ADA,), adapter_slots=1, delay=0.2, staging_bytes=100)
    yield worker
    await cluster.stop()


def prefill_of(name: str) -> workers_pb2.PrefillRequest:
    return workers_pb2.PrefillRequest(prompt_token_ids=[1], n=1, adapter=adapter_to_proto(a_ref(name)))


async def test_a_fake_worker_tells_the_truth(worker: FakePrefill) -> None:
    async with watching(worker.address, "one") as (one, channel), watching(worker.address, "two") as (two, _):
        await one.until(lambda: bool(one.updates))
        assert one.updates[0].is_whole
        assert one.adapters == {ADA: AdapterStatus(AdapterState.HOST)}
        assert one.status.staging_bytes_fit == 100
        worker.load_seconds = 0.1
        prefetch = workers_pb2_grpc.WorkerAdaptersStub(channel).Prefetch(adapter_to_proto(a_ref("bob")))
        await one.until(lambda: one.knows(BOB) == AdapterStatus(AdapterState.LOADING))
        await prefetch
        await one.until(lambda: one.knows(BOB) == AdapterStatus(AdapterState.HOST))
        stub = workers_pb2_grpc.PrefillWorkerStub(channel)
        call = stub.Prefill(prefill_of("bob"))
        await two.until(lambda: two.status.other_prompts == 1)
        assert two.knows(BOB) == AdapterStatus(AdapterState.SLOT, 1)
        await one.until(lambda: one.status.running == 1)
        assert one.status.other_prompts == 0
        assert one.knows(BOB).other_prompts == 0
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await stub.Prefill(prefill_of("ada")).read()
        assert type(error_from_rpc(refused.value, "p0")) is WorkerFull
        assert worker.full == 1
        assert len([event async for event in call]) == 1
        await two.until(lambda: two.status.other_prompts == 0 and two.knows(BOB).other_prompts == 0)
        worker.state = WorkerState.DRAINING
        worker.adapters = ()
        await one.until(lambda: one.status.draining and one.knows(ADA) == AdapterStatus(None))


async def test_a_fake_worker_tells_what_the_test_says(worker: FakePrefill) -> None:
    async with watching(worker.address, "one") as (one, _):
        worker.tell(running=7, draining=True, adapters={BOB: AdapterState.SLOT, ADA: None}, others={BOB: 3})
        await one.until(lambda: one.status.running == 7 and one.status.draining)
        assert one.knows(BOB) == AdapterStatus(AdapterState.SLOT, 3)
        assert one.knows(ADA) == AdapterStatus(None)
        worker.tell_truth()
        await one.until(lambda: one.status.running == 0 and not one.status.draining)
        assert one.knows(ADA) == AdapterStatus(AdapterState.HOST)
        worker.silent_since = 0.0
        count = len(one.updates)
        await asyncio.sleep(1.2)
        assert len(one.updates) == count
        worker.silent_since = None
        await one.until(lambda: len(one.updates) > count)
