"""Adds a colocated worker's service to its server."""

from __future__ import annotations

import grpc.aio

from preft.rpc import workers_pb2, workers_pb2_grpc
from preft.worker.colocated.service import ColocatedService
from preft.worker.role import Parts, Served


def add_services(server: grpc.aio.Server, parts: Parts) -> Served:
    """`DecodeWorker` over the worker's adapters. No KV arrives, so there are no handles."""
    assert parts.adapters is not None
    service = ColocatedService(parts.engine, parts.adapters, parts.usage)
    workers_pb2_grpc.add_DecodeWorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    return Served((workers_pb2.DESCRIPTOR.services_by_name["DecodeWorker"].full_name,))
