"""A worker as it registers. What it serves and reports is in tests/integration."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from preft.cluster.worker import StartEngine, WorkerServer
from preft.core.cluster import Role
from preft.core.settings import MiB, Settings, load_settings
from preft.state.sqlite import SqliteStore
from support.fake_engine import FakeEngine
from support.lora_folders import write_base


class StartFake(StartEngine):
    async def __call__(self, settings: Settings, role: Role, arena: str, adapter_arena: str) -> FakeEngine:
        return FakeEngine(role, arena, adapter_arena)


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_an_ipv6_address_is_registered_as_others_reach_it(tmp_path: Path) -> None:
    overrides = {
        "model": str(write_base(tmp_path / "base")),
        "decode": {"staging_bytes": MiB},
        "state_dir": str(tmp_path / "state"),
    }
    store = SqliteStore(tmp_path / "state.sqlite")
    worker = await WorkerServer.start(load_settings(None, overrides), Role.DECODE, "d0", "::1", store, StartFake())
    assert worker.record.address.startswith("[::1]:")
    async with grpc.aio.insecure_channel(worker.record.address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    await worker.close()
    await store.close()
