"""Adds a prefill worker's service to its server."""

from __future__ import annotations

import grpc.aio

from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.worker.prefill.service import PrefillService
from preft.worker.role import Parts, Served


def add_services(server: grpc.aio.Server, parts: Parts) -> Served:
    """`PrefillWorker` over the worker's adapters, arena and KV sender."""
    assert parts.adapters is not None
    service = PrefillService(parts.engine, parts.adapters, parts.arena, parts.sender, parts.fingerprint, parts.usage)
    workers_pb2_grpc.add_PrefillWorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    return Served((workers_pb2.DESCRIPTOR.services_by_name["PrefillWorker"].full_name,))
