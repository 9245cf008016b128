"""Adds a decode worker's services to its server: choices out, and the KV of prompts in."""

from __future__ import annotations

import grpc.aio

from preft.rpc import kv_transfer_pb2, workers_pb2, workers_pb2_grpc
from preft.transfer.grpc_receive import kv_transfer_handler
from preft.transfer.handles import HandleTable
from preft.transfer.receive import KvReceiver
from preft.worker.decode.service import DecodeService
from preft.worker.role import Parts, Served


def add_services(server: grpc.aio.Server, parts: Parts) -> Served:
    """`DecodeWorker` and `KvTransfer` over one table of handles."""
    timeout = parts.transfer_timeout
    handles = HandleTable(parts.arena, fingerprint=parts.fingerprint, lease=timeout)
    receiver = KvReceiver(parts.arena, handles, room_timeout=timeout, frame_timeout=timeout)
    service = DecodeService(parts.engine, handles, parts.usage)
    workers_pb2_grpc.add_DecodeWorkerServicer_to_server(service, server)  # type: ignore[no-untyped-call]
    server.add_generic_rpc_handlers((kv_transfer_handler(receiver, parts.secret),))
    names = (
        workers_pb2.DESCRIPTOR.services_by_name["DecodeWorker"].full_name,
        kv_transfer_pb2.DESCRIPTOR.services_by_name["KvTransfer"].full_name,
    )
    return Served(names, handles)
