"""A worker as it registers. What it serves and reports is in tests/integration."""

from __future__ import annotations

import socket
from pathlib import Path

import grpc.aio
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from preft.cluster.worker_process import worker_setup
from preft.core.cluster import Role
from preft.worker.server import WorkerServer
from support.fakes import FakeStore
from support.worker_servers import StartFake, settings_for


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason="no IPv6 here")
async def test_an_ipv6_address_is_registered_as_others_reach_it(tmp_path: Path) -> None:
    store = FakeStore()
    worker = await WorkerServer.start(
        worker_setup(settings_for(tmp_path), Role.DECODE), "d0", "::1", store, StartFake()
    )
    assert worker.record.address.startswith("[::1]:")
    async with grpc.aio.insecure_channel(worker.record.address) as channel:
        reply = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
    assert reply.status == health_pb2.HealthCheckResponse.SERVING
    await worker.close()
