"""What can be named in `model`: /v1/models, and the adapters behind it in vLLM's and in our own way."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from preft.core.cluster import Adapter
from preft.core.errors import InvalidRequest, ModelNotFound
from preft.gateway.deps import GatewayDeps
from preft.gateway.parse import read_body
from preft.gateway.schemas import AddAdapterBody, LoadAdapterBody, UnloadAdapterBody


def model_routes(deps: GatewayDeps) -> APIRouter:
    """/v1/models: the base model first, then the adapters, whose `parent` it is."""
    router = APIRouter(tags=["Models"])

    @router.get("/v1/models", response_class=Response)
    async def models() -> Response:
        cards = [_base_card(deps), *(_adapter_card(adapter, deps) for adapter in deps.catalog.list())]
        return JSONResponse({"object": "list", "data": cards})

    @router.get("/v1/models/{name:path}", response_class=Response)
    async def model(name: str) -> Response:
        if name == deps.model_name:
            return JSONResponse(_base_card(deps))
        adapter = deps.catalog.get(name)
        if adapter is None:
            raise ModelNotFound(f"The model {name!r} does not exist.")
        return JSONResponse(_adapter_card(adapter, deps))

    return router


def adapter_routes(deps: GatewayDeps) -> APIRouter:
    router = APIRouter(tags=["Adapters"])

    @router.post("/v1/load_lora_adapter", response_class=PlainTextResponse)
    async def load_lora_adapter(request: Request) -> Response:
        body = await read_body(request, LoadAdapterBody, deps.max_body_bytes)
        if not body.load_inplace and deps.catalog.get(body.lora_name) is not None:
            raise InvalidRequest(
                f"The lora adapter {body.lora_name!r} has already been loaded. Set load_inplace to replace it.",
                "lora_name",
            )
        await deps.catalog.add(body.lora_name, body.lora_path, replace=body.load_inplace)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post("/v1/unload_lora_adapter", response_class=PlainTextResponse)
    async def unload_lora_adapter(request: Request) -> Response:
        body = await read_body(request, UnloadAdapterBody, deps.max_body_bytes)
        await deps.catalog.remove(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @router.get("/v1/adapters", response_class=Response)
    async def list_adapters() -> Response:
        return JSONResponse({"object": "list", "data": [_adapter(adapter) for adapter in deps.catalog.list()]})

    @router.post("/v1/adapters", response_class=Response)
    async def add_adapter(request: Request) -> Response:
        body = await read_body(request, AddAdapterBody, deps.max_body_bytes)
        return JSONResponse(_adapter(await deps.catalog.add(body.name, body.path, replace=body.replace)))

    @router.delete("/v1/adapters/{name:path}", response_class=Response)
    async def remove_adapter(name: str) -> Response:
        return JSONResponse({**_adapter(await deps.catalog.remove(name)), "deleted": True})

    return router


def _base_card(deps: GatewayDeps) -> dict[str, Any]:
    root = deps.model_root or deps.model_name
    return _card(deps.model_name, deps.created, root, parent=None, max_model_len=deps.max_model_len)


def _adapter_card(adapter: Adapter, deps: GatewayDeps) -> dict[str, Any]:
    return _card(adapter.name, int(adapter.created), adapter.source, parent=deps.model_name, max_model_len=None)


def _card(name: str, created: int, root: str, parent: str | None, max_model_len: int | None) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "preft",
        "root": root,
        "parent": parent,
        "max_model_len": max_model_len,
    }


def _adapter(adapter: Adapter) -> dict[str, Any]:
    return {
        "name": adapter.name,
        "object": "adapter",
        "digest": adapter.digest,
        "source": adapter.source,
        "kind": adapter.kind,
        "rank": adapter.rank,
        "prefill_only": adapter.prefill_only,
        "created": int(adapter.created),
    }
