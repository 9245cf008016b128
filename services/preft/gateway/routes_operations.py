"""For load balancers and Prometheus: /health, /ready, /metrics."""

from __future__ import annotations

from fastapi import APIRouter
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from preft.gateway.deps import GatewayDeps
from preft.gateway.openapi import answers
from preft.gateway.reply_types import HealthReply


def operations_routes(deps: GatewayDeps) -> APIRouter:
    router = APIRouter(tags=["Operations"])

    @router.get("/health", responses=answers(HealthReply))
    async def health() -> Response:
        """200 while this process answers."""
        return JSONResponse({"status": "alive"})

    @router.get("/ready", responses={**answers(HealthReply), 503: {"model": HealthReply, "description": "Not ready"}})
    async def ready() -> Response:
        """200 when a request would be served now, else 503."""
        if deps.generator.ready():
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "not ready"}, 503)

    @router.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(generate_latest(deps.registry), media_type=CONTENT_TYPE_LATEST)

    return router
