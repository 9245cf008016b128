"""Wires the HTTP API together. The routes, and the modules that they call, hold the behaviour."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.middleware.errors import ServerErrorMiddleware

from preft import __version__
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.browser_guard import BrowserGuard
from preft.gateway.http.caller import RequireKey
from preft.gateway.http.drain import DrainRequests
from preft.gateway.http.errors import answer_error, install_error_handlers
from preft.gateway.http.methods import HeadAndSlashes
from preft.gateway.http.openapi import DescribedApp
from preft.gateway.http.routes.adapters import adapter_routes, vllm_adapter_routes
from preft.gateway.http.routes.anthropic import anthropic_routes
from preft.gateway.http.routes.docs import docs_routes
from preft.gateway.http.routes.models import model_routes
from preft.gateway.http.routes.openai import openai_routes
from preft.gateway.http.routes.operations import operations_routes
from preft.gateway.http.routes.responses import responses_routes
from preft.gateway.http.routes.tokenize import tokenize_routes
from preft.gateway.metrics import CountResponses


def create_app(deps: GatewayDeps) -> FastAPI:
    """The OpenAI-compatible HTTP API over `deps`. One GatewayDeps makes one app: its metrics are registered once."""
    app = DescribedApp(title="PreFT Serve", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False)
    for routes in (
        openai_routes, responses_routes, anthropic_routes, tokenize_routes, model_routes, adapter_routes,
        vllm_adapter_routes, operations_routes,
    ):  # fmt: skip
        app.include_router(routes(deps))
    app.include_router(docs_routes())
    install_error_handlers(app)
    app.add_middleware(DrainRequests, drain=deps.drain)
    if deps.access is not None:
        app.needs_keys = True
        app.add_middleware(RequireKey, access=deps.access)
    # Inside BrowserGuard, which adds the CORS headers to the 500 for an unexpected error too.
    app.add_middleware(ServerErrorMiddleware, handler=answer_error)
    app.add_middleware(BrowserGuard, hosts=deps.allowed_hosts, origins=deps.allowed_origins)
    app.add_middleware(CountResponses, registry=deps.registry)
    app.add_middleware(HeadAndSlashes)
    return app
