"""A cluster of several machines: adapters that only one machine can read reach the others."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from preft.cli.packing import Package
from preft.cluster.gateway_process import RunningGateway
from preft.core.cluster import Role
from preft.core.request import AdapterRef, Sampling
from preft.rpc import workers_pb2_grpc
from preft.rpc.convert import adapter_to_proto
from preft.rpc.secret import ClusterChannel, ClusterSecret
from support.fake_engine import tokens_of
from support.machines import PROMPT, SECRET, Machines
from support.models import make_lora, make_model
from support.redis_server import RedisServer

pytestmark = pytest.mark.timeout(120)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model", max_position_embeddings=128)


@pytest.fixture
async def machines(tmp_path: Path, model: Path, redis_server: RedisServer) -> AsyncIterator[Machines]:
    async with AsyncExitStack() as stack:
        machines = Machines(tmp_path, model, redis_server.url(), stack)
        await machines.worker("decode", Role.DECODE)
        yield machines
        await machines.client.aclose()


async def served(machines: Machines, gateway: RunningGateway, name: str) -> None:
    """Fails unless the gateway's answer is made with the adapter."""
    reply, adapter = await machines.ask(gateway, name), gateway.catalog.get(name)
    assert reply.status_code == 200, reply.text
    assert adapter is not None
    expected = tokens_of(adapter.digest, PROMPT, Sampling(max_tokens=3, temperature=0.0, ignore_eos=True))
    assert reply.json()["choices"][0]["token_ids"] == expected


async def prefetch(gateway: RunningGateway, worker: str, name: str) -> None:
    """Makes the worker load the adapter, as a router does."""
    adapter, address = gateway.catalog.get(name), gateway.router.view.workers[worker].worker.address
    assert adapter is not None
    async with ClusterChannel(address, ClusterSecret(SECRET)) as channel:
        ref = AdapterRef(adapter.name, adapter.digest, adapter.source)
        await workers_pb2_grpc.WorkerAdaptersStub(channel).Prefetch(adapter_to_proto(ref), timeout=20)


def copies(machines: Machines, name: str) -> list[str]:
    return [entry for entry in os.listdir(machines.state_dir(name) / "adapters") if not entry.startswith(".")]


async def test_an_upload_reaches_workers_of_other_machines(machines: Machines, model: Path) -> None:
    adapter = make_lora(machines.root / "ann", model, rank=4, seed=1)
    one, close_one = await machines.gateway("gateway-a")
    two, _ = await machines.gateway("gateway-b")
    await machines.worker("prefill-a")
    await machines.ready(one, two, workers=1)
    url = f"http://{one.address}/v1/adapters/ann"
    assert (await machines.client.put(url, content=b"".join(Package.of(adapter)))).status_code == 200
    shutil.rmtree(adapter)
    digest = await machines.until_known(two, "ann")
    await served(machines, two, "ann")
    assert copies(machines, "prefill-a") == [digest]

    await close_one()  # from here on, only the worker has the content
    shutil.rmtree(machines.root / "gateway-a")
    await machines.worker("prefill-b")
    await machines.ready(two, workers=2)
    await prefetch(two, "prefill-b", "ann")
    assert copies(machines, "prefill-b") == [digest]


@pytest.mark.parametrize("harm", ["evicted", "damaged"])
async def test_a_gateway_without_a_good_copy_reads_the_upload(machines: Machines, model: Path, harm: str) -> None:
    gateway, _ = await machines.gateway("gateway-a")
    await machines.worker("prefill-a")
    await machines.ready(gateway, workers=1)
    adapter = make_lora(machines.root / "ann", model, rank=4, seed=1)
    url = f"http://{gateway.address}/v1/adapters/ann"
    assert (await machines.client.put(url, content=b"".join(Package.of(adapter)))).status_code == 200
    [digest] = copies(machines, "gateway-a")
    copy = machines.state_dir("gateway-a") / "adapters" / digest
    if harm == "evicted":
        shutil.rmtree(copy)
    else:
        weights = copy / "adapter_model.safetensors"
        weights.chmod(0o600)
        weights.write_bytes(bytes(weights.stat().st_size))
    await served(machines, gateway, "ann")


async def test_a_folder_that_has_changed_or_is_gone_everywhere(machines: Machines, model: Path) -> None:
    one, _ = await machines.gateway("gateway-a")
    two, _ = await machines.gateway("gateway-b")
    await machines.worker("prefill-a")
    await machines.ready(one, two, workers=1)
    folder = make_lora(machines.root / "ann", model, rank=4, seed=1)
    added = await one.catalog.add("ann", str(folder))
    await machines.until_known(two, "ann")
    shutil.rmtree(machines.state_dir("gateway-a") / "adapters" / added.digest)
    kept = folder.rename(machines.root / "kept")
    make_lora(folder, model, rank=4, seed=2)
    reply = await machines.ask(two, "ann")
    assert reply.status_code == 503
    assert reply.json()["error"]["code"] == "adapter_unavailable"
    assert reply.json()["error"]["message"].startswith("adapter 'ann' can't be used now: ")
    assert copies(machines, "prefill-a") == []

    shutil.rmtree(folder)
    kept.rename(folder)
    async with asyncio.timeout(20):  # the router asks a worker again some seconds after a failed load
        while (reply := await machines.ask(two, "ann")).status_code != 200:
            await asyncio.sleep(0.2)
    assert copies(machines, "prefill-a") == [added.digest]
