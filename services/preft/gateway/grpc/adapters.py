"""The public gRPC service Adapters: the same view of the catalog as HTTP's."""

from __future__ import annotations

from typing import Any

from preft.core.errors import InvalidRequest
from preft.gateway.bodies.adapter_schemas import DEFAULT_LIMIT, ListQuery
from preft.gateway.bodies.parse import parse_body
from preft.gateway.deps import GatewayDeps
from preft.gateway.grpc.caller import caller_of
from preft.gateway.listing import entry, page
from preft.rpc import adapters_pb2, adapters_pb2_grpc
from preft.rpc.convert import entry_to_proto
from preft.rpc.status import errors_reported


class AdaptersService(adapters_pb2_grpc.AdaptersServicer):
    def __init__(self, deps: GatewayDeps) -> None:
        self._deps = deps
        self._drain = deps.drain

    async def Add(self, request: adapters_pb2.AddAdapterRequest, context: Any) -> adapters_pb2.Adapter:
        async with errors_reported(context), self._drain.running():
            catalog = caller_of(context, self._deps).check_admin()
            if not request.name or not request.source:
                raise InvalidRequest("name and source must be given.", "source" if request.name else "name")
            return entry_to_proto(await catalog.add(request.name, request.source, replace=request.replace))

    async def List(self, request: adapters_pb2.ListAdaptersRequest, context: Any) -> adapters_pb2.ListAdaptersReply:
        async with errors_reported(context):
            asked = {"limit": request.limit or DEFAULT_LIMIT, "after": request.after, "search": request.search}
            catalog = caller_of(context, self._deps).catalog
            found = page(catalog.list(), parse_body(ListQuery, asked))
            adapters = [entry_to_proto(adapter) for adapter in found.entries]
            return adapters_pb2.ListAdaptersReply(adapters=adapters, has_more=found.has_more, total=found.total)

    async def Get(self, request: adapters_pb2.GetAdapterRequest, context: Any) -> adapters_pb2.Adapter:
        async with errors_reported(context):
            return entry_to_proto(entry(caller_of(context, self._deps).catalog, request.name))

    async def Pin(self, request: adapters_pb2.PinAdapterRequest, context: Any) -> adapters_pb2.Adapter:
        async with errors_reported(context), self._drain.running():
            catalog = caller_of(context, self._deps).check_admin()
            return entry_to_proto(await catalog.pin(request.name, request.pinned))

    async def Remove(self, request: adapters_pb2.RemoveAdapterRequest, context: Any) -> adapters_pb2.Adapter:
        async with errors_reported(context), self._drain.running():
            catalog = caller_of(context, self._deps).check_admin()
            return entry_to_proto(await catalog.remove(request.name))
