"""Starts the public gRPC server: the services, health checks that follow readiness, and reflection."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from preft.core.errors import ConfigError
from preft.core.settings import host_and_port
from preft.gateway.deps import GatewayDeps
from preft.gateway.grpc.adapters import AdaptersService
from preft.gateway.grpc.caller import RequireKey
from preft.gateway.grpc.inference import InferenceService
from preft.rpc import adapters_pb2, adapters_pb2_grpc, inference_pb2, inference_pb2_grpc
from preft.rpc.liveness import ACCEPT_PINGS
from preft.rpc.readable import ReadableMessages

_INFERENCE = inference_pb2.DESCRIPTOR.services_by_name["Inference"].full_name
_ADAPTERS = adapters_pb2.DESCRIPTOR.services_by_name["Adapters"].full_name
_HEALTH = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
_WATCH_INTERVAL = 0.5  # seconds


@dataclass(frozen=True, slots=True)
class RpcServer:
    """A started server. `port` is the port that it listens on."""

    port: int
    server: Any

    async def stop(self, grace: float = 0.0) -> None:
        """Refuses new calls, and ends running calls after `grace` seconds."""
        await self.server.stop(grace)


async def serve_grpc(deps: GatewayDeps, host: str, port: int) -> RpcServer:
    """Starts Inference and Adapters on `host:port`; port 0 means any free port. Raises ConfigError for a taken port."""
    limit = ("grpc.max_receive_message_length", deps.max_body_bytes)
    options = [("grpc.so_reuseport", 0), limit, *ACCEPT_PINGS]
    guards = [ReadableMessages()] if deps.access is None else [RequireKey(deps.access), ReadableMessages()]
    server = grpc.aio.server(options=options, interceptors=guards)
    inference_pb2_grpc.add_InferenceServicer_to_server(InferenceService(deps), server)  # type: ignore[no-untyped-call]
    adapters_pb2_grpc.add_AdaptersServicer_to_server(AdaptersService(deps), server)  # type: ignore[no-untyped-call]
    health_pb2_grpc.add_HealthServicer_to_server(_Health(deps), server)
    reflection.enable_server_reflection((_INFERENCE, _ADAPTERS, _HEALTH, reflection.SERVICE_NAME), server)
    address = host_and_port(host, port)
    try:
        bound = server.add_insecure_port(address)
    except RuntimeError as error:
        raise ConfigError(f"grpc_port: can't listen on {address}: {error}") from error
    await server.start()
    return RpcServer(bound, server)


class _Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """SERVING under the same condition as /ready."""

    def __init__(self, deps: GatewayDeps) -> None:
        self._deps = deps

    async def Check(self, request: Any, context: Any) -> Any:
        if request.service not in ("", _INFERENCE, _ADAPTERS):
            await context.abort(grpc.StatusCode.NOT_FOUND, f"unknown service {request.service!r}")
        return self._now()

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[Any]:
        told = None
        while True:
            now = self._now()
            if now != told:
                yield now
                told = now
            await asyncio.sleep(_WATCH_INTERVAL)

    def _now(self) -> Any:
        status = health_pb2.HealthCheckResponse
        return status(status=status.NOT_SERVING if self._deps.unready() else status.SERVING)
