"""/v1/models: the names that `model` may have. The base model comes first, then the adapters, with it as `parent`."""

from __future__ import annotations

import asyncio
import json

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, Response

from preft.core.cluster import Adapter
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.caller import caller_of
from preft.gateway.http.openapi import answers
from preft.gateway.http.reply_types import ModelCard, ModelList
from preft.gateway.listing import served_version

SLICE = 1000  # entries written before running token streams get their turn: a few milliseconds


def model_routes(deps: GatewayDeps) -> APIRouter:
    """/v1/models. OpenAI's list has no pages, so this list holds every adapter."""
    router = APIRouter(tags=["Models"])

    @router.get("/v1/models", responses=answers(ModelList))
    async def models(request: Request) -> Response:
        adapters = caller_of(request, deps).catalog.list()
        cards = [json.dumps(_base_card(deps))]
        for start in range(0, len(adapters), SLICE):
            cards += [json.dumps(_adapter_card(adapter, deps)) for adapter in adapters[start : start + SLICE]]
            await asyncio.sleep(0)
        return Response(f'{{"object":"list","data":[{",".join(cards)}]}}', media_type="application/json")

    @router.get("/v1/models/{name:path}", responses=answers(ModelCard))
    async def model(name: str, request: Request) -> Response:
        if name == deps.model_name:
            return JSONResponse(_base_card(deps))
        return JSONResponse(_adapter_card(served_version(caller_of(request, deps).catalog, name), deps))

    return router


def _base_card(deps: GatewayDeps) -> ModelCard:
    root = deps.model_root or deps.model_name
    return _card(deps.model_name, deps.created, root, parent=None, max_model_len=deps.max_model_len)


def _adapter_card(adapter: Adapter, deps: GatewayDeps) -> ModelCard:
    return _card(adapter.name, int(adapter.created), adapter.source, parent=deps.model_name, max_model_len=None)


def _card(name: str, created: int, root: str, parent: str | None, max_model_len: int | None) -> ModelCard:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "preft",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
    }
