"""/health, /ready, /version, /metrics and /v1/workers, for load balancers, Prometheus and `preft status`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.responses import JSONResponse, PlainTextResponse, Response

from preft import __version__
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.caller import caller_of
from preft.gateway.http.openapi import answers, errors
from preft.gateway.http.reply_types import HealthReply, NotReadyReply, VersionReply, WorkersReply
from preft.gateway.readiness import worker_json


def operations_routes(deps: GatewayDeps) -> APIRouter:
    router = APIRouter(tags=["Operations"])

    @router.get("/health", responses=answers(HealthReply))
    async def health() -> Response:
        """200 while this process answers."""
        return JSONResponse({"status": "alive"})

    @router.get("/ready", responses={**answers(HealthReply), 503: {"model": NotReadyReply, "description": "Not ready"}})
    async def ready() -> Response:
        """200 if a request would be served now, else 503."""
        if not (reason := deps.unready()):
            return JSONResponse({"status": "ready"})
        workers = [worker_json(seen) for seen in deps.workers()]
        return JSONResponse({"status": "not ready", "reason": reason, "workers": workers}, 503)

    @router.get("/version", responses=answers(VersionReply))
    async def version() -> Response:
        """The version of PreFT Serve."""
        return JSONResponse({"version": __version__})

    @router.get("/v1/workers", responses=answers(WorkersReply))
    async def workers(request: Request) -> Response:
        """The workers as the router sees them, each with the state that it told last."""
        caller_of(request, deps).check_operator()
        return JSONResponse({"workers": [seen.as_json() for seen in deps.workers()]})

    @router.get("/metrics", response_class=PlainTextResponse, responses=errors())
    async def metrics(request: Request) -> Response:
        caller_of(request, deps).check_operator()
        return Response(generate_latest(deps.registry), media_type=CONTENT_TYPE_LATEST)

    return router
