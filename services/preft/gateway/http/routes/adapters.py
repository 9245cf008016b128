"""The adapter endpoints, in this server's form and in vLLM's. The catalog judges the adapters."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.adapter_schemas import (
    AddAdapterBody,
    ListQuery,
    LoadAdapterBody,
    PinAdapterBody,
    UnloadAdapterBody,
    UploadQuery,
)
from preft.gateway.deps import GatewayDeps
from preft.gateway.http.adapter_json import adapter_json, page_json, place_json
from preft.gateway.http.add_stream import AddStream
from preft.gateway.http.caller import caller_of
from preft.gateway.http.disconnect import while_connected
from preft.gateway.http.openapi import answers, archive_body, errors, json_body, query
from preft.gateway.http.parse import parse_query, read_body
from preft.gateway.http.reply_types import AdapterList, AdapterReply, RemovedAdapter, ShownAdapter
from preft.gateway.http.upload import receive_archive
from preft.gateway.listing import entry, page

_VLLM_PARAMS = {"name": "lora_name", "source": "lora_path"}  # the catalog's parameter -> vLLM's


def adapter_routes(deps: GatewayDeps) -> APIRouter:
    """/v1/adapters. Names may hold slashes."""
    router = APIRouter(tags=["Adapters"])

    @router.get("/v1/adapters", responses=answers(AdapterList), openapi_extra=query(ListQuery))
    async def list_adapters(request: Request) -> Response:
        return JSONResponse(page_json(page(caller_of(request, deps).catalog.list(), parse_query(ListQuery, request))))

    @router.post("/v1/adapters", responses=answers(AdapterReply, stream=True), openapi_extra=json_body(AddAdapterBody))
    async def add_adapter(request: Request) -> Response:
        catalog = caller_of(request, deps).check_admin()
        body = await read_body(request, AddAdapterBody, deps.max_body_bytes)
        if body.stream:
            return AddStream(lambda told: catalog.add(body.name, body.origin, replace=body.replace, progress=told))
        adapter = await while_connected(request.receive, catalog.add(body.name, body.origin, replace=body.replace))
        return JSONResponse(adapter_json(adapter))

    @router.get("/v1/adapters/{name:path}", responses=answers(ShownAdapter))
    async def show_adapter(name: str, request: Request) -> Response:
        """`workers` tells of the requests of all tenants that have the same content: only operators see it."""
        caller = caller_of(request, deps)
        adapter = entry(caller.catalog, name)
        places = [place_json(place) for place in deps.places(adapter.digest)] if caller.is_operator else []
        return JSONResponse({**adapter_json(adapter), "workers": places})

    @router.put(
        "/v1/adapters/{name:path}",
        responses=answers(AdapterReply),
        openapi_extra={**query(UploadQuery), **archive_body()},
    )
    async def upload_adapter(name: str, request: Request) -> Response:
        catalog = caller_of(request, deps).check_admin()
        query = parse_query(UploadQuery, request)
        async with receive_archive(request, deps.max_adapter_bytes, deps.upload_folder) as archive:
            return JSONResponse(adapter_json(await catalog.add_archive(name, archive, replace=query.replace)))

    @router.patch("/v1/adapters/{name:path}", responses=answers(AdapterReply), openapi_extra=json_body(PinAdapterBody))
    async def pin_adapter(name: str, request: Request) -> Response:
        catalog = caller_of(request, deps).check_admin()
        body = await read_body(request, PinAdapterBody, deps.max_body_bytes)
        return JSONResponse(adapter_json(await catalog.pin(name, body.pinned)))

    @router.delete("/v1/adapters/{name:path}", responses=answers(RemovedAdapter))
    async def remove_adapter(name: str, request: Request) -> Response:
        catalog = caller_of(request, deps).check_admin()
        return JSONResponse({**adapter_json(await catalog.remove(name)), "deleted": True})

    return router


def vllm_adapter_routes(deps: GatewayDeps) -> APIRouter:
    """/v1/load_lora_adapter and /v1/unload_lora_adapter, with vLLM's parameters and replies."""
    router = APIRouter(tags=["Adapters"])

    @router.post(
        "/v1/load_lora_adapter",
        response_class=PlainTextResponse,
        responses=errors(),
        openapi_extra=json_body(LoadAdapterBody),
    )
    async def load_lora_adapter(request: Request) -> Response:
        catalog = caller_of(request, deps).check_admin()
        body = await read_body(request, LoadAdapterBody, deps.max_body_bytes)
        if not body.load_inplace and catalog.get(body.lora_name) is not None:
            raise InvalidRequest(
                f"The lora adapter {body.lora_name!r} has already been loaded. Set load_inplace to replace it.",
                "lora_name",
            )
        try:
            await while_connected(
                request.receive, catalog.add(body.lora_name, body.lora_path, replace=body.load_inplace)
            )
        except InvalidRequest as error:
            error.param = _VLLM_PARAMS.get(error.param or "", error.param)
            raise
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @router.post(
        "/v1/unload_lora_adapter",
        response_class=PlainTextResponse,
        responses=errors(),
        openapi_extra=json_body(UnloadAdapterBody),
    )
    async def unload_lora_adapter(request: Request) -> Response:
        catalog = caller_of(request, deps).check_admin()
        body = await read_body(request, UnloadAdapterBody, deps.max_body_bytes)
        await catalog.remove(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return router
